"""The catalogue: every mechanism by name. Reading it is how tests, benchmarks, command line, report and docs learn of one."""

from __future__ import annotations

from triton_attn import operators
from triton_attn.functional import ROWS
from triton_attn.mechanism import Mechanism

CATALOG: dict[str, Mechanism] = {row.name: row for row in ROWS}
operators.define(ROWS)
