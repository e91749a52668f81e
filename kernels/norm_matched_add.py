"""A branch added at the length of what it is added to: rows in registers, read once. Loops on the device, launches from the host."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_attn import device
from triton_attn.kernels._grid import grid
from triton_attn.kernels._norm_rows import BACKWARD, FORWARD, constants, key_of, rows_of, spaces
from triton_attn.tiles import Tiles, chosen_tile

NAME = "norm_matched_add/rows"


@triton.jit
def forward_kernel(
    x,
    branch,
    weight,
    out,
    gain,
    x_strides,
    c_strides,
    rows,
    length,
    scale,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    live = row < rows
    ours = rows_of(x, row, live, column, length, x_strides, D)
    theirs = rows_of(branch, row, live, column, length, c_strides, D)
    ratio = tl.sqrt(tl.sum(ours * ours, 1)) / (tl.sqrt(tl.sum(theirs * theirs, 1)) + eps)
    w = scale
    if weight is not None:
        w *= tl.load(weight)
    y = ours + (w * ratio)[:, None] * theirs
    tl.store(out + row[:, None] * D + column[None, :], y, mask=live[:, None] & (column < D)[None, :])
    tl.store(gain + row, ratio, mask=live)


@triton.jit
def backward_kernel(
    grad_out,
    grad_gain,
    x,
    branch,
    weight,
    dx,
    dbranch,
    dweight,
    g_strides,
    t_strides,
    x_strides,
    c_strides,
    rows,
    length,
    scale,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Some blocks of rows one after the other; what they add to the gradient of the weight goes into a number of the program's own."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    w = scale
    if weight is not None:
        w *= tl.load(weight)
    dw = tl.zeros((BLOCK_R,), tl.float32)
    for step in range(STEPS):
        row = (program * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        live = row < rows
        seen = live[:, None] & (column < D)[None, :]
        ours = rows_of(x, row, live, column, length, x_strides, D)
        theirs = rows_of(branch, row, live, column, length, c_strides, D)
        g = rows_of(grad_out, row, live, column, length, g_strides, D)
        own, other = tl.sqrt(tl.sum(ours * ours, 1)), tl.sqrt(tl.sum(theirs * theirs, 1))
        inverse = 1.0 / (other + eps)
        ratio = own * inverse
        along = tl.sum(g * theirs, 1)
        # rows that do not exist have no product, but with eps = 0 no finite ratio either
        dw += tl.where(live, ratio * along, 0.0)
        dratio = w * along
        if grad_gain is not None:
            dratio += tl.load(grad_gain + (row // length) * t_strides[0] + (row % length) * t_strides[1], mask=live, other=0.0)
        # a row of zeros has no direction, and gets no gradient through its norm: what divides it is all the same
        to_own = dratio * inverse / tl.where(own > 0, own, 1.0)
        to_other = dratio * ratio * inverse / tl.where(other > 0, other, 1.0)
        where = row[:, None] * D + column[None, :]
        if dx is not None:
            tl.store(dx + where, g + to_own[:, None] * ours, mask=seen)
        if dbranch is not None:
            d = (w * ratio)[:, None] * g - to_other[:, None] * theirs
            tl.store(dbranch + where, d, mask=seen)
    if dweight is not None:
        tl.store(dweight + program, scale * tl.sum(dw, 0))


def norm_matched_add(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    *,
    scale: float = 1.0,
    eps: float = 1e-6,
    return_gain: bool = False,
    tile: Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(out, gain): one launch."""
    chosen = chosen_tile(tile, FORWARD, SPACES, NAME, key_of(x), x)
    b, length, d = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gain = torch.empty((b, length), dtype=torch.float32, device=x.device)
    if out.numel():
        with device.guard(x):
            forward_kernel[grid(triton.cdiv(b * length, chosen.block_m))](
                x,
                branch,
                weight,
                out,
                gain,
                x.stride(),
                branch.stride(),
                b * length,
                length,
                scale,
                eps,
                **constants(chosen, d),
            )
    return (out, gain) if return_gain else out


def norm_matched_add_backward(
    grad_out: Tensor | None,
    grad_gain: Tensor | None,
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    *,
    scale: float = 1.0,
    eps: float = 1e-6,
    out: Tensor,
    gain: Tensor,
    needs: Sequence[bool] = (True,) * 3,
    tile: Tiles = None,
) -> tuple[Tensor, ...]:
    """Gradients of (x, branch, weight): one launch, and a sum over the programs in a fixed order."""
    chosen = chosen_tile(tile, BACKWARD, SPACES, NAME, key_of(x), x)
    b, length, d = x.shape
    rows, nothing = b * length, x.new_empty(0)
    if grad_out is None:
        grad_out = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    dx, dbranch = (torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None for need in needs[:2])
    programs = triton.cdiv(rows, chosen.block_m * chosen.block_n)
    dweight = torch.empty(programs, dtype=torch.float32, device=x.device) if weight is not None and needs[2] else None
    if x.numel():
        with device.guard(x):
            backward_kernel[grid(programs)](
                grad_out,
                grad_gain,
                x,
                branch,
                weight,
                dx,
                dbranch,
                dweight,
                grad_out.stride(),
                (0, 0) if grad_gain is None else grad_gain.stride(),
                x.stride(),
                branch.stride(),
                rows,
                length,
                scale,
                eps,
                **constants(chosen, d),
                STEPS=chosen.block_n,
            )
    summed = None if dweight is None or weight is None else dweight.sum(0, keepdim=True).to(weight.dtype)
    return tuple(nothing if gradient is None else gradient for gradient in (dx, dbranch, summed))


SPACES = spaces(sys.modules[__name__])
