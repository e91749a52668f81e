"""Performer attention (FAVOR+): one walk forward; backward one for each of its operands, back in time for keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from triton_attn.kernels import _favor_tiles
from triton_attn.kernels._carried_launch import BACKWARD_KEY, BACKWARD_QUERY, FORWARD, State, key_of, padded
from triton_attn.kernels._favor_launch import Call, Chain, Levels, Lines, Phi, chain, gradients, largest, levels, outputs, safe, sums
from triton_attn.tiles import Key, Tiles, chosen_tile

POINTERS = "performer_attention/pointers"
SPACES = _favor_tiles.SPACES


@dataclass(frozen=True)
class _Seen:
    """What every walk wants to know of its lines."""

    call: Call
    query: Lines
    key: Lines
    level: Tensor  # of keys
    along: Chain
    at: Levels


def _see(
    launch: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: Phi,
    causal: bool,
    padding: Tensor | None,
    initial: Tensor | None,
    tile: Tiles,
    known: _Seen | None = None,
) -> _Seen:
    """By the tile of a launch; what another launch knows of the lines is not computed again."""
    chosen = chosen_tile(tile, launch, SPACES, POINTERS, key_of(query, value, "identity", True, causal), query)
    width = max(padded(query.shape[-1]), padded(value.shape[-1]))
    call = Call(query.shape[1], key.shape[1], phi, chosen, query.dtype, causal, width)
    if known is None:
        padding = None if padding is None or padding.numel() == 0 else padding.view(torch.uint8)
        largest_k, level = levels(call, key, padding)
        q, k = Lines(query, largest(call, query)), Lines(key, largest_k)
    else:
        q, k, level = known.query, known.key, known.level
    along = chain(call, level, initial)
    m = query.shape[2]
    if causal:
        at = Levels(safe(along.running), level, along.before)
    else:
        at = Levels(safe(along.last)[..., None].repeat(1, 1, m), level, _everywhere(call, along.last, m))
    return _Seen(call, q, k, level, along, at)


def _everywhere(call: Call, last: Tensor, length: int) -> Tensor:
    """One level for every span."""
    return last.repeat(call.spans(length), 1, 1)


def performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    causal: bool = False,
    kernel_epsilon: float = 1e-4,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    initial_level: Tensor | None = None,
    return_state: bool = False,
    tile: Tiles = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward by pointers: sm_80 and up."""
    phi = Phi(projection, _root(scale, query), kernel_epsilon)
    seen = _see(FORWARD, query, key, value, phi, causal, key_padding_mask, initial_level, tile)
    call, v = seen.call, Lines(value)
    out = torch.empty((*query.shape[:3], value.shape[-1]), dtype=query.dtype, device=query.device)
    before, last = sums(replace(call, heads=call.key_heads), seen.key, v, seen.level, seen.along, State(initial_state, initial_normalizer))
    outputs(call, seen.query, seen.key, v, seen.at, before if causal else last, out, eps=eps * phi.count)
    return (out, last.state, last.side, seen.along.last) if return_state else out  # type: ignore[return-value]


def performer_attention_backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    grad_normalizer: Tensor | None,
    grad_level: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    out: Tensor,
    state: Tensor,
    normalizer: Tensor,
    level: Tensor,
    *,
    causal: bool = False,
    kernel_epsilon: float = 1e-4,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    initial_level: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True, True, True),
    tile: Tiles = None,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and initial state; an empty tensor where not needed. Levels are constants: what they do cancels."""
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    b, h, m, _ = query.shape
    phi = Phi(projection, _root(scale, query), kernel_epsilon)
    seen = _see(BACKWARD_QUERY, query, key, value, phi, causal, key_padding_mask, initial_level, tile)
    call, q, k, v = seen.call, seen.query, seen.key, Lines(value)
    before = State(state, normalizer)
    if causal:
        initial = State(initial_state, initial_normalizer)
        before, _ = sums(replace(call, heads=call.key_heads), k, v, seen.level, seen.along, initial)
    # D again, which costs less to compute than to keep
    assert before.side is not None
    ones = Lines(torch.ones((), device=value.device).expand(*value.shape[:3], 1))
    quotient = torch.empty((b, h, m, 1), dtype=torch.float32, device=query.device)
    bottom = outputs(call, q, k, ones, seen.at, replace(before, state=before.side[..., None]), quotient, eps=eps * phi.count)
    assert bottom is not None
    denominator = bottom + eps * phi.count
    inverse = denominator.masked_fill_(denominator == 0.0, 1.0).reciprocal_()
    weight = -(grad_out.float() * out.float()).sum(-1) * inverse
    dn = Lines(grad_out, None, inverse, weight)
    found = [query.new_empty(0) for _ in needs]
    if needs[0]:
        found[0] = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        gradients(call, dn, v, k, q, seen.at, before, found[0], norm=False)
    if not any(needs[1:]):
        return tuple(found)
    # from the end back to the start: what later queries ask of a key
    seen = _see(BACKWARD_KEY, query, key, value, phi, causal, key_padding_mask, initial_level, tile, seen)
    call = replace(seen.call, reverse=True)
    asked = -seen.at.x
    along = chain(call, asked, -safe(seen.along.last))
    spanned, total = sums(call, replace(q, weight=weight), dn, asked, along, State(grad_state, grad_normalizer))
    after = spanned if causal else total
    at = Levels(-seen.level, asked, along.before if causal else _everywhere(call, along.last, key.shape[2]))
    group = call.heads // call.key_heads if call.key_heads else 1
    for i, own in ((1, key), (2, value)):
        if needs[i]:
            wide = torch.float32 if group > 1 else own.dtype
            made = torch.empty((b, h, *own.shape[2:]), dtype=wide, device=query.device)
            if i == 1:
                gradients(call, v, dn, q, k, at, after, made, norm=True)
            else:
                outputs(call, k, q, dn, at, replace(after, side=None), made)
            found[i] = _summed(made, group).to(own.dtype)
    if any(needs[3:]):
        # what is left of the initial state at the last level of this walk
        first = torch.full_like(along.last, float("-inf")) if initial_level is None else initial_level
        kept = (first + along.last).exp()
        assert total.state is not None
        assert total.side is not None
        if needs[3]:
            found[3] = _summed(total.state, group) * kept[..., None, None]
        if needs[4]:
            found[4] = _summed(total.side, group) * kept[..., None]
    return tuple(found)


def _root(scale: float | None, query: Tensor) -> float:
    return float((query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5)


def _summed(x: Tensor, group: int) -> Tensor:
    """Over the query heads that share a key head."""
    return x.unflatten(1, (x.shape[1] // group, group)).sum(2) if group > 1 else x


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on: hidden keys differ by their level alone."""
    return key_of(tensors["query"], tensors["value"], "identity", True, bool(options.get("causal")))
