"""Seeded faults that change nothing a call can show: each argument, the faults it holds for, and the rows it holds in.

Faults are named by `seeded.Fault.key`. Where an argument rests on what one row does (dense attention has rows of step 1), the other
rows that run the same function must catch the fault.
"""

from __future__ import annotations

from triton_attn.testing.equivalents.argument import Argument
from triton_attn.testing.equivalents.carried import CARRIED
from triton_attn.testing.equivalents.favor import FAVOR
from triton_attn.testing.equivalents.patterns import PATTERNS
from triton_attn.testing.equivalents.rows_and_scans import ROWS_AND_SCANS
from triton_attn.testing.equivalents.softmax import SOFTMAX

ARGUMENTS = (*SOFTMAX, *PATTERNS, *CARRIED, *FAVOR, *ROWS_AND_SCANS)


def equivalent(mechanism: str) -> dict[str, str]:
    """The faults that nobody need catch in a mechanism, each with the reason."""
    return {
        fault: argument.reason for argument in ARGUMENTS if not argument.rows or mechanism in argument.rows for fault in argument.faults
    }


__all__ = ["ARGUMENTS", "Argument", "equivalent"]
