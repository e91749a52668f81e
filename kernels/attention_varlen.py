"""Attention within packed sequences: the softmax loop over an interval of keys for each query.

Sequences, causality and windows all come down to two numbers for each query, where its keys begin and where they end, and neither falls
from one query to the next. So tiles may straddle sequences, and nothing about them has to be known on the host.
"""

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
from triton_attn.kernels._softmax_riders import Extras, key_of
from triton_attn.kernels._softmax_walks import Pattern, Walk, consecutive
from triton_attn.tiles import Key

# numbers: of queries where their keys begin and end, the same of keys and queries, how many queries there are


@triton.jit
def keep(i: tl.constexpr, m, n, numbers, head):
    """Keys from a query's first one up to its end."""
    inside = m < numbers[4]
    begin = tl.load(numbers[0] + m, mask=inside, other=0)
    end = tl.load(numbers[1] + m, mask=inside, other=0)
    return (n >= begin) & (n < end)


@triton.jit
def spans(i: tl.constexpr, first, last, begins, ends, BLOCK: tl.constexpr):
    """What some of these rows see, then whole tiles of what they all see, then the rest."""
    begin, everyone = tl.load(begins + first), tl.load(begins + last)
    until, end = tl.load(ends + first), tl.load(ends + last)
    whole = tl.maximum(until - everyone, 0) // BLOCK * BLOCK
    if i == 0:
        return begin, 1, tl.minimum(everyone, end) - begin
    elif i == 1:
        return everyone, 1, whole
    else:
        return everyone + whole, 1, end - everyone - whole


@triton.jit
def runs(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """Of keys."""
    return spans(i, first, last, numbers[0], numbers[1], BLOCK)


@triton.jit
def visits(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """Of queries."""
    return spans(i, first, last, numbers[2], numbers[3], BLOCK)


POINTERS = "attention_varlen/pointers"
SPACES = _softmax_tiles.by_pointers(sys.modules[__name__])


def pattern(query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, window_size: Sequence[int]) -> Pattern:
    """The pattern of a call; made on the device, without waiting for it."""
    m, n = query.shape[0], key.shape[0]
    left, right = window_size
    right = 0 if causal else right
    positions = torch.arange(m, dtype=torch.int32, device=query.device)
    queries, keys = (offsets.to(torch.int32) for offsets in (cu_seqlens_q, cu_seqlens_k))
    # rows past the last sequence are of one more, which has no keys
    queries, keys = (torch.cat((offsets, offsets[-1:])) for offsets in (queries, keys))
    sequence = torch.searchsorted(queries, positions, right=True, out_int32=True).clamp_(1, queries.shape[0] - 1) - 1
    first, count = keys[sequence], keys[sequence + 1] - keys[sequence]
    place = positions - queries[sequence] + count - (queries[sequence + 1] - queries[sequence])
    end = first + (count if right < 0 else (place + right + 1).clamp(min=0).minimum(count))
    begin = first if left < 0 else torch.minimum(first + (place - left).clamp(min=0), end)
    columns = torch.arange(n, dtype=torch.int32, device=query.device)
    earliest = torch.searchsorted(end, columns, right=True, out_int32=True)
    latest = torch.searchsorted(begin, columns, right=True, out_int32=True)
    numbers: Any = (begin, end, earliest, latest, m)
    edges = (True, False, True)
    return Pattern(
        (Walk(consecutive, runs, edges, keep, numbers, fours=False),), Walk(consecutive, visits, edges, keep, numbers, fours=False)
    )


def _one(tensor: Tensor) -> Tensor:
    """(length, heads, width) as a batch of one, heads first: a view."""
    return tensor.transpose(0, 1)[None]


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
    tile: softmax.Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward by pointers and asynchronous copies: sm_80 and up."""
    walk = pattern(query, key, cu_seqlens_q, cu_seqlens_k, causal, window_size)
    extras = Extras.of(query, None, None, scale, dropout_p, seed, causal)
    out, lse = softmax.forward(walk, SPACES, POINTERS, _one(query), _one(key), _one(value), extras, tile, packed=True)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def attention_varlen_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
    tile: softmax.Tiles = None,
) -> tuple[Tensor, ...]:
    """(dQ, dK, dV) from the saved out and lse."""
    walk = pattern(query, key, cu_seqlens_q, cu_seqlens_k, causal, window_size)
    extras = Extras.of(query, None, None, scale, dropout_p, seed, causal)
    grads = (None if grad_out is None else _one(grad_out), None if grad_lse is None else grad_lse[None])
    saved = (_one(out), lse[None])
    gradients = softmax.backward(
        walk, SPACES, POINTERS, grads, _one(query), _one(key), _one(value), *saved, extras, needs, tile, packed=True
    )
    return tuple(gradient[0].transpose(0, 1) if need else gradient for gradient, need in zip(gradients, needs, strict=True))


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on."""
    query, value = _one(tensors["query"]), _one(tensors["value"])
    extras = Extras.of(query, None, None, options.get("scale"), options.get("dropout_p", 0.0), None, options["causal"])
    return key_of(query, value, extras)
