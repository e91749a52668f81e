"""Attention by a carried state, of which linear attention is a member: one walk forward and three backward that differ in their operands.

Queries are (B, H, M, D), or (B, Hk, members, M, D), whose members share a key head; outputs are laid out as the caller likes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from triton_attn.kernels import _carried
from triton_attn.kernels._carried_launch import BACKWARD_KEY, BACKWARD_QUERY, FORWARD, Call, Operand, State, key_of, padded, sums, walk
from triton_attn.tiles import Space, Tiles, chosen_tile


@dataclass(frozen=True)
class Attention:
    """Which mechanism this is, and the options of one call."""

    pointers: str
    spaces: Mapping[str, Space]
    tile: Tiles
    feature_map: str
    causal: bool
    normalize: bool
    scale: float | None
    eps: float
    key_padding_mask: Tensor | None

    def call(self, launch: str, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """What the launches share."""
        padding = self.key_padding_mask
        depends = key_of(query, value, self.feature_map, padding is None, self.causal)
        chosen = chosen_tile(self.tile, launch, self.spaces, self.pointers, depends, query)
        padding = None if padding is None or padding.numel() == 0 else padding.view(torch.uint8)
        q = Operand(query, self.feature_map)
        return Call(heads_of(query), padding, chosen, query.dtype, self.causal, max(q.halves * q.padded, padded(value.shape[-1])))

    def operands(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Operand, Operand, Operand]:
        """Queries, keys and values, as features are made of them."""
        scale = 1.0 if self.scale is None else self.scale
        return Operand(query, self.feature_map, scale), Operand(key, self.feature_map), Operand(value)


def heads_of(tensor: Tensor) -> int:
    """Heads, their members counted."""
    return tensor.shape[1] * (tensor.shape[2] if tensor.ndim == 5 else 1)


def forward(of: Attention, query: Tensor, key: Tensor, value: Tensor, out: Tensor, before: State) -> State:
    """Fill `out`, and return the state after the last key."""
    (b, g, n), e = key.shape[:3], value.shape[-1]
    q, k, v = of.operands(query, key, value)
    call = of.call(FORWARD, query, key, value)
    rule: dict[str, Any] = {"side": _carried.OF_Y, "divide": of.normalize, "eps": of.eps}
    if b * call.heads == 0 or not of.causal or call.spans(n) > 1:
        before, last = sums(replace(call, heads=g), k, v, before)
        if out.numel():
            walk(call, q, k, v, out, before if of.causal else last, **rule)
        return last
    like: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    last = State(torch.empty((b, g, k.features, e), **like), torch.empty((b, g, k.features), **like))
    walk(call, q, k, v, out, before, **rule, last=last)
    return last


def backward(
    of: Attention,
    grad_out: Tensor,
    grad_last: State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    last: State,
    initial: State,
    grad_query: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Fill `grad_query`, unless None, and return the gradients of key, value and the initial state; an empty tensor where not needed."""
    (b, g, n), m = key.shape[:3], query.shape[-2]
    q, k, v = of.operands(query, key, value)
    call = of.call(BACKWARD_QUERY, query, key, value)
    h, group = call.heads, call.group(key)
    before = last
    if of.causal:
        before = initial
        if call.spans(n) > 1:
            before, _ = sums(replace(call, heads=g), k, v, before)
    inverse = weight = None
    if of.normalize:
        # D again, which costs less to compute than to keep
        bottom = torch.empty((b, h, m, 1), dtype=torch.float32, device=query.device)
        if bottom.numel():
            column = State(None if before.side is None else before.side[..., None])
            walk(call, q, k, Operand(key, ones=True), bottom, column)
        inverse = (bottom[..., 0] + of.eps).reciprocal()
        weight = torch.empty((b, h, m), dtype=torch.float32, device=query.device)
        torch.sum(grad_out.float() * out.float(), -1, out=weight.view(grad_out.shape[:-1]))
        weight = -weight * inverse
    dn = Operand(grad_out, factor=inverse, weight=weight)
    side = _carried.NO_SIDE if weight is None else _carried.OF_Z
    if grad_query is not None and grad_query.numel():
        walk(call, dn, v, k, grad_query, before.transposed, side=side, own=q, out_scale=q.scale)
    gradients = [query.new_empty(0) for _ in needs]
    if not any(needs):
        return gradients
    # from the end back to the start: what later queries ask of a key
    call = replace(of.call(BACKWARD_KEY, query, key, value), reverse=True)
    after = replace(grad_last, lead=group)
    if not of.causal or call.spans(m) > 1 or any(needs[2:]):
        spanned, total = sums(call, replace(q, weight=_weighing(weight, (b, h, m), query)), dn, after)
        after = spanned if of.causal else total
        for i, part in ((2, total.state), (3, total.side)):
            if i < len(needs) and needs[i] and part is not None:
                gradients[i] = _summed(part, group, torch.float32)
    if weight is not None or after.side is not None:
        side = _carried.OF_Z
        dn = replace(dn, weight=_weighing(weight, (b, h, m), query))
    for i, own in ((0, key), (1, value)):
        if not needs[i]:
            continue
        wide = torch.float32 if group > 1 else own.dtype
        made = torch.empty((b, h, *own.shape[2:]), dtype=wide, device=query.device)
        if made.numel():
            if i == 0:
                walk(call, v, dn, q, made, after.transposed, side=side, own=k)
            else:
                walk(call, k, q, dn, made, replace(after, side=None))
        gradients[i] = _summed(made, group, own.dtype)
    return gradients


def _weighing(weight: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros(shape, device=like.device) if weight is None else weight


def _summed(x: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Over the query heads that share a key head."""
    if group > 1:
        x = x.unflatten(1, (x.shape[1] // group, group)).sum(2)
    return x.to(dtype)
