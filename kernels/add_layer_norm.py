"""LayerNorm of a weighted sum: rows in registers, read once. Loops on the device, launches from the host. No tensor is copied."""

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

NAME = "add_layer_norm/rows"


@triton.jit
def _summed(x, residual, row, live, column, length, alpha, x_strides, r_strides, D: tl.constexpr):
    """alpha * residual + x of some rows, in float32."""
    h = rows_of(x, row, live, column, length, x_strides, D)
    if residual is not None:
        h += alpha * rows_of(residual, row, live, column, length, r_strides, D)
    return h


@triton.jit
def _normalised(h, column, eps, D: tl.constexpr):
    """(h - mean) / std and 1 / std: the variance in a second pass over registers, for a difference of squares would cancel."""
    centred = tl.where((column < D)[None, :], h - (tl.sum(h, 1) / D)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def forward_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    x_strides,
    r_strides,
    w_stride,
    b_stride,
    rows,
    length,
    alpha,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    live = row < rows
    h = _summed(x, residual, row, live, column, length, alpha, x_strides, r_strides, D)
    y, rstd = _normalised(h, column, eps, D)
    if weight is not None:
        y *= tl.load(weight + column * w_stride, mask=column < D, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + column * b_stride, mask=column < D, other=0.0)[None, :]
    where = row[:, None] * D + column[None, :]
    seen = live[:, None] & (column < D)[None, :]
    tl.store(out + where, y, mask=seen)
    if total is not None:
        tl.store(total + where, h, mask=seen)


@triton.jit
def backward_kernel(
    grad_out,
    grad_total,
    x,
    residual,
    weight,
    dx,
    dresidual,
    dweight,
    dbias,
    g_strides,
    t_strides,
    x_strides,
    r_strides,
    w_stride,
    rows,
    length,
    alpha,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Some blocks of rows one after the other; what they add to the gradients of weight and bias goes into a slice of the program's own."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    if weight is not None:
        w = tl.load(weight + column * w_stride, mask=column < D, other=0.0)[None, :]
    dw = tl.zeros((BLOCK_D,), tl.float32)
    db = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(STEPS):
        row = (program * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        live = row < rows
        seen = live[:, None] & (column < D)[None, :]
        h = _summed(x, residual, row, live, column, length, alpha, x_strides, r_strides, D)
        y, rstd = _normalised(h, column, eps, D)
        g = rows_of(grad_out, row, live, column, length, g_strides, D)
        if dweight is not None:
            # rows that do not exist have no gradient, but with eps = 0 no finite y either
            dw += tl.sum(tl.where(live[:, None], g * y, 0.0), 0)
        if dbias is not None:
            db += tl.sum(g, 0)
        if weight is not None:
            g *= w
        inner = g - (tl.sum(g, 1) / D)[:, None] - y * (tl.sum(g * y, 1) / D)[:, None]
        dh = inner * rstd[:, None]
        if grad_total is not None:
            dh += rows_of(grad_total, row, live, column, length, t_strides, D)
        where = row[:, None] * D + column[None, :]
        tl.store(dx + where, dh, mask=seen)
        if dresidual is not None:
            tl.store(dresidual + where, alpha * dh, mask=seen)
    if dweight is not None:
        tl.store(dweight + program * D + column, dw, mask=column < D)
    if dbias is not None:
        tl.store(dbias + program * D + column, db, mask=column < D)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    eps: float = 1e-5,
    return_sum: bool = False,
    tile: Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(out, sum): one launch."""
    chosen = chosen_tile(tile, FORWARD, SPACES, NAME, key_of(x), x)
    b, length, d = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty((0 if residual is None else b, length, d), dtype=x.dtype, device=x.device)
    if out.numel():
        with device.guard(x):
            forward_kernel[grid(triton.cdiv(b * length, chosen.block_m))](
                x,
                residual,
                weight,
                bias,
                out,
                None if residual is None else total,
                *(_strides(tensor) for tensor in (x, residual)),
                *(_stride(tensor) for tensor in (weight, bias)),
                b * length,
                length,
                alpha,
                eps,
                **constants(chosen, d),
            )
    return (out, total) if return_sum else out


def add_layer_norm_backward(
    grad_out: Tensor | None,
    grad_sum: Tensor | None,
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    eps: float = 1e-5,
    out: Tensor,
    sum: Tensor,
    needs: Sequence[bool] = (True,) * 4,
    tile: Tiles = None,
) -> tuple[Tensor, ...]:
    """Gradients of (x, residual, weight, bias): one launch, and two sums over the programs in a fixed order."""
    chosen = chosen_tile(tile, BACKWARD, SPACES, NAME, key_of(x), x)
    b, length, d = x.shape
    rows, nothing = b * length, x.new_empty(0)
    if grad_out is None:
        grad_out = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dresidual = torch.empty_like(dx) if residual is not None and needs[1] else None
    programs = triton.cdiv(rows, chosen.block_m * chosen.block_n)
    dweight, dbias = (
        torch.empty((programs, d), dtype=torch.float32, device=x.device) if tensor is not None and need else None
        for tensor, need in zip((weight, bias), needs[2:], strict=True)
    )
    if dx.numel():
        grad_sum = None if residual is None else grad_sum
        with device.guard(x):
            backward_kernel[grid(programs)](
                grad_out,
                grad_sum,
                x,
                residual,
                weight,
                dx,
                dresidual,
                dweight,
                dbias,
                *(_strides(tensor) for tensor in (grad_out, grad_sum, x, residual)),
                _stride(weight),
                rows,
                length,
                alpha,
                eps,
                **constants(chosen, d),
                STEPS=chosen.block_n,
            )
    found = (dx, dresidual, _reduced(dweight, weight), _reduced(dbias, bias))
    return tuple(nothing if gradient is None or not need else gradient for gradient, need in zip(found, needs, strict=True))


def _reduced(partial: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if partial is None or like is None else partial.sum(0).to(like.dtype)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


SPACES = spaces(sys.modules[__name__])
