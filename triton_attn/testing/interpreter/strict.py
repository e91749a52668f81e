"""The public switch. Triton is imported when it is used, not before: it decides at import whether it interprets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from triton_attn import device
from triton_attn.testing.interpreter.faults import StrictnessError

if TYPE_CHECKING:
    from torch import Tensor

    from triton_attn.testing.interpreter.memory import Bounds

KNOWN = ("3.6", "3.9")


@dataclass
class Record:
    """What ran inside a block: launches, the most programs of one, the `@triton.jit` functions, kernels and device functions alike."""

    launches: int = 0
    programs: int = 0
    tf32: bool = False  # a `tl.dot` multiplied float32 in tf32
    functions: dict[str, Any] = field(default_factory=dict)  # "module.function" -> the jit function


@contextmanager
def strict_interpreter(
    *,
    bounds: Bounds = "view",
    races: bool = True,
    overflow: bool = True,
    poison: bool = True,
    tf32: bool = True,
    order: int | None = None,
    reachable: Sequence[Tensor] = (),
) -> Iterator[Record]:
    """Make kernels interpreted under `TRITON_INTERPRET=1` strict, for the length of a `with` block.

    A fault raises a subclass of `KernelFault` that names kernel, source line, program, tensor argument and index. Always on: right
    bfloat16 (round to nearest even, products in float32), live `tl.device_assert`, `tl.assume` and `tl.multiple_of`, alignment,
    CUDA's grid limits, the compiler's least `tl.dot`, two lanes of one store at one address (with `races`), and scans and reductions
    on whole slices; arguments and loop variables of the types that the compiler gives them. An autotuned kernel runs with the first
    configuration that its pruning leaves, as there is nothing to time.

    Args:
        bounds: "view": a pointer may touch only the elements of the tensor argument it came from, holes between rows excluded;
            "storage": anything in that tensor's storage, for kernels that step out of a view on purpose; False: no check.
        races: two programs of one launch touch one element and one of them writes it, not both atomically. Complete for the
            executed input, whatever the order. Kernels that synchronise through memory need False.
        overflow: signed sums, differences and products narrower than 64 bits must fit; what is unsigned wraps by definition.
        poison: masked-off lanes of a load without `other` hold NaN, or a huge integer, instead of 0.
        tf32: operands of a tf32 dot lose their last 13 bits, as on tensor cores.
        order: run programs in an order shuffled by this seed; a kernel without atomics gives the same bits.
        reachable: tensors that a kernel reaches through addresses read from memory, which no argument shows.

    Yields:
        A record of what ran.

    Raises:
        StrictnessError: Triton is not interpreting, or its version is none that this knows.

    Not seen: hazards inside one program (missing barriers), layouts, compiler bugs, memory reached by inline assembly.
    """
    require_interpreter()
    from triton_attn.testing.interpreter import language

    record = Record()
    with language.strict(language.Settings(bounds, races, overflow, poison, tf32, order, tuple(reachable), record)):
        yield record


def require_interpreter() -> None:
    """StrictnessError unless kernels are interpreted here, by a Triton whose interpreter is known."""
    if not device.interpreting():
        raise StrictnessError("Triton is not interpreting; set TRITON_INTERPRET=1 before triton is imported, with a GPU or without")
    found = device.triton_version()
    if not found.startswith(tuple(f"{known}." for known in KNOWN)):
        raise StrictnessError(f"triton {found}: the strict interpreter knows {' and '.join(KNOWN)}; install one of them")
