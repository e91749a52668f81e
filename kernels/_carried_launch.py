"""The carried state from the host: cut time into spans, choose tiles, launch. No tensor is copied, whatever its strides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_attn import device
from triton_attn.kernels import _carried, _features, _grid
from triton_attn.kernels._grid import grid
from triton_attn.tiles import WIDEST_TF32, WIDTHS, Key, Tile, bucket

MODULES = (_carried, _features, _grid)
FORWARD, BACKWARD_QUERY, BACKWARD_KEY = "forward", "backward_query", "backward_key"
LIKE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Operand:
    """A tensor (B, heads, [members,] length, width) as x, y or z: its features, times a number, times a factor for each line."""

    tensor: Tensor
    feature_map: str = "identity"
    scale: float = 1.0
    factor: Tensor | None = None  # (B, H, length), contiguous
    weight: Tensor | None = None  # likewise, of the side sum
    ones: bool = False

    @property
    def width(self) -> int:
        return 1 if self.ones else self.tensor.shape[-1]

    @property
    def padded(self) -> int:
        return padded(self.width)

    @property
    def halves(self) -> int:
        return 2 if self.feature_map == "crelu" else 1

    @property
    def features(self) -> int:
        return self.halves * self.width

    @property
    def map(self) -> Any:
        return _features.one if self.ones else _features.MAPS[self.feature_map][0]

    @property
    def slope(self) -> Any:
        return _features.MAPS[self.feature_map][1]


@dataclass(frozen=True)
class State:
    """(B, heads, features of y, features of z) and the side sum beside it (B, heads, features); with spans also in front."""

    state: Tensor | None
    side: Tensor | None = None
    lead: int = 1  # of how many heads only the first has it

    @property
    def transposed(self) -> State:
        return replace(self, state=None if self.state is None else self.state.mT)


@dataclass(frozen=True)
class Call:
    """What every launch of one call shares."""

    heads: int
    padding: Tensor | None
    tile: Tile
    like: torch.dtype
    causal: bool
    width: int  # of the wider side of a state, padded
    reverse: bool = False

    @property
    def span(self) -> int:
        """Tokens of one program: long against a state that is written and read for each, and the same for every batch."""
        return max(self.tile.block_m * self.tile.block_m // 4, 4 * self.width)

    def spans(self, length: int) -> int:
        return max(1, triton.cdiv(length, self.span))

    def constants(self, y: Operand, z: Operand) -> dict[str, Any]:
        return {
            "MAP_Y": y.map,
            "MAP_Z": z.map,
            "WIDTH_Y": y.width,
            "WIDTH_Z": z.width,
            "PADDED_Y": y.padded,
            "PADDED_Z": z.padded,
            "FEATURES_Y": y.features,
            "FEATURES_Z": z.features,
            "BLOCK_Y": y.padded * y.halves,
            "BLOCK_Z": self.columns(z),
            "BLOCK": self.tile.block_m,
            "LIKE": LIKE[self.like],
            "PRECISION": "tf32" if operands(self.like, y.padded, z.padded) == "tf32" else "ieee",
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            "enable_fp_fusion": True,
        }

    def columns(self, z: Operand) -> int:
        return min(self.tile.block_n, z.padded)

    def blocks(self, z: Operand) -> int:
        return z.padded * z.halves // self.columns(z)

    def group(self, tensor: Tensor) -> int:
        """How many heads of the call are one of the tensor's, or members of one."""
        return self.heads // tensor.shape[1] if tensor.shape[1] else 1


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Of batch, heads, lines and columns, and last of the members of a head, where it has some: others would cost registers."""
    batch, head, *member, line, column = tensor.stride()
    return batch, head, line, column, *member


def operands(dtype: torch.dtype, *widths: int) -> str:
    """How products are computed. float16 goes by tf32: its own exponent is too short for a state."""
    if dtype == torch.bfloat16:
        return "16bit"
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "float32" if exact or max(widths) > WIDEST_TF32 else "tf32"  # tables know no wider tf32


def key_of(query: Tensor, value: Tensor, feature_map: str, plain: bool, causal: bool) -> Key:
    """What this call's tiles depend on; its width is that of features or values."""
    q = Operand(query, feature_map)
    width = max(WIDTHS[0], q.halves * q.padded, padded(value.shape[-1]))
    lengths = (bucket(query.shape[-2]), bucket(value.shape[-2]))
    return Key(operands(query.dtype, width), width, plain, lengths, causal)


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def sums(call: Call, y: Operand, z: Operand, initial: State) -> tuple[State, State]:
    """(the states before each span of y's length, the state after all of them)."""
    batch, length = y.tensor.shape[0], y.tensor.shape[-2]
    spans, heads = call.spans(length), call.heads
    padding = None if call.reverse else call.padding  # backwards the sums are of queries
    like: dict[str, Any] = {"dtype": torch.float32, "device": y.tensor.device}
    state = torch.empty(spans, batch, heads, y.features, z.features, **like)
    beside = torch.empty(spans, batch, heads, y.features, **like)
    total, beside_total = torch.empty(state.shape[1:], **like), torch.empty(beside.shape[1:], **like)
    with device.guard(y.tensor):
        _carried.sum_kernel[grid(spans * call.blocks(z) * batch * heads)](
            y.tensor,
            z.tensor,
            y.factor,
            z.factor,
            y.weight,
            padding,
            state,
            beside,
            strides(y.tensor),
            strides(z.tensor),
            (0, 0) if padding is None else padding.stride(),
            heads,
            (call.group(y.tensor), call.group(z.tensor)),
            call.blocks(z),
            spans,
            call.span,
            length,
            y.scale,
            z.scale,
            REVERSE=call.causal and call.reverse,
            **call.constants(y, z),
        )
        for part, whole, first in ((state, total, initial.state), (beside[..., None], beside_total[..., None], _column(initial.side))):
            prefix(part, whole, first, initial.lead)
    return State(state, beside), State(total, beside_total)


def prefix(part: Tensor, total: Tensor, initial: Tensor | None, lead: int) -> None:
    spans, batch, heads, rows, columns = part.shape
    count, block = rows * columns, 512
    blocks = triton.cdiv(count, block)
    starts = (0, 0, 0, 0) if initial is None else initial.stride()
    with device.guard(part):
        _carried.prefix_kernel[grid(batch * heads * blocks)](
            part, initial, total, starts, heads, lead, blocks, spans, count, columns, BLOCK=block
        )


def _column(side: Tensor | None) -> Tensor | None:
    return None if side is None else side[..., None]


def walk(
    call: Call,
    x: Operand,
    y: Operand,
    z: Operand,
    out: Tensor,
    state: State,
    *,
    side: Any = _carried.NO_SIDE,
    own: Operand | None = None,
    out_scale: float = 1.0,
    divide: bool = False,
    eps: float = 0.0,
    last: State | None = None,
) -> None:
    """Fill `out`, as many lines as x has and columns as z; `own`, what z are features of, asks for its gradient. `last` is filled too."""
    batch, length = x.tensor.shape[0], x.tensor.shape[-2]
    spans, last = call.spans(length), last or State(None)
    # where the state is written, those heads write it that are the first of their group
    sharing = _sharing(state, call) if last.state is None else call.group(y.tensor)
    lead = state.lead if last.state is None else sharing
    own_tensor = z.tensor if own is None else own.tensor
    (start, start_strides), (beside, beside_strides) = _spanned(state.state, 5), _spanned(state.side, 4)
    with device.guard(x.tensor):
        _carried.walk_kernel[grid(spans * call.blocks(z) * batch * call.heads)](
            x.tensor,
            y.tensor,
            z.tensor,
            x.factor,
            y.factor,
            z.factor,
            x.weight,
            y.weight,
            call.padding if call.reverse else None,
            None if call.reverse else call.padding,
            own_tensor,
            out,
            start,
            beside,
            last.state,
            last.side,
            strides(x.tensor),
            strides(y.tensor),
            strides(z.tensor),
            (0, 0) if call.padding is None else call.padding.stride(),
            strides(own_tensor),
            strides(out),
            start_strides,
            beside_strides,
            call.heads,
            (*map(call.group, (x.tensor, y.tensor, z.tensor)), sharing, call.group(own_tensor), call.group(out)),
            lead,
            call.blocks(z),
            spans,
            call.span,
            length,
            y.tensor.shape[-2],
            x.scale,
            y.scale,
            z.scale,
            out_scale,
            eps,
            MAP_X=x.map,
            SLOPE=None if own is None else own.slope,
            CAUSAL=call.causal,
            REVERSE=call.causal and call.reverse,
            SIDE=side,
            DIVIDE=divide,
            **call.constants(y, z),
        )


def _spanned(part: Tensor | None, axes: int) -> tuple[Tensor | None, tuple[int, ...]]:
    """A state and its strides, that of spans first: 0 where one state serves them all."""
    if part is None:
        return None, (0,) * axes
    return part, part.stride() if part.ndim == axes else (0, *part.stride())


def _sharing(state: State, call: Call) -> int:
    """How many heads have one state."""
    if state.state is not None:
        return call.heads // state.state.shape[-3]
    return 1 if state.side is None else call.heads // state.side.shape[-2]
