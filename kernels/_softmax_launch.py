"""The softmax loop from the host: allocate, choose tiles, launch. No tensor is copied, whatever its strides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from triton_attn import device
from triton_attn.kernels import _dropout, _softmax, _softmax_backward, _softmax_split, _softmax_walks
from triton_attn.kernels._grid import grid
from triton_attn.kernels._softmax_choice import BACKWARD_KEY, BACKWARD_QUERY, chosen_tile, forward_tile
from triton_attn.kernels._softmax_riders import Extras, constants, mask_kind, padded, riders, score_scale
from triton_attn.kernels._softmax_walks import Pattern, Walk
from triton_attn.reference._dropout import rescale, threshold
from triton_attn.tiles import Space, Tile
from triton_attn.tiles import Tiles as Tiles

MODULES = (_softmax, _softmax_backward, _softmax_split, _softmax_walks, _dropout)


def forward(
    pattern: Pattern,
    spaces: Mapping[str, Space],
    name: str,
    query: Tensor,
    key_: Tensor,
    value: Tensor,
    extras: Extras,
    tile: Tiles,
    descriptors: bool = False,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse); `packed`: out has its heads side by side in memory."""
    (b, h, m), (g, n), e = query.shape[:3], key_.shape[1:3], value.shape[-1]
    out = _fresh((b, h, m, e), query, packed)
    lse = torch.empty((b, h, m), dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    chosen = forward_tile(pattern, tile, spaces, name, query, key_, value, extras)
    if packed:
        chosen = replace(chosen, splits=1)  # a merge writes the rows of a head one behind the other
    left, state = out, lse
    if chosen.splits > 1:
        left = torch.empty((chosen.splits, b, h, m, e), dtype=torch.float32, device=query.device)
        state = torch.empty((2, chosen.splits, b, h, m), dtype=torch.float32, device=query.device)
    tensors, strides = riders(extras, b, h, g, m, n)
    more, more_strides = _elsewhere(pattern)
    with device.guard(query):
        if descriptors:
            triton.set_allocator(_allocate)
        for walk in pattern.queries:
            tiles = walk.tiles(m, chosen.block_m)
            _softmax.forward_kernel[(*grid(tiles * b * h), chosen.splits)](
                query,
                key_,
                value,
                more,
                *tensors,
                left,
                state,
                query.stride(),
                key_.stride(),
                value.stride(),
                more_strides,
                *strides,
                out.stride(),
                h,
                h // g,
                tiles,
                m,
                n,
                score_scale(extras),
                threshold(extras.dropout_p),
                rescale(extras.dropout_p),
                walk.numbers,
                EXTRA=pattern.elsewhere is not None,
                SPLIT=chosen.splits > 1,
                DESCRIPTORS=descriptors,
                WARP_SPECIALIZE=chosen.warp_specialize,
                **constants(walk, query, value, extras),
                **_launch(chosen),
            )
        if chosen.splits > 1:
            _softmax_split.merge_kernel[grid(b * h * m)](
                left,
                state,
                out,
                lse,
                b * h * m,
                chosen.splits,
                rescale(extras.dropout_p),
                MASK=mask_kind(extras),
                E=e,
                BLOCK_E=padded(e),
                BLOCK_S=_softmax_split.AT_ONCE,
                enable_fp_fusion=True,
            )
    return out, lse


def backward(
    pattern: Pattern,
    spaces: Mapping[str, Space],
    name: str,
    grads: tuple[Tensor | None, Tensor | None],
    query: Tensor,
    key_: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    extras: Extras,
    needs: Sequence[bool],
    tile: Tiles,
    packed: bool = False,
) -> tuple[Tensor, ...]:
    """(dQ, dK, dV), and of keys from elsewhere their dK and dV; an empty tensor for what is not needed. `packed`: as in `forward`."""
    grad_out, grad_lse = grads
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    delta = _delta(out, grad_out, grad_lse)
    shared = (query, grad_out, lse, delta)
    nothing = query.new_empty(0)
    dq, gradients = nothing, [nothing] * (len(needs) - 1)
    more, tiled = pattern.elsewhere, partial(chosen_tile, tile, BACKWARD_KEY, spaces, name, query, value, extras)
    beside = replace(extras, key_padding_mask=None)  # keys from elsewhere have their padding in their positions
    if needs[0]:
        dq = _fresh(query.shape, query, packed)
        if dq.numel():
            _query_gradient(pattern, spaces, name, *shared, key_, value, dq, extras, tile)
    if any(needs[1:3]):
        dk, dv = (_fresh(x.shape, x, packed) for x in (key_, value))
        if pattern.keys is None:
            dk, dv = dk.zero_(), dv.zero_()
        if pattern.keys is not None:
            _key_gradients(pattern.keys, tiled, *shared, key_, value, None, dk, dv, extras)
        if more is not None and more.copied:
            _key_gradients(more.walk, tiled, *shared, more.key, more.value, more.positions, dk, dv, beside, scatter=True)
        gradients[:2] = dk, dv
    if more is not None and any(needs[3:5]):
        gradients[2:4] = dk, dv = [_fresh(x.shape, x) for x in (more.key, more.value)]
        _key_gradients(more.walk, tiled, *shared, more.key, more.value, more.positions, dk, dv, beside)
    return dq, *(x if need else nothing for x, need in zip(gradients, needs[1:], strict=True))


def _fresh(shape: Sequence[int], like: Tensor, packed: bool = False) -> Tensor:
    """Memory for (B, heads, length, width); `packed`: with the heads of a place side by side."""
    b, heads, length, width = shape
    if packed:
        return torch.empty((b, length, heads, width), dtype=like.dtype, device=like.device).transpose(1, 2)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """rowsum(out dout) - dlse."""
    (b, h, m), e = out.shape[:3], out.shape[-1]
    delta = torch.empty((b, h, m), dtype=torch.float32, device=out.device)
    if delta.numel():
        rows = min(64, 8192 // padded(e))  # of wider ones the accumulators spill
        tiles = triton.cdiv(m, rows)
        with device.guard(out):
            _softmax_backward.delta_kernel[grid(tiles * b * h)](
                out,
                grad_out,
                grad_lse,
                delta,
                out.stride(),
                grad_out.stride(),
                grad_lse.stride() if grad_lse is not None else (0, 0, 0),
                h,
                tiles,
                m,
                E=e,
                BLOCK_E=padded(e),
                BLOCK_M=rows,
                enable_fp_fusion=True,
            )
    return delta


def _query_gradient(
    pattern: Pattern,
    spaces: Mapping[str, Space],
    name: str,
    query: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_: Tensor,
    value: Tensor,
    dq: Tensor,
    extras: Extras,
    tile: Tiles,
) -> None:
    (b, h, m), (g, n) = query.shape[:3], key_.shape[1:3]
    chosen = chosen_tile(tile, BACKWARD_QUERY, spaces, name, query, value, extras)
    tensors, strides = riders(extras, b, h, g, m, n)
    more, more_strides = _elsewhere(pattern)
    with device.guard(query):
        for walk in pattern.queries:
            tiles = walk.tiles(m, chosen.block_m)
            _softmax_backward.backward_query_kernel[grid(tiles * b * h)](
                query,
                key_,
                value,
                more,
                *tensors,
                grad_out,
                lse,
                delta,
                dq,
                query.stride(),
                key_.stride(),
                value.stride(),
                more_strides,
                *strides,
                grad_out.stride(),
                dq.stride(),
                h,
                h // g,
                tiles,
                m,
                n,
                score_scale(extras),
                extras.scale,
                threshold(extras.dropout_p),
                rescale(extras.dropout_p),
                walk.numbers,
                EXTRA=pattern.elsewhere is not None,
                **constants(walk, query, value, extras),
                **_launch(chosen),
            )


def _key_gradients(
    walk: Walk,
    tiled: Callable[[], Tile],
    query: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_: Tensor,
    value: Tensor,
    positions: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    extras: Extras,
    *,
    scatter: bool = False,
) -> None:
    if key_.numel() == 0 and value.numel() == 0:
        return
    (b, h, m), (g, n), chosen = query.shape[:3], key_.shape[1:3], tiled()
    (mask, padding, _, seed), strides = riders(extras, b, h, g, m, n)
    tiles = walk.tiles(n, chosen.block_n)
    with device.guard(query):
        _softmax_backward.backward_key_kernel[grid(tiles * b * g)](
            query,
            key_,
            value,
            positions,
            mask,
            padding,
            seed,
            grad_out,
            lse,
            delta,
            dk,
            dv,
            query.stride(),
            key_.stride(),
            value.stride(),
            positions.stride() if positions is not None else (0, 0, 0),
            *strides,
            grad_out.stride(),
            dk.stride(),
            dv.stride(),
            h,
            h // g,
            tiles,
            m,
            n,
            score_scale(extras),
            extras.scale,
            threshold(extras.dropout_p),
            rescale(extras.dropout_p),
            walk.numbers,
            SCATTER=scatter,
            **constants(walk, query, value, extras),
            **_launch(chosen),
        )


def _elsewhere(pattern: Pattern) -> tuple[tuple[Tensor | None, ...], tuple[tuple[int, ...], ...]]:
    """(key, value, positions) from elsewhere and their strides; None and zeros where there are none."""
    more = pattern.elsewhere
    if more is None:
        return (None, None, None), ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0))
    return (more.key, more.value, more.positions), (more.key.stride(), more.value.stride(), more.positions.stride())


def _launch(tile: Tile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
