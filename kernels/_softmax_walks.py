"""Patterns of the softmax loop: who owns and visits what, and the walks that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Walk:
    """Who owns and visits what; see `_softmax`. `tiles(length, block)` counts the programs of a head."""

    owns: Any
    runs: Any
    edges: tuple[bool, ...]
    keep: Any = None
    numbers: tuple[int, ...] = (0,)
    tiles: Callable[[int, int], int] = triton.cdiv
    fours: bool = True  # keys are consecutive, and every run of them starts at a multiple of four


@dataclass(frozen=True)
class Elsewhere:
    """Keys from elsewhere, which walks over queries visit first: row j stands for key `positions[..., j]`.

    `walk` owns them and visits queries; positions (B, Hk, K) int32, `_softmax.NOWHERE` where a row is hidden. `copied`: they are
    copies of the call's own keys, and so are their gradients the keys'.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    walk: Walk
    copied: bool = False


@dataclass(frozen=True)
class Pattern:
    """The walks over queries own each of them once; `keys` owns every key and visits queries, or is None where no query sees them.

    `most`: how many keys a query sees at most, where that is not all of them.
    """

    queries: tuple[Walk, ...]
    keys: Walk | None
    elsewhere: Elsewhere | None = None
    most: int | None = None


@triton.jit
def consecutive(tile, length, numbers, BLOCK: tl.constexpr):
    """Rows tile * BLOCK, tile * BLOCK + 1, ..."""
    return tile * BLOCK, 1, length - tile * BLOCK


@triton.jit
def full_runs(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """Full tiles of keys, then the ragged rest."""
    whole = len_n // BLOCK * BLOCK
    if i == 0:
        return 0, 1, whole
    else:
        return whole, 1, len_n - whole


@triton.jit
def one_run(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """All keys as one run: the form that warp specialisation accepts."""
    return 0, 1, len_n


@triton.jit
def all_visits(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """All queries as one run."""
    return 0, 1, len_m


@triton.jit
def causal_keep(i: tl.constexpr, m, n, numbers, head):
    """numbers[0] = how far the diagonal is shifted: 0 from the top left, Nk - Nq from the bottom right."""
    return n <= m + numbers[0]


@triton.jit
def causal_runs(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """Full tiles that every row sees, then the tiles on the diagonal."""
    everyone = tl.minimum(tl.maximum(first + numbers[0] + 1, 0), len_n) // BLOCK * BLOCK
    anyone = tl.minimum(tl.maximum(last + numbers[0] + 1, 0), len_n)
    if i == 0:
        return 0, 1, everyone
    else:
        return everyone, 1, anyone - everyone


@triton.jit
def causal_visits(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """Tiles of queries on the diagonal, then those that see every key."""
    anyone = tl.minimum(tl.maximum(first - numbers[0], 0), len_m)
    everyone = tl.minimum(tl.maximum(last - numbers[0], anyone), len_m)
    everyone = tl.minimum(anyone + tl.cdiv(everyone - anyone, BLOCK) * BLOCK, len_m)
    if i == 0:
        return anyone, 1, everyone - anyone
    else:
        return everyone, 1, len_m - everyone


FULL = Pattern((Walk(consecutive, full_runs, (False, True)),), Walk(consecutive, all_visits, (False,)))


def causal_from(shift: int) -> Pattern:
    """Query i sees keys 0..i + shift."""
    return Pattern(
        (Walk(consecutive, causal_runs, (False, True), causal_keep, (shift,)),),
        Walk(consecutive, causal_visits, (True, False), causal_keep, (shift,)),
    )
