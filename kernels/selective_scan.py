"""The selective scan from the host: allocate, choose tiles, launch. No tensor is copied, whatever its strides."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from triton_attn import device
from triton_attn.kernels import _scan, _scan_backward
from triton_attn.tiles import STATE_KEYS, Key, Space, Tile, Tiles, bucket, chosen_tile

FORWARD, BACKWARD = "forward", "backward"
NAME = "selective_scan/registers"
WIDTHS = (16, 64, 256)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    tile: Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(out, last_state): one launch."""
    chosen = chosen_tile(tile, FORWARD, SPACES, NAME, key_of(u, A), u)
    b, d, length = u.shape
    out = torch.empty_like(u)
    last = torch.empty((_sequences(u, cu_seqlens), *A.shape), dtype=torch.float32, device=u.device)
    if cu_seqlens is not None:
        out.zero_()  # steps that no sequence has
    _forward(chosen, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, mask, cu_seqlens, out, last, None)
    return (out, last) if return_last_state else out


def _forward(
    tile: Tile,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor | None,
    last: Tensor | None,
    states: Tensor | None,
) -> None:
    grid, sizes, blocks = _grid(tile, u, B, cu_seqlens)
    if not grid[0]:
        return
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, _bytes(mask, u), cu_seqlens, out, last, states)
    with device.guard(u):
        _scan.forward_kernel[grid](*tensors, *map(_strides, tensors, RANKS), *sizes, SOFTPLUS=delta_softplus, **blocks)


def selective_scan_backward(
    grad_out: Tensor | None,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    out: Tensor,
    last_state: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    needs: Sequence[bool] = (True,) * 9,
    tile: Tiles = None,
) -> tuple[Tensor, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state): the states that chunks start from, then chunks in reverse."""
    chosen = chosen_tile(tile, BACKWARD, SPACES, NAME, key_of(u, A), u)
    b, d, length = u.shape
    groups, n = B.shape[1], A.shape[1]
    count, nothing = _sequences(u, cu_seqlens), u.new_empty(0)
    chunks = triton.cdiv(length, chosen.block_n)
    kept = length // chosen.block_n + count if cu_seqlens is not None else count * chunks
    states = torch.empty((kept, d, n), dtype=torch.float32, device=u.device)
    _forward(chosen, u, delta, A, B, C, None, None, delta_bias, delta_softplus, initial_state, mask, cu_seqlens, None, None, states)
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    grid, sizes, constants = _grid(chosen, u, B, cu_seqlens)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": u.device}
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(delta), None if z is None else torch.empty_like(z)
    da = torch.empty((count, d, n), **fp32)
    dinitial = None if initial_state is None else torch.empty((count, d, n), **fp32)
    dd, dbias = (None if x is None else torch.empty((count, d), **fp32) for x in (D, delta_bias))
    blocks = sizes[2]
    db, dc = (torch.empty((b, groups, blocks, length, n), **fp32) if wanted else None for wanted in needs[3:5])
    if cu_seqlens is not None:
        for gradient in (du, ddelta, dz, db, dc):
            if gradient is not None:
                gradient.zero_()  # steps that no sequence has
    if grid[0]:
        mask = _bytes(mask, u)
        partial = next((x.stride() for x in (db, dc) if x is not None), (0,) * 5)
        sums = next((x.stride() for x in (dd, dbias) if x is not None), (0, 0))
        with device.guard(u):
            _scan_backward.backward_kernel[grid](
                grad_out,
                grad_last_state,
                u,
                delta,
                A,
                B,
                C,
                D,
                z,
                delta_bias,
                states,
                mask,
                cu_seqlens,
                du,
                ddelta,
                da,
                db,
                dc,
                dd,
                dz,
                dbias,
                dinitial,
                grad_out.stride(),
                _strides(grad_last_state, 3),
                *map(_strides, (u, delta, A, B, C, D, z, delta_bias, states, mask, cu_seqlens), (3, 3, 2, 4, 4, 1, 3, 1, 3, 2, 1)),
                du.stride(),
                ddelta.stride(),
                da.stride(),
                partial,
                sums,
                _strides(dz, 3),
                *sizes,
                SOFTPLUS=delta_softplus,
                **constants,
            )
    found = (
        du,
        ddelta,
        da.sum(0).to(A.dtype),
        _summed(db, B),
        _summed(dc, C),
        None if D is None or dd is None else dd.sum(0).to(D.dtype),
        dz,
        None if delta_bias is None or dbias is None else dbias.sum(0).to(delta_bias.dtype),
        None if initial_state is None or dinitial is None else dinitial.to(initial_state.dtype),
    )
    return tuple(nothing if x is None or not need else x for x, need in zip(found, needs, strict=True))


RANKS = (3, 3, 2, 4, 4, 1, 3, 1, 3, 2, 1, 3, 3, 3)


def _summed(partial: Tensor | None, like: Tensor) -> Tensor | None:
    """(B, G, blocks, L, N) over blocks, in a fixed order -> (B, G, N, L) in the input's dtype and order in memory."""
    return None if partial is None else torch.empty_like(like).copy_(partial.sum(2).transpose(2, 3))


def _strides(tensor: Tensor | None, rank: int) -> tuple[int, ...]:
    return (0,) * rank if tensor is None else tensor.stride()


def _bytes(mask: Tensor | None, u: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(u.shape[0], u.shape[2]).view(torch.uint8)


def _sequences(u: Tensor, cu_seqlens: Tensor | None) -> int:
    return u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


class GridError(ValueError):
    """More programs than one launch can have."""


def _grid(tile: Tile, u: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """(grid, runtime sizes, constants) of a launch."""
    groups, n = B.shape[1], B.shape[2]
    per_group = u.shape[1] // groups if groups else 0
    # at least two: of a block of one Triton's interpreter drops `other=0`, as of a scalar
    block_d = min(tile.block_m, triton.next_power_of_2(max(per_group, 2)))
    blocks = triton.cdiv(per_group, block_d)
    programs = _sequences(u, cu_seqlens) * groups * blocks
    if programs >= 2**31:
        raise GridError(f"{programs} programs; a launch has fewer than 2^31, so split the batch")
    sizes = (groups, per_group, blocks, u.shape[2], triton.cdiv(u.shape[2], tile.block_n))
    constants = {
        "N": n,
        "BLOCK_N": triton.next_power_of_2(max(n, 2)),
        "BLOCK_D": block_d,
        "BLOCK_T": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
    return (programs,), sizes, constants


def key_of(u: Tensor, A: Tensor) -> Key:
    """What a call's tiles depend on: how inputs are held, the width of the state, how many channels there are in all, and the length."""
    width = next(width for width in WIDTHS if A.shape[1] <= width)
    lengths = (bucket(u.shape[0] * u.shape[1]), bucket(u.shape[2]))
    return Key("16bit" if u.element_size() == 2 else "float32", width, False, lengths)


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """The same from a call's tensors."""
    return key_of(tensors["u"], tensors["A"])


def _candidates(launch: str, key: Key) -> Sequence[Tile]:
    """(channels, steps, warps), best guess first; the offline compile strikes out what spills. Unmeasured."""
    widest = {
        (FORWARD, 16): ((32, 8, 1), (32, 8, 4), (16, 4, 4)),
        (FORWARD, 64): ((16, 8, 4), (16, 4, 4), (8, 4, 4)),
        (FORWARD, 256): ((8, 4, 8), (4, 4, 8), (4, 2, 8)),
        (BACKWARD, 16): ((32, 8, 4), (16, 8, 4), (32, 4, 4)),
        (BACKWARD, 64): ((16, 4, 8), (8, 4, 4), (8, 4, 8), (4, 4, 4)),
        (BACKWARD, 256): ((4, 4, 8), (4, 2, 8), (2, 2, 8)),
    }
    return tuple(Tile(channels, steps, warps, 1) for channels, steps, warps in widest[launch, key.width])


def _space(launch: str) -> Space:
    """Nothing here differs between capabilities: no tensor cores, no asynchronous copies."""
    return Space(
        {(8, 0): partial(_candidates, launch)},
        lambda key: _candidates(launch, key)[-1],
        (_scan, _scan_backward, sys.modules[__name__]),
        lambda: STATE_KEYS,
    )


SPACES = {launch: _space(launch) for launch in (FORWARD, BACKWARD)}
