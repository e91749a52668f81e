"""Linear attention in stock operators: O(N), differentiable, its state in float32."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from triton_attn.portable import _carried
from triton_attn.portable._watched import watched
from triton_attn.reference._features import count, features

MOST = 1 << 19  # features at a time where nothing is causal, 2 MiB in float32: what does not leave the cache costs half


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """O(N) time and memory; no state is kept for a token. Queries may be (B, members, Hk, M, D), and then so is the result."""
    b, g = key.shape[:2]
    wide = torch.promote_types(query.dtype, torch.float32)
    queries, members = query, 1
    if query.ndim == 4:
        queries, members = query.reshape(b, g, query.shape[1] // g if g else 1, *query.shape[-2:]), 2
    hidden = None if key_padding_mask is None else key_padding_mask[:, None, :, None]
    state = None
    if initial_state is not None or initial_normalizer is not None:
        shape = (b, g, count(key.shape[-1], feature_map))
        top = value.new_zeros(*shape, value.shape[-1], dtype=wide) if initial_state is None else initial_state
        bottom = value.new_zeros(shape, dtype=wide) if initial_normalizer is None else initial_normalizer
        state = top, bottom
    quotient = partial(_quotient, scale=1.0 if scale is None else scale, eps=eps if normalize else None, dtype=query.dtype)
    if causal:
        phi_k, shown = _keys(key, value, hidden, feature_map)
        top, bottom, last = _carried.causal(features(queries.to(wide), feature_map), phi_k, shown, state, members)
        out = quotient(top, bottom)
    else:
        last = _total(key, value, hidden, feature_map, state)
        pieces = _pieces(queries, _step(queries, feature_map))
        parts = [quotient(*_carried.seen(features(piece.to(wide), feature_map), last, members)) for piece in pieces]
        out = torch.cat(parts, -2) if len(parts) > 1 else parts[0]
    out = (out if query.ndim == 5 else out.flatten(1, 2)).contiguous()
    return (out, *last) if return_state else out


def _total(key: Tensor, value: Tensor, hidden: Tensor | None, feature_map: str, state: _carried.State | None) -> _carried.State:
    step = _step(key, feature_map)
    keys = _pieces(key, step)
    masks = (None,) * len(keys) if hidden is None else _pieces(hidden, step)
    for piece in zip(keys, _pieces(value, step), masks, strict=True):
        state = _carried.total(*_keys(*piece, feature_map), state)
    assert state is not None
    return state


def _pieces(x: Tensor, step: int) -> tuple[Tensor, ...]:
    """So many tokens each. Slices would have gradients as long as all of them."""
    return (x,) if step >= x.shape[-2] else tuple(torch.split(x, step, -2))


def _step(x: Tensor, feature_map: str) -> int:
    """How many tokens are a piece."""
    if torch.compiler.is_compiling():  # a loop would fix the length in the graph
        return x.shape[-2]
    return max(_carried.CHUNK, MOST // max(1, math.prod(x.shape[:-2]) * count(x.shape[-1], feature_map)))


def _keys(key: Tensor, value: Tensor, hidden: Tensor | None, feature_map: str) -> tuple[Tensor, Tensor]:
    """(features, values) in float32 at least, zero where they are hidden."""
    wide = torch.promote_types(key.dtype, torch.float32)
    if hidden is None:
        return features(key.to(wide), feature_map), value.to(wide)
    phi_k = features(key.masked_fill(hidden, 0.0).to(wide), feature_map)
    return phi_k.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0).to(wide)


def _quotient(top: Tensor, bottom: Tensor, scale: float, eps: float | None, dtype: torch.dtype) -> Tensor:
    """Numerators by denominators, or without `eps` numerators alone."""
    factor = scale if eps is None else scale / (bottom * scale + eps)
    if eps is not None or scale != 1.0:
        # in place: fresh memory costs more; but what is mapped, or has a tangent, may be the factor alone
        top = top * factor if top.requires_grad or watched(top) else top.mul_(factor)
    return top.to(dtype)
