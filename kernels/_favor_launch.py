"""FAVOR+ from the host: levels of lines and spans, and the launches. No tensor is copied, whatever its strides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from triton_attn import device
from triton_attn.kernels import _carried, _favor, _favor_walks, _grid
from triton_attn.kernels._carried_launch import LIKE, State, operands, padded, strides
from triton_attn.kernels._grid import grid
from triton_attn.tiles import Tile

MODULES = (_favor_walks, _favor, _carried, _grid)


@dataclass(frozen=True)
class Phi:
    """What the features are: e^(root W x - largest) + epsilon."""

    projection: Tensor
    root: float
    epsilon: float

    @property
    def count(self) -> int:
        return self.projection.shape[0]


@dataclass(frozen=True)
class Lines:
    """A tensor (B, heads, length, width): with `largest` what features are of; else as it is, perhaps times a factor for each line."""

    tensor: Tensor
    largest: Tensor | None = None  # (B, heads, length), contiguous, like the others
    factor: Tensor | None = None
    weight: Tensor | None = None  # of the side sum, given with `factor`

    @property
    def width(self) -> int:
        return self.tensor.shape[-1]


@dataclass(frozen=True)
class Chain:
    """The largest level so far along a walk, of each line and at the ends of spans, which are outermost."""

    running: Tensor  # (B, G, length), in the order of time
    before: Tensor  # (spans, B, G)
    ends: Tensor  # (spans, B, G)
    last: Tensor  # (B, G)

    @property
    def decay(self) -> Tensor:
        """What a state loses over a span."""
        return (self.before - safe(self.ends)).exp()


@dataclass(frozen=True)
class Call:
    """What every launch of one call shares."""

    heads: int
    key_heads: int
    phi: Phi
    tile: Tile
    like: torch.dtype
    causal: bool
    width: int  # the widest, padded
    reverse: bool = False

    @property
    def span(self) -> int:
        """Tokens of one program, the same for every batch."""
        return max(self.tile.block_m * self.tile.block_m // 4, 4 * self.width)

    def spans(self, length: int) -> int:
        return max(1, triton.cdiv(length, self.span))

    @property
    def block(self) -> int:
        """Features of one pass."""
        return min(self.tile.block_n, padded(self.phi.count))

    @property
    def exponent(self) -> str:
        exact = self.like == torch.float32 and operands(self.like, self.width) == "float32"
        return "ieee" if exact else "tf32"

    def constants(self, width: int) -> dict[str, Any]:
        return {
            "WIDTH": width,
            "PADDED": padded(width),
            "BLOCK_F": self.block,
            "BLOCK": self.tile.block_m,
            "LIKE": LIKE[self.like],
            "EXPONENT": self.exponent,
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            "enable_fp_fusion": True,
            # or ptxas spills a few registers to make room for another block
            "maxnreg": 255,
        }

    def walked(self, width: int, width_z: int) -> dict[str, Any]:
        """The constants of a walk."""
        precision = "tf32" if operands(self.like, padded(width), padded(width_z)) == "tf32" else "ieee"
        return {
            **self.constants(width),
            "WIDTH_Z": width_z,
            "PADDED_Z": padded(width_z),
            "CAUSAL": self.causal,
            "REVERSE": self.causal and self.reverse,
            "PRECISION": precision,
        }

    def group(self, tensor: Tensor, axis: int = 1) -> int:
        """How many heads of the call are one of the tensor's."""
        return self.heads // tensor.shape[axis] if tensor.shape[axis] else 1


def safe(level: Tensor) -> Tensor:
    """A level to subtract: where nothing has been seen yet, any."""
    return level.masked_fill(level == float("-inf"), 0.0)


def levels(call: Call, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(the largest exponent of each line, its level)."""
    level = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    return largest(call, x, padding, level), level


def largest(call: Call, x: Tensor, padding: Tensor | None = None, level: Tensor | None = None) -> Tensor:
    """The largest exponent of each line; `level` is filled too."""
    b, h, n, d = x.shape
    found = torch.empty((b, h, n), dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(n, call.tile.block_m)
    if found.numel():
        with device.guard(x):
            _favor.level_kernel[grid(b * h * blocks)](
                x, call.phi.projection, padding, found, level, strides(x), call.phi.projection.stride(),
                (0, 0) if padding is None else padding.stride(), h, blocks, n, call.phi.count, call.phi.root, **call.constants(d),
            )  # fmt: skip
    return found


def chain(call: Call, level: Tensor, initial: Tensor | None) -> Chain:
    """Along the lines of `level` (B, G, length), from the level of what came before them."""
    first = level.new_full(level.shape[:2], float("-inf")) if initial is None else initial
    last = torch.cat((first[..., None], level), -1).amax(-1)
    n, spans = level.shape[-1], call.spans(level.shape[-1])
    if not call.causal:
        ends = last.repeat(spans, 1, 1)
        return Chain(last[..., None].expand(level.shape), torch.cat((first[None], ends[1:])), ends, last)
    walked = level.flip(-1) if call.reverse else level
    running = torch.maximum(walked.cummax(-1).values if n else walked, first[..., None])
    # the last line of each span but the last
    inner = running[..., call.span - 1 : (spans - 1) * call.span : call.span].movedim(-1, 0)
    ends = torch.cat((inner, last[None]))
    return Chain(running.flip(-1) if call.reverse else running, torch.cat((first[None], ends[:-1])), ends, last)


def sums(call: Call, y: Lines, z: Lines, level: Tensor, along: Chain, initial: State) -> tuple[State, State]:
    """(the states before each span of y's length, the state after all of them), each relative to the level there."""
    batch, heads, n, d = y.tensor.shape
    e, count, spans = z.width, call.phi.count, call.spans(n)
    like: dict[str, Any] = {"dtype": torch.float32, "device": y.tensor.device}
    state, side = torch.empty(spans, batch, heads, count, e, **like), torch.empty(spans, batch, heads, count, **like)
    total, total_side = torch.empty(state.shape[1:], **like), torch.empty(side.shape[1:], **like)
    constants = call.walked(d, e)
    del constants["CAUSAL"]
    blocks, group = triton.cdiv(count, call.block), heads // level.shape[1] if level.shape[1] else 1
    if total_side.numel():
        with device.guard(y.tensor):
            _favor.sum_kernel[grid(spans * blocks * batch * heads)](
                y.tensor,
                z.tensor,
                call.phi.projection,
                y.largest,
                level,
                z.factor,
                z.weight,
                along.ends,
                state,
                side,
                strides(y.tensor),
                strides(z.tensor),
                call.phi.projection.stride(),
                heads,
                group,
                blocks,
                spans,
                call.span,
                n,
                count,
                call.phi.root,
                call.phi.epsilon,
                **constants,
            )
        _prefix(state, total, along.decay, initial.state, group)
        _prefix(side[..., None], total_side[..., None], along.decay, None if initial.side is None else initial.side[..., None], group)
    return State(state, side), State(total, total_side)


def _prefix(part: Tensor, total: Tensor, decay: Tensor, initial: Tensor | None, group: int) -> None:
    spans, batch, heads, rows, columns = part.shape
    count, block = rows * columns, 512
    blocks = triton.cdiv(count, block)
    starts = (0, 0, 0, 0) if initial is None else initial.stride()
    with device.guard(part):
        _favor.prefix_kernel[grid(batch * heads * blocks)](
            part, initial, total, decay, starts, heads, group, blocks, spans, count, columns, BLOCK=block
        )


@dataclass(frozen=True)
class Levels:
    """Of the lines that walk and of those that they see, (B, G, length); and of the states that walks begin with, (spans, B, G)."""

    x: Tensor
    y: Tensor
    before: Tensor


def outputs(call: Call, x: Lines, y: Lines, z: Lines, at: Levels, start: State, out: Tensor, *, eps: float | None = None) -> Tensor | None:
    """Fill `out`; with `eps` divided by the denominators, which are returned without it."""
    b, h, m, e = out.shape
    like: dict[str, Any] = {"dtype": torch.float32, "device": out.device}
    bottom = None if eps is None else torch.empty((b, h, m), **like)
    if out.numel() == 0:
        return bottom
    partial = out if out.dtype == torch.float32 or call.phi.count <= call.block else torch.empty(out.shape, **like)
    spans, start = call.spans(m), _spanned(start, call.spans(m))
    assert start.state is not None
    with device.guard(out):
        _favor_walks.out_kernel[grid(spans * b * h)](
            x.tensor,
            y.tensor,
            z.tensor,
            call.phi.projection,
            x.largest,
            y.largest,
            at.x,
            at.y,
            z.factor,
            at.before,
            start.state,
            start.side,
            out,
            partial,
            bottom,
            strides(x.tensor),
            strides(y.tensor),
            strides(z.tensor),
            call.phi.projection.stride(),
            start.state.stride(),
            (0, 0, 0, 0) if start.side is None else start.side.stride(),
            call.heads,
            (call.group(x.tensor), call.group(y.tensor), call.group(z.tensor), call.heads // call.key_heads, call.group(start.state, 2)),
            spans,
            call.span,
            m,
            y.tensor.shape[2],
            call.phi.count,
            call.phi.root,
            call.phi.epsilon,
            eps or 0.0,
            **call.walked(x.width, e),
        )
    return bottom


def gradients(call: Call, x: Lines, y: Lines, z: Lines, own: Lines, at: Levels, start: State, out: Tensor, *, norm: bool) -> None:
    """Fill `out`, (B, H, length, width): the gradient of what `own` has features of, where z has those of the lines that x sees."""
    b, h, m, d = out.shape
    if out.numel() == 0:
        return
    partial = out
    if out.dtype != torch.float32 and call.phi.count > call.block:
        partial = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    spans, start = call.spans(m), _spanned(start, call.spans(m))
    assert start.state is not None
    assert start.side is not None
    with device.guard(out):
        _favor_walks.gradient_kernel[grid(spans * b * h)](
            x.tensor,
            y.tensor,
            z.tensor,
            own.tensor,
            call.phi.projection,
            z.largest,
            own.largest,
            at.x,
            at.y,
            x.factor,
            y.factor,
            x.weight,
            y.weight,
            at.before,
            start.state,
            start.side,
            out,
            partial,
            strides(x.tensor),
            strides(y.tensor),
            strides(z.tensor),
            strides(own.tensor),
            call.phi.projection.stride(),
            start.state.stride(),
            start.side.stride(),
            call.heads,
            (
                *map(call.group, (x.tensor, y.tensor, z.tensor)),
                call.heads // call.key_heads,
                call.group(start.state, 2),
                call.group(own.tensor),
            ),
            spans,
            call.span,
            m,
            y.tensor.shape[2],
            call.phi.count,
            call.phi.root,
            call.phi.epsilon,
            NORM=norm,
            **call.walked(d, x.width),
        )


def _spanned(start: State, spans: int) -> State:
    """With the axis of spans: where one state serves them all, of stride 0."""
    assert start.state is not None
    if start.state.ndim == 5:
        return start
    side = None if start.side is None else start.side.expand(spans, *start.side.shape)
    return replace(start, state=start.state.expand(spans, *start.state.shape), side=side)
