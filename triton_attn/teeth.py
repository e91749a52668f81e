"""Do the tests have teeth? Seeded faults in a row's kernels against the row's own cases."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from triton_attn import verify
from triton_attn.catalog import CATALOG
from triton_attn.mechanism import Case, Kernel, Mechanism
from triton_attn.testing import inputs, numerics, seeded, strict_interpreter
from triton_attn.testing.equivalents import EQUIVALENT
from triton_attn.tiles import Tile

TILE = Tile(16, 16, 4, 1)


@dataclass(frozen=True)
class Tooth:
    """One fault planted in one kernel of a row: caught by which exception; else why it changes nothing; else it survived."""

    mechanism: str
    kernel: str
    function: str
    line: int
    kind: str
    change: str
    caught: str
    equivalent: str
    seconds: float

    @property
    def fault(self) -> str:
        return "" if self.caught or self.equivalent else f"survived: {self.change}"


def teeth(
    rows: Sequence[Mechanism], *, some: int | None = None, seed: int = 0, tick: Callable[[str], None] = lambda text: None
) -> Iterator[Tooth]:
    """Every fault, or `some` picked by `seed`, in what each kernel of each row runs."""
    for row in rows:
        for kernel in row.kernels:

            def say(fault: seeded.Fault, done: int, total: int, shown: str = f"{row.name} {kernel.name}") -> None:
                tick(f"{shown} {done}/{total} {fault.kind} in {fault.function.rpartition('.')[2]}")

            for bite in seeded.bite(partial(check, row, kernel), equivalent=EQUIVALENT, some=some, seed=seed, tick=say):
                fault = bite.fault
                change = f"{fault.before} -> {fault.after}"
                yield Tooth(
                    row.name, kernel.name, fault.function, fault.line, fault.kind, change, bite.caught, bite.equivalent, bite.seconds
                )


def check(row: Mechanism, kernel: Kernel) -> None:
    """The row's cases under the strict interpreter, forward and backward: AssertionError at the first that is wrong."""
    run = verify.kernel_run(row, kernel.load(), TILE)
    for expected in _calls(row.name, kernel.name):
        with strict_interpreter():
            comparisons = expected.judge(run)
        numerics.assert_right(comparisons, (expected.options, expected.dtype))


@functools.cache
def _calls(mechanism: str, variant: str) -> tuple[verify.Expected, ...]:
    """Small cases first: most faults are caught by the first call that runs them. Truth and bound are computed once."""
    row = CATALOG[mechanism]
    kernel = next(kernel for kernel in row.kernels if kernel.name == variant)
    served = [case for case in row.cases if not verify.refused(row, variant, case, torch.float16)]
    ordered = sorted(served, key=lambda case: sum(case.sizes.values()))
    calls = [(case, torch.float16, 1.0, inputs.CONTIGUOUS) for case in ordered]
    if kernel is row.kernels[-1]:
        for case, layout in zip(ordered, itertools.cycle((inputs.STRIDED, inputs.PERMUTED)), strict=False):
            calls.append((case, torch.float32, 8.0, layout))
        longer = [replace(long, sizes=row.fitted(long.sizes, long.options)) for case in _bare(row, ordered) for long in _long_axes(case)]
        calls += [(case, torch.float16, 1.0, inputs.FAR) for case in longer]
    expected = []
    for case, dtype, spread, layout in calls:
        tensors, options = inputs.draw(row, case, dtype=dtype, spread=spread, layout=layout)
        if "scale" in row.options:
            options.setdefault("scale", None)
        expected.append(verify.expect(row, tensors, options, case.sizes, dtype=dtype, statistical=spread <= 1.0, layout=layout))
    return tuple(expected)


def _bare(row: Mechanism, cases: Sequence[Case]) -> Iterator[Case]:
    """The first case without options, and the first with each optional tensor."""
    seen: set[str | None] = set()
    for case in cases:
        tensors = [name for name in case.options if name in row.inputs]
        kind = tensors[0] if tensors else None
        if kind not in seen and (tensors or not case.options):
            seen.add(kind)
            yield case


def _long_axes(case: Case) -> Iterator[Case]:
    """The case with many items, with many heads, and with few but many steps: far strides need an axis of three or more."""
    if "b" in case.sizes:
        yield replace(case, sizes={**case.sizes, "b": 3})
    if "l" in case.sizes:
        yield replace(case, sizes={**case.sizes, "b": 2, "d": 2})
    if {"b", "h", "g"} <= case.sizes.keys():
        yield replace(case, sizes={**case.sizes, "b": 1, "h": 6, "g": 3})
        yield replace(case, sizes={**case.sizes, "b": 1, "h": 2, "g": 1})


__all__ = ["Tooth", "check", "teeth"]
