"""The softmax loop from the host: allocate, choose tiles, launch. No tensor is copied, whatever its strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from triton_attn import device
from triton_attn.kernels import _dropout, _softmax, _softmax_backward
from triton_attn.reference._dropout import rescale, threshold
from triton_attn.tiles import WIDEST_TF32, WIDTHS, Key, Space, Tile, find

MODULES = (_softmax, _softmax_backward, _dropout)
FORWARD, BACKWARD_QUERY, BACKWARD_KEY = "forward", "backward_query", "backward_key"


class GridError(ValueError):
    """More programs than one launch can have."""


@dataclass(frozen=True)
class Pattern:
    """Who owns and visits what; see `_softmax`. `tiles(length, block)` counts programs per head, for queries and for keys."""

    rows: Any
    runs: Any
    edges: tuple[bool, ...]
    columns: Any
    visits: Any
    visit_edges: tuple[bool, ...]
    keep: Any = None
    numbers: tuple[int, ...] = (0,)
    tiles: Callable[[int, int], int] = triton.cdiv


@dataclass(frozen=True)
class Extras:
    """What may ride along with a call: masks already checked, scale and dropout already chosen."""

    mask: Tensor | None
    key_padding_mask: Tensor | None
    scale: float
    dropout_p: float
    seed: Tensor | None

    @property
    def plain(self) -> bool:
        return self.mask is None and self.key_padding_mask is None and self.dropout_p == 0.0


Tiles = Tile | Mapping[str, Tile] | None


def key(query: Tensor, value: Tensor, extras: Extras) -> Key:
    """What this call's tiles depend on."""
    width = max(WIDTHS[0], _padded(query.shape[-1]), _padded(value.shape[-1]))
    if query.element_size() == 2:
        return Key("16bit", width, extras.plain)
    exact = torch.get_float32_matmul_precision() == "highest" or width > WIDEST_TF32
    return Key("float32" if exact else "tf32", width, extras.plain)


def forward(
    pattern: Pattern,
    spaces: Mapping[str, Space],
    name: str,
    query: Tensor,
    key_: Tensor,
    value: Tensor,
    extras: Extras,
    tile: Tiles,
    descriptors: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    (b, h, m), (g, n), e = query.shape[:3], key_.shape[1:3], value.shape[-1]
    out = torch.empty((b, h, m, e), dtype=query.dtype, device=query.device)
    lse = torch.empty((b, h, m), dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    chosen = chosen_tile(tile, FORWARD, spaces, name, query, value, extras)
    tiles = pattern.tiles(m, chosen.block_m)
    tensors, numbers = _riders(extras, b, h, m, n)
    with device.guard(query):
        if descriptors:
            triton.set_allocator(_allocate)
        _softmax.forward_kernel[_grid(tiles * b * h)](
            query,
            key_,
            value,
            *tensors,
            out,
            lse,
            query.stride(),
            key_.stride(),
            value.stride(),
            *numbers,
            out.stride(),
            h,
            h // g,
            tiles,
            m,
            n,
            _score_scale(extras),
            threshold(extras.dropout_p),
            rescale(extras.dropout_p),
            pattern.numbers,
            ROWS=pattern.rows,
            RUNS=pattern.runs,
            KEEP=pattern.keep,
            EDGES=pattern.edges,
            DESCRIPTORS=descriptors,
            WARP_SPECIALIZE=chosen.warp_specialize,
            **_constants(query, value, extras),
            **_launch(chosen),
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
    needs: tuple[bool, bool, bool],
    tile: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV); an empty tensor for what is not needed."""
    (b, h, m), (g, n), e = query.shape[:3], key_.shape[1:3], value.shape[-1]
    grad_out, grad_lse = grads
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    nothing = query.new_empty(0)
    dq = torch.empty(query.shape, dtype=query.dtype, device=query.device) if needs[0] else nothing
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key_, value)) if needs[1] or needs[2] else (nothing, nothing)
    delta = torch.empty_like(lse)
    tensors, numbers = _riders(extras, b, h, m, n)
    constants = _constants(query, value, extras)
    scalars = (_score_scale(extras), extras.scale, threshold(extras.dropout_p), rescale(extras.dropout_p), pattern.numbers)
    strides = (query.stride(), key_.stride(), value.stride(), *numbers, grad_out.stride())
    with device.guard(query):
        if delta.numel():
            tiles = triton.cdiv(m, 64)
            lse_strides = grad_lse.stride() if grad_lse is not None else (0, 0, 0)
            _softmax_backward.delta_kernel[_grid(tiles * b * h)](
                out,
                grad_out,
                grad_lse,
                delta,
                out.stride(),
                grad_out.stride(),
                lse_strides,
                h,
                tiles,
                m,
                E=e,
                BLOCK_E=_padded(e),
                BLOCK_M=64,
                enable_fp_fusion=True,
            )
        if dq.numel():
            chosen = chosen_tile(tile, BACKWARD_QUERY, spaces, name, query, value, extras)
            tiles = pattern.tiles(m, chosen.block_m)
            _softmax_backward.backward_query_kernel[_grid(tiles * b * h)](
                query,
                key_,
                value,
                *tensors,
                grad_out,
                lse,
                delta,
                dq,
                *strides,
                dq.stride(),
                h,
                h // g,
                tiles,
                m,
                n,
                *scalars,
                ROWS=pattern.rows,
                RUNS=pattern.runs,
                KEEP=pattern.keep,
                EDGES=pattern.edges,
                **constants,
                **_launch(chosen),
            )
        if dk.numel():
            chosen = chosen_tile(tile, BACKWARD_KEY, spaces, name, query, value, extras)
            tiles = pattern.tiles(n, chosen.block_n)
            mask, padding, _, seed = tensors
            _softmax_backward.backward_key_kernel[_grid(tiles * b * g)](
                query,
                key_,
                value,
                mask,
                padding,
                seed,
                grad_out,
                lse,
                delta,
                dk,
                dv,
                *strides,
                dk.stride(),
                dv.stride(),
                h,
                h // g,
                tiles,
                m,
                n,
                *scalars,
                COLUMNS=pattern.columns,
                VISITS=pattern.visits,
                KEEP=pattern.keep,
                EDGES=pattern.visit_edges,
                **constants,
                **_launch(chosen),
            )
    return dq, dk if needs[1] else nothing, dv if needs[2] else nothing


def chosen_tile(tile: Tiles, launch: str, spaces: Mapping[str, Space], name: str, query: Tensor, value: Tensor, extras: Extras) -> Tile:
    """The tile asked for, or the one that tables have for this call."""
    if isinstance(tile, Tile):
        return tile
    if tile is not None and launch in tile:
        return tile[launch]
    return find(f"{name}/{launch}", spaces[launch], key(query, value, extras), query)


def _riders(extras: Extras, b: int, h: int, m: int, n: int) -> tuple[tuple[Tensor | None, ...], tuple[tuple[int, ...], ...]]:
    """(mask, padding, end of the unpadded keys, seed) and the strides of the first two."""
    mask, padding, end = extras.mask, extras.key_padding_mask, None
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    padding_strides: tuple[int, ...] = (0, 0)
    if mask is not None:
        mask = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).expand(b, h, m, n)
        mask_strides = mask.stride()
    if padding is not None and n:
        # keys after the last visible one are never visited
        places = torch.arange(1, n + 1, dtype=torch.int32, device=padding.device)
        end = places.masked_fill(padding, 0).amax(1)
        padding = padding.view(torch.uint8)
        padding_strides = padding.stride()
    else:
        padding = None
    return (mask, padding, end, extras.seed), (mask_strides, padding_strides)


def _constants(query: Tensor, value: Tensor, extras: Extras) -> dict[str, Any]:
    mask, d, e, n = extras.mask, query.shape[-1], value.shape[-1], value.shape[2]
    return {
        "MASK": _softmax.NO_MASK.value if mask is None else _softmax.BOOLEAN.value if mask.dtype == torch.bool else _softmax.ADDITIVE.value,
        "PADDING": extras.key_padding_mask is not None and n > 0,
        "DROPOUT": extras.dropout_p > 0.0,
        "D": d,
        "E": e,
        "BLOCK_D": _padded(d),
        "BLOCK_E": _padded(e),
        "PRECISION": "tf32" if key(query, value, extras).operands == "tf32" else "ieee",
    }


def _launch(tile: Tile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def _score_scale(extras: Extras) -> float:
    additive = extras.mask is not None and extras.mask.dtype != torch.bool
    return extras.scale if additive else extras.scale * math.log2(math.e)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _grid(programs: int) -> tuple[int]:
    if programs >= 2**31:
        raise GridError(f"{programs} programs; a launch has fewer than 2^31, so split the batch")
    return (programs,)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
