"""The longest sequence that fits, and how memory grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from triton_attn.capacity.memory import Peak, peak_of
from triton_attn.capacity.training import Setup

LARGEST = 1 << 26  # tokens; beyond, positions and offsets are another matter
STEP = 1024
CLOSE = 0.98  # of the memory: what a driver and fragmentation take is known no better


def longest(
    setup: Setup, memory: float, *, measure: Callable[[Setup, int], Peak] = peak_of, tick: Callable[[Peak], None] = lambda peak: None
) -> Peak | None:
    """The longest multiple of 1024 tokens whose step fits into so many bytes, to two parts in a hundred; None if no length does."""

    def at(length: int) -> Peak:
        peak = measure(setup, length)
        tick(peak)
        return peak

    low = at(STEP)
    if low.bytes > memory:
        return None
    while low.length < LARGEST and (high := at(2 * low.length)).bytes <= memory:
        low = high
    if low.length >= LARGEST:
        return low
    # memory grows by steps along a line: aim a little below where the line between the two crosses
    while high.length - low.length > max(STEP, low.length // 50):
        share = (memory - low.bytes) / max(high.bytes - low.bytes, 1)
        aim = low.length + int(0.99 * share * (high.length - low.length))
        found = at(min(max(aim // STEP * STEP, low.length + STEP), high.length - STEP))
        if found.bytes <= memory:
            low = found
            if found.bytes > CLOSE * memory:
                break
        else:
            high = found
    return low


def growth(
    setup: Setup,
    lengths: Sequence[int],
    *,
    measure: Callable[[Setup, int], Peak] = peak_of,
    tick: Callable[[Peak], None] = lambda peak: None,
) -> Iterator[Peak]:
    """The peak at each length."""
    for length in lengths:
        peak = measure(setup, length)
        tick(peak)
        yield peak
