"""The short causal convolution in stock PyTorch operators.

Eagerly, tiles that fit the cache take one multiply-add a tap and the activation where they stand in the result, and the backward pass
recomputes a tile: fresh memory costs a CPU more than the arithmetic. Small items, whose memory is never fresh, and calls that
something looks into are left to torch's own convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn.portable._watched import backward_is_watched, differentiable, watched
from triton_attn.reference._sequences import same_sequence

TILE = 2**19  # elements: 2 MB in fp32; smaller ones were slower
NARROWEST = 32  # steps or channels of a tile
SMALL = 2**19  # elements of an item: up to here the calls of a tile cost more than the fresh memory that they save


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """(out, final_states)."""
    wide, past = torch.promote_types(x.dtype, torch.float32), weight.shape[1] - 1
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    small = x.shape[1] * x.shape[2] <= SMALL
    if seq_idx is not None or small or watched(x) or x.device.type != "cpu" or x.shape[2] <= past:
        out = _at_once(x, weight, bias, initial_states, seq_idx, activation)
    else:
        # few steps see what is before the first; the others are one function of x
        head = _at_once(x[:, :, :past], weight, bias, initial_states, None, activation)
        out = _Tiles.apply(x, weight, bias, head, activation is not None)  # type: ignore[no-untyped-call]
    if not return_final_states:
        return out
    before = x.new_zeros(*x.shape[:2], past) if initial_states is None else initial_states
    recent = x[:, :, max(x.shape[2] - past, 0) :]
    return out, torch.cat((before[:, :, recent.shape[2] :].to(x.dtype), recent), 2)


def _at_once(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, seq_idx: Tensor | None, activation: str | None
) -> Tensor:
    """Out of place, and differentiable any number of times."""
    wide, taps, steps = weight.dtype, weight.shape[1], x.shape[2]
    if seq_idx is None and x.numel():
        if before is None:
            # padded at both ends, which copies nothing; what lies beyond the last step is dropped
            y = F.conv1d(x.to(wide), weight[:, None], bias, padding=taps - 1, groups=x.shape[1])[:, :, :steps]
        else:
            y = F.conv1d(torch.cat((before.to(wide), x.to(wide)), 2), weight[:, None], bias, groups=x.shape[1])
    else:
        start = x.new_zeros(*x.shape[:2], taps - 1, dtype=wide) if before is None else before.to(wide)
        history = torch.cat((start, x.to(wide)), 2)
        y = torch.zeros_like(x, dtype=wide) if bias is None else bias[:, None].expand(x.shape)
        for i in range(taps):
            seen = history[:, :, i : i + steps]
            seen = seen if seq_idx is None else torch.where(same_sequence(seq_idx, taps - 1 - i), seen, 0.0)
            y = y + weight[:, i, None] * seen
    out = y if activation is None else F.silu(y)
    out = out.to(x.dtype)
    return out.mT.contiguous().mT if _turned(x) else out.contiguous()


def _turned(x: Tensor) -> bool:
    """Whether channels lie together in memory."""
    return x.stride(1) < x.stride(2)


class _Tiles(torch.autograd.Function):
    """All steps of x from the taps-th on; `head` are those before them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor, silu: bool) -> Tensor:
        out = torch.empty_like(x)
        out[:, :, : head.shape[2]] = head
        narrow = out.dtype != weight.dtype
        for tile in _Tile.all_of(x, weight, bias, buffers=int(narrow)):
            found = out[tile.place]
            y = tile.convolved(tile.buffer(0) if narrow else found)
            y = F.silu(y, inplace=True) if silu else y
            if narrow:
                found.copy_(y)
        ctx.save_for_backward(x, weight, bias)
        ctx.silu = silu
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        past = weight.shape[1] - 1
        dhead = grad[:, :, :past]
        if backward_is_watched(grad):
            return (
                *differentiable(partial(_rest, silu=ctx.silu), (x, weight, bias), ctx.needs_input_grad[:3], (grad[:, :, past:],)),
                dhead,
                None,
            )
        dx = torch.zeros_like(x, dtype=weight.dtype)
        dweight = torch.zeros_like(weight)
        dbias = None if bias is None else torch.zeros_like(bias)
        for tile in _Tile.all_of(x, weight, bias, buffers=2):
            dy = tile.buffer(1).copy_(grad[tile.place])
            if ctx.silu:
                y = tile.convolved(tile.buffer(0))
                torch.ops.aten.silu_backward.grad_input(dy, y, grad_input=dy)
            for i in range(past + 1):
                seen = tile.back(past - i)
                dx[seen].addcmul_(dy, tile.column(i))
                dweight[tile.place[1], i] += torch.mul(dy, x[seen], out=tile.buffer(0)).sum(1)
            if dbias is not None:
                dbias[tile.place[1]] += dy.sum(1)
        return dx.to(x.dtype), dweight, dbias, dhead, None


def _rest(x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool) -> Tensor:
    """What `_Tiles` computes, by torch's convolution."""
    y = F.conv1d(x.to(weight.dtype), weight[:, None], bias, groups=x.shape[1])
    return (F.silu(y) if silu else y).to(x.dtype)


class _Tile:
    """Some channels and steps of one item; tiles lie across memory as x does, and share buffers."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, buffers: Tensor, place: tuple[int, slice, slice]) -> None:
        self.x, self.weight, self.bias, self.buffers, self.place = x, weight, bias, buffers, place

    @staticmethod
    def all_of(x: Tensor, weight: Tensor, bias: Tensor | None, *, buffers: int) -> Iterator[_Tile]:
        batch, channels, steps = x.shape
        past = weight.shape[1] - 1
        turned = _turned(x)
        across, along = (channels, steps - past) if turned else (steps - past, channels)
        inner = min(across, TILE // NARROWEST)
        outer = min(max(TILE // max(inner, 1), 1), along)
        height, width = (inner, outer) if turned else (outer, inner)
        held = weight.new_empty(buffers, width, height).mT if turned else weight.new_empty(buffers, height, width)
        for item in range(batch):
            for d in range(0, channels, max(height, 1)):
                for t in range(past, steps, max(width, 1)):
                    yield _Tile(x, weight, bias, held, (item, slice(d, min(d + height, channels)), slice(t, min(t + width, steps))))

    def back(self, distance: int) -> tuple[int, slice, slice]:
        """The same channels, so many steps earlier."""
        item, channels, steps = self.place
        return item, channels, slice(steps.start - distance, steps.stop - distance)

    def buffer(self, which: int) -> Tensor:
        _, channels, steps = self.place
        return self.buffers[which, : channels.stop - channels.start, : steps.stop - steps.start]

    def column(self, i: int) -> Tensor:
        return self.weight[self.place[1], i, None]

    def convolved(self, out: Tensor) -> Tensor:
        """The sums before the activation."""
        past = self.weight.shape[1] - 1
        if self.bias is None:
            torch.mul(self.x[self.place], self.column(past), out=out)
        else:
            torch.addcmul(self.bias[self.place[1], None], self.x[self.place], self.column(past), out=out)
        for i in range(past):
            torch.addcmul(out, self.x[self.back(past - i)], self.column(i), out=out)
        return out
