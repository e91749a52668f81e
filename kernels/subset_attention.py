"""Attention to a subset of the keys: the softmax loop over their copies, O(K) of them, and over each query's own key."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_attn.kernels import _softmax_launch as softmax
from triton_attn.kernels import _softmax_tiles
from triton_attn.kernels._softmax import NOWHERE
from triton_attn.kernels._softmax_riders import Extras, key_of
from triton_attn.kernels._softmax_walks import Elsewhere, Pattern, Walk, causal_keep, causal_visits, consecutive
from triton_attn.tiles import Key

# numbers: how far the diagonal is shifted (Nk where nothing is causal), number of indices


@triton.jit
def keep(i: tl.constexpr, m, n, numbers, head):
    """Of the subset what is not in the future; in run 1 the query's own key."""
    if i == 0:
        return n <= m + numbers[0]
    else:
        return n == m


@triton.jit
def runs(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """The subset, and the rows' own keys."""
    if i == 0:
        return 0, 1, numbers[1]
    else:
        own = first // 4 * 4  # as dropout's counters
        return own, 1, tl.minimum(last + 1, len_n) - own


@triton.jit
def own_keep(i: tl.constexpr, m, n, numbers, head):
    return n == m


@triton.jit
def own_visits(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """The queries at the keys' places."""
    return first, 1, last + 1 - first


POINTERS = "subset_attention/pointers"
SPACES = _softmax_tiles.by_pointers(sys.modules[__name__])


def pattern(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, include_self: bool, padding: Tensor | None, causal: bool | str
) -> tuple[Pattern, Tensor | None]:
    """The pattern of a call, and the keys that its walks pass over (B, Hk, N): padded ones, and those that the subset has."""
    m, n = query.shape[2], key.shape[2]
    shift = n if not causal else n - m if causal == "bottom_right" else 0
    positions, taken = ordered(indices, n, padding)
    places = positions.where(positions != NOWHERE.value, 0).long()[..., None]
    keys, values = (x.gather(2, places.expand(*places.shape[:3], x.shape[3])) for x in (key, value))
    subset = Elsewhere(keys, values, positions, Walk(consecutive, causal_visits, (True, False), causal_keep, (shift,), fours=False), True)
    numbers = (shift, positions.shape[2])
    if not include_self:
        return Pattern((Walk(consecutive, runs, (True,), keep, numbers),), None, subset, positions.shape[2]), None
    walk = Walk(consecutive, runs, (True, True), keep, numbers)
    return Pattern((walk,), Walk(consecutive, own_visits, (True,), own_keep), subset, positions.shape[2] + 1), taken


def ordered(indices: Tensor, n: int, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions (B, Hk, K) int32, each once and in order, NOWHERE at the end; and the keys that are among them or padded."""
    b, g = indices.shape[:2]
    chosen = indices.where((indices >= 0) & (indices < n), n).long().sort(-1).values
    again = torch.zeros_like(chosen, dtype=torch.bool)
    again[..., 1:] = chosen[..., 1:] == chosen[..., :-1]
    hidden = again | (chosen == n)
    taken = torch.zeros(b, g, n + 1, dtype=torch.bool, device=indices.device).scatter_(2, chosen, True)[..., :n]
    if padding is not None:
        hidden |= padding[:, None].expand(b, g, n).gather(2, chosen.clamp(max=max(n - 1, 0))) if n else True
        taken = taken | padding[:, None]
    return chosen.masked_fill(hidden, NOWHERE.value).sort(-1).values.int(), taken


def subset_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    indices: Tensor,
    include_self: bool = True,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
    tile: softmax.Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward by pointers and asynchronous copies: sm_80 and up."""
    walk, passed = pattern(query, key, value, indices, include_self, key_padding_mask, causal)
    extras = Extras.of(query, None, passed, scale, dropout_p, seed, causal)
    out, lse = softmax.forward(walk, SPACES, POINTERS, query, key, value, extras, tile)
    return (out, lse) if return_lse else out


def subset_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    indices: Tensor,
    include_self: bool = True,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
    tile: softmax.Tiles = None,
) -> tuple[Tensor, ...]:
    """(dQ, dK, dV) from the saved out and lse; keys that no query sees get zeros."""
    walk, passed = pattern(query, key, value, indices, include_self, key_padding_mask, causal)
    extras = Extras.of(query, None, passed, scale, dropout_p, seed, causal)
    return softmax.backward(walk, SPACES, POINTERS, (grad_out, grad_lse), query, key, value, out, lse, extras, needs, tile)


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on: with each query's own key there is always padding to look at."""
    riding = tensors["key_padding_mask"] if not options.get("include_self", True) else tensors["indices"]
    extras = Extras.of(tensors["query"], None, riding, options.get("scale"), options.get("dropout_p", 0.0), None, options["causal"])
    return key_of(tensors["query"], tensors["value"], extras)
