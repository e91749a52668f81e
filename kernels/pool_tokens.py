"""Pooling of tokens: a program owns some cells of one head and reads each of their tokens once, where it lies."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_attn import device
from triton_attn.kernels._grid import grid
from triton_attn.tiles import Key, Space, Tile, Tiles, bucket, chosen_tile

NAME, FORWARD, BACKWARD = "pool_tokens/cells", "forward", "backward"
WIDTHS = (64, 256)  # wider rows are refused
VARYING = ["heads", "blocks", "rows", "columns", "cells", "wide"]


@triton.jit
def places(block, rows, columns, cells, wide, HEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Some cells, which of them exist, and the row and column of their first token: beyond the grid where the cell does not exist."""
    cell = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return cell, cell < cells, cell // wide * HEIGHT, cell % wide * 2


@triton.jit
def weights(count, padding, batch, token, there, count_strides, padding_strides):
    """How much some tokens count; those that are hidden, or not there, do not."""
    weight = tl.where(there, 1.0, 0.0)
    if count is not None:
        weight = tl.load(count + batch * count_strides[0] + token * count_strides[1], mask=there, other=0.0)
    if padding is not None:
        hidden = tl.load(padding + batch * padding_strides[0] + token * padding_strides[1], mask=there, other=1)
        weight = tl.where(hidden == 0, weight, 0.0)
    return weight


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    x,
    count,
    padding,
    out,
    pooled_count,
    x_strides,
    count_strides,
    padding_strides,
    heads,
    blocks,
    rows,
    columns,
    cells,
    wide,
    width,
    HEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    cell, live, top, left = places(block, rows, columns, cells, wide, HEIGHT, BLOCK)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    summed = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    base = x + batch * x_strides[0] + head * x_strides[1] + column[None, :] * x_strides[3]
    for i in tl.static_range(HEIGHT):
        for j in tl.static_range(2):
            there = (top + i < rows) & (left + j < columns)
            token = (top + i) * columns + left + j
            weight = weights(count, padding, batch, token, there, count_strides, padding_strides)
            seen = (weight != 0.0)[:, None] & (column < width)[None, :]
            summed += weight[:, None] * tl.load(base + token[:, None] * x_strides[2], mask=seen, other=0.0)
            total += weight
    mean = summed / tl.where(total == 0.0, 1.0, total)[:, None]
    where = ((batch * heads + head) * cells + cell) * width
    tl.store(out + where[:, None] + column[None, :], mean, mask=live[:, None] & (column < width)[None, :])
    if head == 0:
        tl.store(pooled_count + batch * cells + cell, total, mask=live)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad_out,
    count,
    padding,
    pooled_count,
    dx,
    g_strides,
    count_strides,
    padding_strides,
    heads,
    blocks,
    rows,
    columns,
    cells,
    wide,
    width,
    HEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each token's share of its cell's gradient; none of a token that is hidden."""
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    cell, live, top, left = places(block, rows, columns, cells, wide, HEIGHT, BLOCK)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    total = tl.load(pooled_count + batch * cells + cell, mask=live, other=0.0)
    seen = (total != 0.0)[:, None] & (column < width)[None, :]
    base = grad_out + batch * g_strides[0] + head * g_strides[1]
    grad = tl.load(base + cell[:, None] * g_strides[2] + column[None, :] * g_strides[3], mask=seen, other=0.0)
    grad /= tl.where(total == 0.0, 1.0, total)[:, None]
    for i in tl.static_range(HEIGHT):
        for j in tl.static_range(2):
            there = (top + i < rows) & (left + j < columns)
            token = (top + i) * columns + left + j
            weight = weights(count, padding, batch, token, there, count_strides, padding_strides)[:, None]
            where = ((batch * heads + head) * rows * columns + token) * width
            tl.store(dx + where[:, None] + column[None, :], weight * grad, mask=there[:, None] & (column < width)[None, :])


def pool_tokens(
    x: Tensor,
    *,
    rows: int = 1,
    count: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    return_count: bool = False,
    tile: Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(means, counts) of cells: one launch."""
    (b, h, n, d), chosen = x.shape, chosen_tile(tile, FORWARD, SPACES, NAME, key_of(x), x)
    cells, heads = _cells(n, rows), max(h, 1)  # counts are there without heads, too
    out = torch.empty((b, h, cells, d), dtype=x.dtype, device=x.device)
    total = torch.empty((b, cells), dtype=torch.float32, device=x.device)
    if total.numel():
        padding, blocks = _bytes(key_padding_mask), triton.cdiv(cells, chosen.block_m)
        with device.guard(x):
            forward_kernel[grid(b * heads * blocks)](
                x, count, padding, out, total, x.stride(), *_strides(count, padding), heads, blocks, *_sizes(n, rows), d if h else 0,
                **_constants(chosen, rows, d),
            )  # fmt: skip
    return (out, total) if return_count else out


def pool_tokens_backward(
    grad_out: Tensor | None,
    grad_pooled_count: Tensor | None,
    x: Tensor,
    *,
    rows: int = 1,
    count: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    out: Tensor,
    pooled_count: Tensor,
    needs: Sequence[bool] = (True,),
    tile: Tiles = None,
) -> tuple[Tensor, ...]:
    """The gradient of x: one launch. Counts have none."""
    (b, h, n, d), chosen = x.shape, chosen_tile(tile, BACKWARD, SPACES, NAME, key_of(x), x)
    if grad_out is None:
        grad_out = torch.zeros((), dtype=x.dtype, device=x.device).expand(out.shape)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        padding, blocks = _bytes(key_padding_mask), triton.cdiv(out.shape[2], chosen.block_m)
        with device.guard(x):
            backward_kernel[grid(b * h * blocks)](
                grad_out, count, padding, pooled_count, dx, grad_out.stride(), *_strides(count, padding), h, blocks, *_sizes(n, rows), d,
                **_constants(chosen, rows, d),
            )  # fmt: skip
    return (dx,)


def _cells(tokens: int, rows: int) -> int:
    return triton.cdiv(rows, min(rows, 2)) * triton.cdiv(tokens // rows, 2)


def _sizes(tokens: int, rows: int) -> tuple[int, ...]:
    """Rows and columns, cells, and cells in a row."""
    columns = tokens // rows
    return rows, columns, _cells(tokens, rows), triton.cdiv(columns, 2)


def _bytes(padding: Tensor | None) -> Tensor | None:
    return None if padding is None else padding.view(torch.uint8)


def _strides(*tensors: Tensor | None) -> Iterator[tuple[int, ...]]:
    return ((0, 0) if tensor is None else tensor.stride() for tensor in tensors)


def _constants(tile: Tile, rows: int, d: int) -> dict[str, Any]:
    return {
        "HEIGHT": min(rows, 2),
        "BLOCK_D": triton.next_power_of_2(max(d, 2)),  # of a block of one Triton's interpreter drops `other=0`
        "BLOCK": tile.block_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def key_of(x: Tensor) -> Key:
    """What a call's tiles depend on: how x is held, how wide a head is, how many tokens there are."""
    width = next((width for width in WIDTHS if x.shape[-1] <= width), WIDTHS[-1])
    return Key("16bit" if x.element_size() == 2 else "float32", width, False, (bucket(x.shape[2]),))


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """The same from a call's tensors."""
    return key_of(tensors["x"])


def _candidates(key: Key) -> Sequence[Tile]:
    """Cells at a time, and warps: a thread holds some 16 numbers. Unmeasured."""
    if key.width == 64:
        return Tile(32, 2, 4, 1), Tile(16, 2, 4, 1), Tile(16, 2, 2, 1)
    return Tile(16, 2, 4, 1), Tile(8, 2, 4, 1), Tile(4, 2, 4, 1)


def _entries() -> Iterator[Key]:
    return (Key(operands, width, False) for operands, width in product(("16bit", "float32"), WIDTHS))


_SPACE = Space({(8, 0): _candidates}, lambda key: _candidates(key)[-1], (sys.modules[__name__],), _entries)
SPACES = {FORWARD: _SPACE, BACKWARD: _SPACE}
