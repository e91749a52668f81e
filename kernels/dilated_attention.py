"""Dilated attention: the softmax loop over the runs of every branch, one after the other. Nothing is stored for a branch.

A tile of queries is one residue class modulo the least common multiple of the rates, inside of one cell, which no segment boundary
cuts: all its rows are in the same branches. Mixing branches by their log-sum-exps is one softmax over the union of their runs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_attn.kernels import _softmax_launch as softmax
from triton_attn.kernels import _softmax_tiles
from triton_attn.kernels._softmax_riders import Extras, key_of
from triton_attn.kernels._softmax_walks import Pattern, Walk
from triton_attn.tiles import Key

# numbers: how far the diagonal is shifted (N where nothing is causal), length of a cell, least common multiple of the rates, heads,
# which offset rule, then of each branch: segment length, rate
BLOCK_RULE, MOD_RULE, GROUPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BRANCHES = tl.constexpr(5)


@triton.jit
def offset_of(branch: tl.constexpr, numbers, head):
    """Which phase of a branch a head selects; -1 if the branch is not the head's."""
    rate = numbers[BRANCHES + 2 * branch + 1]
    number: tl.constexpr = (len(numbers) - BRANCHES) // 2
    heads = numbers[3]
    larger = heads % number
    first = branch * (heads // number) + tl.minimum(larger, branch)
    last = first + heads // number + tl.minimum(tl.maximum(larger - branch, 0), 1)
    grouped = tl.where((head >= first) & (head < last), branch % rate, -1)
    spread = tl.where(numbers[4] == BLOCK_RULE, head // tl.cdiv(heads, rate), head % rate)
    return tl.where(numbers[4] == GROUPED, grouped, spread)


@triton.jit
def cells(tile, length, numbers, BLOCK: tl.constexpr):
    """A residue class of a cell."""
    cell, step = numbers[1], numbers[2]
    each = tl.cdiv(tl.cdiv(cell, step), BLOCK)
    start = tile // (each * step) * cell
    end = tl.minimum(start + cell, length)
    start += tile % step + tile % (each * step) // step * BLOCK * step
    return start, step, tl.cdiv(end - start, step)


@triton.jit
def runs(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """Of branch i // 2: full tiles of keys that every row sees, and the rest."""
    length, rate = numbers[BRANCHES + i // 2 * 2], numbers[BRANCHES + i // 2 * 2 + 1]
    offset = offset_of(i // 2, numbers, head)
    segment = first // length * length
    low = segment + offset
    end = tl.minimum(segment + length, len_n)
    selected = (offset >= 0) & ((first - segment) % rate == offset)
    anyone = tl.where(selected, tl.cdiv(tl.maximum(tl.minimum(last + numbers[0] + 1, end) - low, 0), rate), 0)
    everyone = tl.where(selected, tl.cdiv(tl.maximum(tl.minimum(first + numbers[0] + 1, end) - low, 0), rate), 0) // BLOCK * BLOCK
    if i % 2 == 0:
        return low, rate, everyone
    else:
        return low + everyone * rate, rate, anyone - everyone


@triton.jit
def keep(i: tl.constexpr, m, n, numbers, head):
    return n <= m + numbers[0]


@triton.jit
def together(branch: tl.constexpr, m, n, numbers, head):
    """Whether query and key meet in a branch."""
    length, rate = numbers[BRANCHES + 2 * branch], numbers[BRANCHES + 2 * branch + 1]
    offset = offset_of(branch, numbers, head)
    return (m // length == n // length) & (m % length % rate == offset) & (n % length % rate == offset)


@triton.jit
def keep_first(i: tl.constexpr, m, n, numbers, head):
    """Where a key counts once, the first branch that has it counts it."""
    kept = n <= m + numbers[0]
    for branch in tl.static_range(i // 2):
        kept = kept & ~together(branch, m, n, numbers, head)
    return kept


@triton.jit
def visits(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """Of branch i // 2: the queries of the keys' phase, first those on the diagonal, then those that see every key."""
    length, rate = numbers[BRANCHES + i // 2 * 2], numbers[BRANCHES + i // 2 * 2 + 1]
    segment = first // length * length
    phase = (first - segment) % rate
    total = tl.cdiv(tl.maximum(tl.minimum(segment + length, len_m) - segment - phase, 0), rate)
    # queries before first - shift see none of the keys, those from last - shift on see all
    before = tl.maximum(tl.minimum((first - numbers[0] - segment - phase) // rate, total), 0)
    diagonal = tl.minimum(tl.cdiv(tl.maximum(last - numbers[0] - segment - phase - before * rate, 0), rate), total - before)
    diagonal = tl.minimum(tl.cdiv(diagonal, BLOCK) * BLOCK, total - before)
    if i % 2 == 0:
        return segment + phase + before * rate, rate, diagonal
    else:
        return segment + phase + (before + diagonal) * rate, rate, total - before - diagonal


@triton.jit
def visits_of_one(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """The same where one query head has the keys to itself: none if it does not select them."""
    start, step, count = visits(i, first, last, len_m, len_n, numbers, head, BLOCK)
    selected = first % numbers[BRANCHES + i // 2 * 2] % step == offset_of(i // 2, numbers, head)
    return start, step, tl.where(selected, count, 0)


@triton.jit
def keep_selected(i: tl.constexpr, m, n, numbers, head):
    """Of query heads that share keys each selects its own."""
    length, rate = numbers[BRANCHES + i // 2 * 2], numbers[BRANCHES + i // 2 * 2 + 1]
    return (n <= m + numbers[0]) & (n % length % rate == offset_of(i // 2, numbers, head))


@triton.jit
def keep_first_selected(i: tl.constexpr, m, n, numbers, head):
    return keep_first(i, m, n, numbers, head) & keep_selected(i, m, n, numbers, head)


POINTERS = "dilated_attention/pointers"
SPACES = _softmax_tiles.by_pointers(sys.modules[__name__])


def _classes(length: int, block: int, cell: int, step: int) -> int:
    return triton.cdiv(length, cell) * step * triton.cdiv(triton.cdiv(cell, step), block)


def pattern(
    query: Tensor,
    key: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    mode: str,
    offset_rule: str,
    overlap: str,
    causal: bool | str,
) -> Pattern:
    """The pattern of a call. Cells are as long as the greatest common divisor of the segments that end inside of the sequence."""
    h, n = query.shape[1:3]
    lengths = [min(length, max(n, 1)) for length in segment_lengths]
    cell = math.gcd(*(length for length in lengths if length < n)) or max(n, 1)
    step = math.lcm(*dilation_rates)
    rule = GROUPED if mode == "head_group" else BLOCK_RULE if offset_rule == "block" else MOD_RULE
    branches = [number for branch in zip(lengths, dilation_rates, strict=True) for number in branch]
    numbers = (0 if causal else n, cell, step, h, rule.value, *branches)
    alone, once = key.shape[1] == h, overlap == "unique"
    asked = once or not alone
    tiles = partial(_classes, cell=cell, step=step)
    rows = Walk(cells, runs, (once, True) * len(lengths), keep_first if once else keep, numbers, tiles, fours=False)
    kept = (keep_first if once else keep) if alone else keep_first_selected if once else keep_selected
    visited = visits_of_one if alone else visits
    return Pattern((rows,), Walk(cells, visited, (True, asked) * len(lengths), kept, numbers, tiles, fours=False))


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    mode: str = "longnet",
    offset_rule: str = "block",
    overlap: str = "count",
    detach_mixing: bool = False,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
    tile: softmax.Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward by pointers and asynchronous copies: sm_80 and up."""
    walk = pattern(query, key, segment_lengths, dilation_rates, mode, offset_rule, overlap, causal)
    extras = Extras.of(query, None, key_padding_mask, scale, dropout_p, seed, causal)
    out, lse = softmax.forward(walk, SPACES, POINTERS, query, key, value, extras, tile)
    return (out, lse) if return_lse else out


def dilated_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    mode: str = "longnet",
    offset_rule: str = "block",
    overlap: str = "count",
    detach_mixing: bool = False,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
    tile: softmax.Tiles = None,
) -> tuple[Tensor, ...]:
    """(dQ, dK, dV) from the saved out and lse, exact through the mixing of branches.

    `detach_mixing`: dS = P (dP - delta) in each branch, with P of the joint lse, and delta of the branch's own output, which is
    computed again. So nothing is kept for a branch, and memory is taken for one branch at a time.
    """
    extras = Extras.of(query, None, key_padding_mask, scale, dropout_p, seed, causal)

    def share(lengths: Sequence[int], rates: Sequence[int], out: Tensor | None = None) -> tuple[Tensor, ...]:
        walk = pattern(query, key, lengths, rates, mode, offset_rule, overlap, causal)
        if out is None:
            out = softmax.forward(walk, SPACES, POINTERS, query, key, value, extras, tile)[0]
        return softmax.backward(walk, SPACES, POINTERS, (grad_out, grad_lse), query, key, value, out, lse, extras, needs, tile)

    if not detach_mixing or mode == "head_group":  # where a head has one branch
        return share(segment_lengths, dilation_rates, out)
    gradients = share(segment_lengths[:1], dilation_rates[:1])
    for i in range(1, len(segment_lengths)):
        torch._foreach_add_(gradients, share(segment_lengths[i : i + 1], dilation_rates[i : i + 1]))
    return gradients


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on."""
    extras = Extras.of(
        tensors["query"], None, tensors["key_padding_mask"], options.get("scale"), options.get("dropout_p", 0.0), None, options["causal"]
    )
    return key_of(tensors["query"], tensors["value"], extras)
