"""Strided attention: the softmax loop over one arithmetic progression of keys, and the diagonal if asked. Nothing is gathered."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triton_attn.kernels import _softmax_launch as softmax
from triton_attn.kernels import _softmax_tiles
from triton_attn.kernels._softmax_riders import Extras, key_of
from triton_attn.kernels._softmax_walks import Pattern, Walk, consecutive
from triton_attn.tiles import Key

# numbers: how far the diagonal is shifted (Nk where nothing is causal), stride, phase


@triton.jit
def keep(i: tl.constexpr, m, n, numbers, head):
    """Not in the future; in run 2 the query's own key, unless run 0 or 1 has it."""
    if i == 2:
        return (n == m) & (n % numbers[1] != numbers[2])
    else:
        return n <= m + numbers[0]


@triton.jit
def on_grid(last, len_n, numbers):
    """How many of the keys up to `last` lie on the grid."""
    return tl.maximum(tl.minimum(last, len_n - 1) - numbers[2] + numbers[1], 0) // numbers[1]


@triton.jit
def runs(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """Full tiles of the grid that every row sees, the rest of it, and the rows' own keys."""
    everyone = on_grid(first + numbers[0], len_n, numbers) // BLOCK * BLOCK
    if i == 0:
        return numbers[2], numbers[1], everyone
    elif i == 1:
        return numbers[2] + everyone * numbers[1], numbers[1], on_grid(last + numbers[0], len_n, numbers) - everyone
    else:
        return first, 1, tl.minimum(last + 1, len_n) - first


@triton.jit
def residues(tile, length, numbers, BLOCK: tl.constexpr):
    """A residue class modulo the stride: on the grid as a whole, or off it."""
    start = tile % numbers[1] + tile // numbers[1] * BLOCK * numbers[1]
    return start, numbers[1], tl.cdiv(length - start, numbers[1])


@triton.jit
def visits(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """Of keys on the grid: tiles of queries on the diagonal, then those that see every key. Of keys off it: the queries at their place."""
    gridded = first % numbers[1] == numbers[2]
    anyone = tl.minimum(tl.maximum(first - numbers[0], 0), len_m)
    everyone = tl.minimum(tl.maximum(last - numbers[0], anyone), len_m)
    everyone = tl.minimum(anyone + tl.cdiv(everyone - anyone, BLOCK) * BLOCK, len_m)
    if i == 0:
        return anyone, 1, tl.where(gridded, everyone - anyone, 0)
    elif i == 1:
        return everyone, 1, tl.where(gridded, len_m - everyone, 0)
    else:
        return first, numbers[1], tl.where(gridded, 0, (last - first) // numbers[1] + 1)


POINTERS = "strided_attention/pointers"
SPACES = _softmax_tiles.by_pointers(sys.modules[__name__])


def _classes(length: int, block: int, stride: int) -> int:
    return stride * triton.cdiv(triton.cdiv(length, stride), block)


def pattern(query: Tensor, key: Tensor, stride: int, phase: int, include_self: bool, causal: bool | str) -> Pattern:
    """The pattern of a call."""
    m, n = query.shape[2], key.shape[2]
    stride = min(stride, max(n, 1))  # of a longer one no key but the phase's is left either way
    shift = n if not causal else n - m if causal == "bottom_right" else 0
    numbers, more = (shift, stride, phase), (True,) * include_self
    return Pattern(
        (Walk(consecutive, runs, (False, True, *more), keep, numbers, fours=False),),
        Walk(residues, visits, (True, False, *more), keep, numbers, partial(_classes, stride=stride), fours=False),
        most=triton.cdiv(n, stride) + include_self,
    )


def strided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    stride: int,
    phase: int = 0,
    include_self: bool = False,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
    tile: softmax.Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward by pointers and asynchronous copies: sm_80 and up."""
    walk = pattern(query, key, stride, phase, include_self, causal)
    extras = Extras.of(query, None, key_padding_mask, scale, dropout_p, seed, causal)
    out, lse = softmax.forward(walk, SPACES, POINTERS, query, key, value, extras, tile)
    return (out, lse) if return_lse else out


def strided_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    stride: int,
    phase: int = 0,
    include_self: bool = False,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
    tile: softmax.Tiles = None,
) -> tuple[Tensor, ...]:
    """(dQ, dK, dV) from the saved out and lse; keys off the grid that no query sees get zeros."""
    walk = pattern(query, key, stride, phase, include_self, causal)
    extras = Extras.of(query, None, key_padding_mask, scale, dropout_p, seed, causal)
    return softmax.backward(walk, SPACES, POINTERS, (grad_out, grad_lse), query, key, value, out, lse, extras, needs, tile)


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on."""
    extras = Extras.of(
        tensors["query"], None, tensors["key_padding_mask"], options.get("scale"), options.get("dropout_p", 0.0), None, options["causal"]
    )
    return key_of(tensors["query"], tensors["value"], extras)
