"""Checks, compilations and timings with the time shared out: every mechanism gets its part of it, whatever the others took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TypeVar

import torch

from triton_attn import device
from triton_attn.bench import Timing, bench
from triton_attn.mechanism import Mechanism
from triton_attn.offline import Compiled, compile_rows, representative
from triton_attn.verify import Verdict, verify

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@dataclass
class Log:
    """What is under way, what there was no time for, and what failed with no row to say so."""

    tick: Callable[[str], None] = lambda text: None
    under_way: str = ""
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __call__(self, text: str) -> None:
        self.under_way = text
        self.tick(text)


def verdicts(rows: Sequence[Mechanism], where: torch.device, seconds: float, log: Log) -> Iterator[Verdict]:
    """`verify`; an implementation that raises is a verdict too."""

    def run(row: Mechanism, share: float) -> Iterator[Verdict]:
        log.under_way = row.name
        try:
            _load(row)
            yield from verify([row], where, seconds=share, tick=log)
        except Exception as error:  # noqa: BLE001  a kernel may fail in any way, and the other mechanisms are still to be checked
            yield Verdict(row.name, "stopped", log.under_way, "", where.type, math.inf, "", 0.0, complaint(error))

    return _shared([(row.name, row) for row in rows], seconds, run, log)


def compiled(
    rows: Sequence[Mechanism],
    targets: Sequence[str],
    seconds: float,
    log: Log,
    *,
    every_key: bool = False,
    every_tile: bool = False,
    jobs: int = 1,
) -> Iterator[Compiled]:
    """`compile_rows`."""

    def run(pair: tuple[Mechanism, str], share: float) -> Iterator[Compiled]:
        _load(pair[0])
        return compile_rows([pair[0]], [pair[1]], tables=every_key, every=every_tile, seconds=share, jobs=jobs, tick=log)

    return _shared([(f"{row.name} for {target}", (row, target)) for row, target in product(rows, targets)], seconds, run, log)


def launches(rows: Sequence[Mechanism], targets: Sequence[str], *, every_key: bool) -> int:
    """How many compilations there are with one tile each."""
    capabilities = [device.capability(target) for target in targets]
    built = [kernel for row, known in product(rows, capabilities) for kernel in row.kernels if known in kernel.capabilities]
    spaces = [kernel.load().spaces[launch.name] for kernel in built for launch in kernel.launches]
    return sum(len(tuple(space.entries() if every_key else representative(space))) for space in spaces)


def timings(
    rows: Sequence[Mechanism], where: torch.device, seconds: float, log: Log, *, lengths: Sequence[int] | None = None
) -> Iterator[Timing]:
    """`bench`; what cannot be timed is logged."""

    def run(row: Mechanism, share: float) -> Iterator[Timing]:
        log.under_way = row.name
        try:
            yield from bench([row], where, lengths=lengths, seconds=share, tick=log)
        except Exception as error:  # noqa: BLE001  ours or a peer's; the other mechanisms are still to be timed
            log.failed.append(f"{log.under_way}: {complaint(error)}")

    return _shared([(row.name, row) for row in rows], seconds, run, log)


def complaint(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _load(row: Mechanism) -> None:
    """Import its kernels, so that this counts for nobody's time."""
    if device.triton_version():
        for kernel in row.kernels:
            kernel.load()


def _shared(
    pieces: Sequence[tuple[str, Piece]], seconds: float, run: Callable[[Piece, float], Iterator[Result]], log: Log
) -> Iterator[Result]:
    end = time.perf_counter() + seconds
    for place, (name, piece) in enumerate(pieces):
        start = time.perf_counter()
        share = max(0.0, end - start) / (len(pieces) - place)
        yield from run(piece, share)
        spent = time.perf_counter() - start
        if spent > share:
            log.left_out.append(f"{name} had {share:.1f} s: what did not fit was left out")
