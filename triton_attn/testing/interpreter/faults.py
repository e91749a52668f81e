"""What a kernel can do wrong, one class each, and where it did it."""

from __future__ import annotations

import linecache
import os
import sys
from pathlib import Path
from types import FrameType

_OWN = f"{Path(__file__).parent}{os.sep}"


class KernelFault(AssertionError):
    """Something that a GPU does not forgive, or answers wrongly.

    Attributes:
        kernel: name of the launched kernel.
        line: "file.py:33 in function", innermost first, up to the kernel.
        program: its three program ids; None before the first program runs.
        tensor: the tensor argument concerned, or "".
        index: the element of that tensor, counted from its start in elements; None where there is none.
    """

    def __init__(self, what: str, *, tensor: str = "", index: int | None = None) -> None:
        self.what, self.tensor, self.index = what, tensor, index
        self.kernel, self.program = "", None
        self.line, self.source = _where()
        super().__init__(what)

    kernel: str
    program: tuple[int, int, int] | None

    def __str__(self) -> str:
        parts = [self.what]
        if self.kernel:
            parts.append(f"  kernel  {self.kernel}" + (f", program {self.program}" if self.program else ""))
        if self.line:
            parts.append(f"  at      {self.line}")
        if self.source:
            parts.append(f"  line    {self.source}")
        return "\n".join(parts)


class OutOfBounds(KernelFault):
    """A lane touches memory outside the tensor argument that its pointer came from."""


class Race(KernelFault):
    """Two programs of one launch touch one element, and at least one of them writes it, not both atomically."""


class DuplicateStore(KernelFault):
    """Two lanes of one store write one element."""


class IntegerOverflow(KernelFault):
    """A signed integer sum, difference or product narrower than 64 bits does not fit."""


class AssertionFailed(KernelFault):
    """A `tl.device_assert` does not hold."""


class FalsePromise(KernelFault):
    """A `tl.multiple_of` or `tl.assume` tells the compiler what is not so."""


class Misaligned(KernelFault):
    """An address is no multiple of what the access needs."""


class InvalidDescriptor(KernelFault):
    """A tensor descriptor of a size that CUDA refuses."""


class InvalidGrid(KernelFault):
    """A grid that CUDA refuses, or that Triton's launcher silently skips."""


class SmallDot(KernelFault):
    """A `tl.dot` with fewer rows, columns or products than the compiler accepts."""


class StrictnessError(RuntimeError):
    """The strict interpreter cannot be used here; the message says what to do."""


def _where() -> tuple[str, str]:
    """("file:line in function, from ...", source) of the kernel's own frames: neither Triton's nor this folder's."""
    triton = getattr(sys.modules.get("triton"), "__file__", None)
    foreign = f"{Path(triton).parent}{os.sep}" if triton else _OWN  # not triton_attn, which may lie beside it
    places: list[str] = []
    source = ""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OWN):
            if frame.f_code.co_name == "run_programs":
                break
        elif not path.startswith(foreign):
            if not places:
                source = linecache.getline(path, frame.f_lineno).strip()
            places.append(f"{Path(path).name}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    else:
        return "", ""  # no kernel is running: the call stack is the user's own
    return ", from ".join(places), source
