"""Do the tests have teeth? Seeded faults in a row's kernels against the row's own cases."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from triton_attn import device, verify
from triton_attn.catalog import CATALOG
from triton_attn.mechanism import Case, Kernel, Mechanism
from triton_attn.testing import inputs, interpreter, numerics, seeded, strict_interpreter
from triton_attn.testing.equivalents import equivalent
from triton_attn.testing.outcomes import Outcomes
from triton_attn.testing.unwritten import poisoned_memory
from triton_attn.tiles import Tile, source_hash

TILE = Tile(16, 16, 4, 1)
MIXED = "mixed"  # the numbers of every other tensor lie apart


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
    rows: Sequence[Mechanism],
    *,
    some: int | None = None,
    seed: int = 0,
    tick: Callable[[str], None] = lambda text: None,
    evidence: Path | None = None,
    anew: bool = False,
    budget: float = math.inf,
    left: dict[str, str] | None = None,
) -> Iterator[Tooth]:
    """Every fault, or `some` picked by `seed`, in what each kernel of each row runs.

    `evidence` keeps each as soon as its end is known, and those in it are not planted again, unless `anew`; nor those that another row's
    calls have caught in a function that both run. After `budget` seconds none is begun; `left` then gets, by kernel, what is.
    """
    until = time.perf_counter() + budget
    for row, kernel in _kernels(rows):
        name = f"{row.name}/{kernel.name}"
        if time.perf_counter() > until:
            if left is not None:
                left[name] = "not begun"
            continue

        def say(fault: seeded.Fault, done: int, total: int, shown: str = name.replace("/", " ")) -> None:
            tick(f"{shown} {done}/{total} {fault.kind} in {fault.function.rpartition('.')[2]}")

        tick(f"{name.replace('/', ' ')} as it is")
        others = {} if evidence is None else {_about(*one): _names(*one) for one in _kernels(CATALOG.values()) if one != (row, kernel)}
        book = Outcomes(evidence, about=_about(row, kernel), calls=_names(row, kernel), others=others, until=until, anew=anew)
        for bite in seeded.bite(checks(row, kernel), equivalent=equivalent(row.name), some=some, seed=seed, tick=say, outcomes=book):
            fault = bite.fault
            change = f"{fault.before} -> {fault.after}"
            yield Tooth(row.name, kernel.name, fault.function, fault.line, fault.kind, change, bite.caught, bite.equivalent, bite.seconds)
        if book.left and left is not None:
            left[name] = f"{book.left} faults are left"


def _kernels(rows: Iterable[Mechanism]) -> list[tuple[Mechanism, Kernel]]:
    return [(row, kernel) for row in rows for kernel in row.kernels]


def _about(row: Mechanism, kernel: Kernel) -> str:
    """The kernel and its launches, beside the functions that it runs, and what interprets them."""
    launched = dict.fromkeys(module for launch in kernel.launches for module in kernel.load().spaces[launch.name].modules)
    return f"{row.name}/{kernel.name} {source_hash([*launched])} triton {device.triton_version()}"


def _names(row: Mechanism, kernel: Kernel) -> list[str]:
    """Of each check: a hash of the call, and of what judges it."""
    with strict_interpreter():  # its modules are there from now on
        pass
    judging = [inputs, numerics, verify, *(sys.modules[function.__module__] for function in (row.reference, row.bound))]
    strict = [module for name, module in sorted(sys.modules.items()) if name.startswith(f"{interpreter.__name__}.")]
    judged = source_hash([*judging, *strict])
    return [hashlib.sha256(f"{judged} {call}".encode()).hexdigest()[:8] for call in _asked(row, kernel)]


def checks(row: Mechanism, kernel: Kernel) -> list[Callable[[], None]]:
    """The row's calls under the strict interpreter, forward and backward: AssertionError where one is wrong."""
    code = kernel.load()
    return [partial(_check, expected, verify.kernel_run(row, code, tile)) for expected, tile in _calls(row.name, kernel.name)]


def _check(expected: verify.Expected, run: verify.Run) -> None:
    with strict_interpreter(), poisoned_memory():
        comparisons = expected.judge(run)
    numerics.assert_right(comparisons, (expected.options, expected.dtype))


@functools.cache
def _calls(mechanism: str, variant: str) -> tuple[tuple[verify.Expected, Tile], ...]:
    """Truth and bound are computed once."""
    row = CATALOG[mechanism]
    kernel = next(kernel for kernel in row.kernels if kernel.name == variant)
    expected = []
    for case, dtype, spread, layout, tile in _asked(row, kernel):
        mixed, layout = layout == MIXED, inputs.CONTIGUOUS if layout == MIXED else layout
        tensors, options = inputs.draw(row, case, dtype=dtype, spread=spread, layout=layout)
        if mixed:
            given = [(name, x) for name, how in row.inputs.items() if how.kind == "values" and (x := tensors[name]) is not None]
            tensors |= {name: inputs.laid_out(x, inputs.STRIDED) for name, x in given[::2]}
        if "scale" in row.options:
            options.setdefault("scale", None)
        judged = verify.expect(row, tensors, options, case.sizes, dtype=dtype, statistical=spread <= 1.0, layout=layout)
        expected.append((judged, tile))
    return tuple(expected)


def _asked(row: Mechanism, kernel: Kernel) -> list[tuple[Case, torch.dtype, float, str, Tile]]:
    """Every call: case, dtype, spread, layout, tile."""
    served = [case for case in row.cases if not verify.refused(row, kernel.name, case, torch.float16)]
    ordered = sorted(served, key=lambda case: sum(case.sizes.values()))
    by_layout = kernel is row.kernels[-1]  # others serve contiguous rows only
    ways = [(torch.float16, 1.0, inputs.STRIDED), (torch.float32, 8.0, inputs.PERMUTED)]
    if not by_layout:
        ways = [(torch.float16, 1.0, inputs.CONTIGUOUS)]
    single = [_sized(row, case, **ONE) for case in ordered]  # quick: what they show need not be sought in many heads
    calls = [(case, *way, TILE) for case, way in zip((*single, *ordered), itertools.cycle(ways), strict=False)]
    special = _any_layout(row, kernel, ordered) if by_layout else _contiguous(row, ordered)
    calls += [(case, torch.float16, 1.0, layout, tile) for case, layout, tile in special]
    return calls + [(case, dtype, spread, inputs.CONTIGUOUS, TILE) for case, dtype, spread in _any_numbers(row, ordered)]


Special = Iterator[tuple[Case, str, Tile]]
ONE = {"b": 1, "h": 1, "g": 1}


def _any_layout(row: Mechanism, kernel: Kernel, cases: Sequence[Case]) -> Special:
    """What no ordinary case has: widths below their block, several tiles under dropout, many rows, shared keys, far strides."""
    bare, *laden = _bare(row, cases)
    if {"d", "e"} <= bare.sizes.keys():
        yield _sized(row, bare, **ONE, d=12, e=10), inputs.SLICED, TILE
        yield _sized(row, bare, **ONE, m=65, n=3), inputs.CONTIGUOUS, TILE
        if "dropout_p" in row.options:
            yield _sized(row, _with(bare, dropout_p=0.2), **ONE, m=20, n=40), inputs.CONTIGUOUS, TILE
        if row.options.get("causal") == "bool":
            yield _sized(row, _with(bare, causal=True), **ONE, d=12, e=10), inputs.SLICED, TILE
        if row.options.get("causal") == "str":
            yield _sized(row, _with(bare, causal="top_left"), **ONE, m=35, n=18), inputs.CONTIGUOUS, TILE
            for m, n in ((3, 60), (3, 140), (60, 40)):  # a key tile long before the diagonal, and rows that see nothing
                yield _sized(row, _with(bare, causal="bottom_right"), **ONE, m=m, n=n), inputs.CONTIGUOUS, TILE
    if any(launch.shared for launch in kernel.launches):
        yield _sized(row, bare, b=1, h=2, g=1, m=17, n=70, e=10), inputs.CONTIGUOUS, replace(TILE, splits=3)
        # more shares than a merge reads at once: all of them full, and some empty
        yield _sized(row, _with(bare, scale=1.0), b=1, h=2, g=1, m=16, n=150, e=10), inputs.CONTIGUOUS, replace(TILE, splits=9)
        for case in laden:
            yield _sized(row, case, b=1, h=2, g=2, m=3, n=40), inputs.CONTIGUOUS, replace(TILE, splits=9)
    for axis, layout in enumerate(inputs.FAR_ALONG):
        for case in (bare, *laden):
            yield _sized(row, case, **_heads(row, axis), m=5, n=5), layout, TILE
    for case in (bare, *laden):
        yield _sized(row, case, **ONE, m=5, n=5), MIXED, TILE


def _any_numbers(row: Mechanism, cases: Sequence[Case]) -> Iterator[tuple[Case, torch.dtype, float]]:
    """Of rows: squares beyond float16, products below it, zeros, epsilons that show. States: bfloat16. Scans: many steps, tiny ones."""
    bare, *laden = _bare(row, cases)
    if "x" in row.inputs:
        for spread in (64.0, 2.0**-20, 0.0):
            yield bare, torch.float16, spread
    if "eps" in row.options:
        for case in laden or (bare,):
            yield _with(case, eps=0.0), torch.float16, 1.0
            yield _with(case, eps=0.25), torch.float16, 1.0
    if "normalizer" in row.outputs:  # operands of products are narrow in bfloat16 alone
        for case in (bare, next(case for case in cases if case.options.get("causal") and case.options.get("normalize", True))):
            yield _sized(row, case, **ONE), torch.bfloat16, 1.0
    if "kernel_epsilon" in row.options:  # levels of long vectors leave one key for each query, and float16 is judged mildly
        for case in cases:
            yield _sized(row, case, **ONE), torch.float32, 1.0
    if "delta_softplus" in row.options:
        yield _sized(row, bare, l=150), torch.float32, 1.0
        yield _with(bare, delta_softplus=True, delta_bias="normal"), torch.float32, 8.0


def _contiguous(row: Mechanism, cases: Sequence[Case]) -> Special:
    """Far strides of rows that are contiguous, several tiles along them, and one loop for specialised warps."""
    bare, *_ = _bare(row, cases)
    yield _sized(row, bare, **ONE, m=20, n=35), inputs.CONTIGUOUS, replace(TILE, warp_specialize=True)
    for axis, layout in enumerate(inputs.FAR_ALONG[:3]):
        yield _sized(row, bare, **_heads(row, axis), m=33, n=33), layout, TILE


def _heads(row: Mechanism, axis: int) -> dict[str, int]:
    """Few items and heads, but enough of those along this axis of some tensor to be far apart."""
    named = [axes.split() for axes in (*(x.axes for x in row.inputs.values()), *(x.axes for x in row.outputs.values()))]
    along = {names[axis] for names in named if len(names) > axis}
    channels = {"d": 3} if any("l" in names for names in named) else {}  # groups share them evenly
    return {**{name: 3 if name in along else 1 for name in ONE}, **channels}


def _bare(row: Mechanism, cases: Sequence[Case]) -> list[Case]:
    """A case with as little as possible, and the first with each optional tensor."""
    tensors = {case.name: {name for name in case.options if name in row.inputs} for case in cases}
    found = [min(cases, key=lambda case: (len(tensors[case.name]), "dropout_p" in case.options, len(case.options)))]
    for name in sorted(set().union(*tensors.values()) - tensors[found[0].name]):
        found.append(next(case for case in cases if name in tensors[case.name]))
    return list({case.name: case for case in found}.values())


def _with(case: Case, **options: Any) -> Case:
    return replace(case, options={**case.options, **options})


def _sized(row: Mechanism, case: Case, **sizes: int) -> Case:
    return replace(case, sizes=row.fitted({**case.sizes, **{k: v for k, v in sizes.items() if k in case.sizes}}, case.options))


__all__ = ["Tooth", "checks", "teeth"]
