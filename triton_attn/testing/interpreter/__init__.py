"""Triton's interpreter made strict: what a GPU does not forgive becomes an exception, and bfloat16 becomes right.

Plain `TRITON_INTERPRET=1` stores bfloat16 as bits and computes on the bits, reads and writes past the end of a tensor, and sees
neither races nor overflow (triton-lang/triton issue 11584 and pull request 11585). Files: `faults` what can go wrong, `formats`
number formats, `memory` who may touch what, `handles` what a block remembers, `programs` a launch, `builder` and `reductions` the
operations, `libdevice` NVIDIA's own, `language` the switch.
"""

from triton_attn.testing.interpreter.faults import (
    AssertionFailed,
    DuplicateStore,
    FalsePromise,
    IntegerOverflow,
    InvalidDescriptor,
    InvalidGrid,
    KernelFault,
    Misaligned,
    OutOfBounds,
    Race,
    SmallDot,
    StrictnessError,
)
from triton_attn.testing.interpreter.strict import Record, require_interpreter, strict_interpreter

__all__ = [
    "AssertionFailed",
    "DuplicateStore",
    "FalsePromise",
    "IntegerOverflow",
    "InvalidDescriptor",
    "InvalidGrid",
    "KernelFault",
    "Misaligned",
    "OutOfBounds",
    "Race",
    "Record",
    "SmallDot",
    "StrictnessError",
    "require_interpreter",
    "strict_interpreter",
]
