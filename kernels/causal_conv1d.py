"""The short causal convolution from the host: allocate, choose tiles, launch. No tensor is copied for its layout."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from triton_attn import device
from triton_attn.kernels import _convolution, _grid, _scan
from triton_attn.tiles import Key, Space, Tile, Tiles, bucket, chosen_tile

FORWARD, BACKWARD = "forward", "backward"
NAME = "causal_conv1d/taps"
KEYS = tuple(Key(operands, 32, False) for operands in ("16bit", "float32"))


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
    tile: Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(out, final_states): one launch; the last steps are copied beside it."""
    out = torch.empty_like(x)
    grid, sizes, constants = _launch(chosen_tile(tile, FORWARD, SPACES, NAME, key_of(x), x), x, weight, x.shape[2])
    tensors = (x, weight, bias, initial_states, seq_idx, out)
    strides = map(_strides, tensors, (3, 2, 1, 3, 2, 3))
    if grid[0]:
        with device.guard(x):
            _convolution.forward_kernel[grid](*tensors, *strides, *sizes, SILU=activation is not None, **constants)
    return (out, _final(x, initial_states, weight.shape[1] - 1)) if return_final_states else out


def causal_conv1d_backward(
    grad_out: Tensor | None,
    grad_final_states: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    out: Tensor,
    final_states: Tensor,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    needs: Sequence[bool] = (True,) * 4,
    tile: Tiles = None,
) -> tuple[Tensor, ...]:
    """Gradients of (x, weight, bias, initial_states)."""
    nothing, taps = x.new_empty(0), weight.shape[1]
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    covered = x.shape[2] + (taps - 1 if initial_states is not None else 0)
    grid, sizes, constants = _launch(chosen_tile(tile, BACKWARD, SPACES, NAME, key_of(x), x), x, weight, covered)
    dx = torch.empty_like(x)
    dinitial = None if initial_states is None else torch.empty_like(initial_states)
    sums = None
    if needs[1] or needs[2]:
        sums = torch.empty((x.shape[0] * sizes[-1], x.shape[1], taps + 1), dtype=torch.float32, device=x.device)
    if grid[0]:
        tensors = (x, weight, bias, initial_states, seq_idx, grad_out, grad_final_states, dx, dinitial, sums)
        strides = map(_strides, tensors, (3, 2, 1, 3, 2, 3, 3, 3, 3, 3))
        with device.guard(x):
            _convolution.backward_kernel[grid](*tensors, *strides, *sizes, SILU=activation is not None, **constants)
    summed = None if sums is None else sums.sum(0)
    found = (
        dx,
        None if summed is None else weight.new_empty(weight.shape).copy_(summed[:, :taps]),
        None if summed is None or bias is None else bias.new_empty(bias.shape).copy_(summed[:, taps]),
        dinitial,
    )
    return tuple(nothing if each is None or not need else each for each, need in zip(found, needs, strict=True))


def _final(x: Tensor, initial_states: Tensor | None, past: int) -> Tensor:
    """The last steps of what came before and x."""
    missing = past - x.shape[2]
    if missing <= 0:
        return x.new_empty(*x.shape[:2], past).copy_(x[:, :, x.shape[2] - past :])
    before = x.new_zeros(*x.shape[:2], missing) if initial_states is None else initial_states[:, :, past - missing :].to(x.dtype)
    return torch.cat((before, x), 2)


def _strides(tensor: Tensor | None, rank: int) -> tuple[int, ...]:
    return (0,) * rank if tensor is None else tensor.stride()


def _launch(tile: Tile, x: Tensor, weight: Tensor, steps: int) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """(grid, runtime sizes, constants)."""
    batch, channels, length = x.shape
    # at least two: of a block of one Triton's interpreter drops `other=0`, as of a scalar
    block_d = min(tile.block_m, triton.next_power_of_2(max(channels, 2)))
    block_t = min(tile.block_n, triton.next_power_of_2(max(steps, 2)))
    blocks_d, blocks_t = triton.cdiv(channels, block_d), triton.cdiv(steps, block_t)
    constants = {
        "WIDTH": weight.shape[1],
        "BLOCK_D": block_d,
        "BLOCK_T": block_t,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
    return _grid.grid(batch * blocks_d * blocks_t), (channels, length, blocks_d, blocks_t), constants


def key_of(x: Tensor) -> Key:
    """What a call's tiles depend on: how inputs are held, how many channels there are in all, and the length."""
    return replace(KEYS[x.element_size() != 2], lengths=(bucket(x.shape[0] * x.shape[1]), bucket(x.shape[2])))


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """The same from a call's tensors."""
    return key_of(tensors["x"])


def _candidates(launch: str, key: Key) -> Sequence[Tile]:
    """(channels, steps, warps): wide both ways, as either axis may lie together in memory. Unmeasured."""
    sizes = ((32, 64, 4), (32, 32, 4), (16, 32, 4)) if launch == FORWARD else ((32, 64, 8), (16, 64, 4), (16, 32, 8))
    return tuple(Tile(channels, steps, warps, 1) for channels, steps, warps in sizes)


def _space(launch: str) -> Space:
    """Nothing here differs between capabilities: no tensor cores, no asynchronous copies."""
    modules = (_scan, _convolution, sys.modules[__name__])
    return Space({(8, 0): partial(_candidates, launch)}, lambda key: _candidates(launch, key)[-1], modules, lambda: KEYS)


SPACES = {launch: _space(launch) for launch in (FORWARD, BACKWARD)}
