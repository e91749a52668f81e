"""Linear attention: four walks of the carried state, one forward and three backward, that differ in their operands."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triton_attn.kernels import _carried, _carried_tiles
from triton_attn.kernels._carried_launch import (
    BACKWARD_KEY,
    BACKWARD_QUERY,
    FORWARD,
    Call,
    Operand,
    State,
    key_of,
    padded,
    sums,
    walk,
)
from triton_attn.tiles import Key, Tiles, chosen_tile

POINTERS = "linear_attention/pointers"
SPACES = _carried_tiles.by_pointers(sys.modules[__name__])


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
    tile: Tiles = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Forward by pointers: sm_80 and up."""
    (b, h, m), (g, n), e = query.shape[:3], key.shape[1:3], value.shape[-1]
    out = torch.empty((b, h, m, e), dtype=query.dtype, device=query.device)
    q, k, v = Operand(query, feature_map, 1.0 if scale is None else scale), Operand(key, feature_map), Operand(value)
    call = _call(FORWARD, tile, query, key, value, key_padding_mask, feature_map, causal)
    before, last = State(initial_state, initial_normalizer), State(None)
    if b * h == 0 or not causal or call.spans(n) > 1:
        before, last = sums(replace(call, heads=g), k, v, before)
    else:
        like: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
        last = State(torch.empty((b, g, k.features, e), **like), torch.empty((b, g, k.features), **like))
        walk(call, q, k, v, out, before, side=_carried.OF_Y, divide=normalize, eps=eps, last=last)
        return (out, last.state, last.side) if return_state else out  # type: ignore[return-value]
    if out.numel():
        walk(call, q, k, v, out, before if causal else last, side=_carried.OF_Y, divide=normalize, eps=eps)
    return (out, last.state, last.side) if return_state else out  # type: ignore[return-value]


def linear_attention_backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    grad_normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    state: Tensor,
    normalizer: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True, True, True),
    tile: Tiles = None,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and the initial state from the inputs and what the forward gave; an empty tensor where not needed."""
    (b, h, m), (g, n) = query.shape[:3], key.shape[1:3]
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    scale, group = 1.0 if scale is None else scale, h // g if g else 1
    q, k, v = Operand(query, feature_map, scale), Operand(key, feature_map), Operand(value)
    call = _call(BACKWARD_QUERY, tile, query, key, value, key_padding_mask, feature_map, causal)
    before = State(state, normalizer)
    if causal:
        before = State(initial_state, initial_normalizer)
        if call.spans(n) > 1:
            before, _ = sums(replace(call, heads=g), k, v, before)
    inverse = weight = None
    if normalize:
        # D again, which costs less to compute than to keep
        bottom = torch.empty((b, h, m, 1), dtype=torch.float32, device=query.device)
        if bottom.numel():
            column = State(None if before.side is None else before.side[..., None])
            walk(call, q, k, Operand(key, ones=True), bottom, column)
        inverse = (bottom[..., 0] + eps).reciprocal()
        weight = -(grad_out.float() * out.float()).sum(-1) * inverse
    dn = Operand(grad_out, factor=inverse, weight=weight)
    side = _carried.NO_SIDE if weight is None else _carried.OF_Z
    nothing = query.new_empty(0)
    gradients = [nothing] * 5
    if needs[0]:
        gradients[0] = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if gradients[0].numel():
            walk(call, dn, v, k, gradients[0], before.transposed, side=side, own=q, out_scale=scale)
    if not any(needs[1:]):
        return tuple(gradients)
    # from the end back to the start: what later queries ask of a key
    call = replace(_call(BACKWARD_KEY, tile, query, key, value, key_padding_mask, feature_map, causal), reverse=True)
    after = State(grad_state, grad_normalizer, lead=group)
    if not causal or call.spans(m) > 1 or any(needs[3:]):
        spanned, total = sums(
            call, replace(q, weight=weight if weight is not None else torch.zeros((b, h, m), device=query.device)), dn, after
        )
        after = spanned if causal else total
        for i, part in ((3, total.state), (4, total.side)):
            if needs[i] and part is not None:
                gradients[i] = _summed(part, group, torch.float32)
    if weight is not None or after.side is not None:
        side = _carried.OF_Z
        dn = replace(dn, weight=weight if weight is not None else torch.zeros((b, h, m), device=query.device))
    for i, own, needed in ((1, key, needs[1]), (2, value, needs[2])):
        if not needed:
            continue
        wide = torch.float32 if group > 1 else own.dtype
        made = torch.empty((b, h, *own.shape[2:]), dtype=wide, device=query.device)
        if made.numel():
            if i == 1:
                walk(call, v, dn, q, made, after.transposed, side=side, own=k)
            else:
                walk(call, k, q, dn, made, replace(after, side=None))
        gradients[i] = _summed(made, group, own.dtype)
    return tuple(gradients)


def _call(
    launch: str, tile: Tiles, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, feature_map: str, causal: bool
) -> Call:
    depends = key_of(query, value, feature_map, key_padding_mask is None, causal)
    chosen = chosen_tile(tile, launch, SPACES, POINTERS, depends, query)
    padding = None if key_padding_mask is None or key_padding_mask.numel() == 0 else key_padding_mask.view(torch.uint8)
    q = Operand(query, feature_map)
    return Call(query.shape[1], padding, chosen, query.dtype, causal, max(q.halves * q.padded, padded(value.shape[-1])))


def _summed(x: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Over the query heads that share a key head."""
    if group > 1:
        x = x.unflatten(1, (x.shape[1] // group, group)).sum(2)
    return x.to(dtype)


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on."""
    plain, causal = tensors["key_padding_mask"] is None, bool(options.get("causal"))
    return key_of(tensors["query"], tensors["value"], options.get("feature_map", "elu"), plain, causal)
