"""Hydra attention with a head for each feature, from the host: sums over spans, then one pass over the queries or keys."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from triton_attn import device
from triton_attn.kernels import _carried, _favor, _grid, _meta_hydra
from triton_attn.kernels._carried_launch import BACKWARD_KEY, BACKWARD_QUERY, FORWARD, prefix, strides
from triton_attn.kernels._grid import grid
from triton_attn.tiles import Key, Space, Tile, Tiles, bucket, chosen_tile

POINTERS = "meta_hydra_attention/pointers"
WIDTHS = (64, 256)  # wider heads are refused
BLOCKS_OF_SPAN = 16  # a span is read once and leaves one line


@dataclass(frozen=True)
class _Call:
    """What the launches of one call share."""

    tile: Tile
    width: int
    causal: bool
    padding: Tensor | None
    reverse: bool = False

    @property
    def span(self) -> int:
        return self.tile.block_m * BLOCKS_OF_SPAN

    def spans(self, length: int) -> int:
        return max(1, triton.cdiv(length, self.span))

    @property
    def hidden(self) -> tuple[Any, ...]:
        return (0, 0) if self.padding is None else self.padding.stride()

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "WIDTH": self.width,
            "PADDED": triton.next_power_of_2(max(self.width, 2)),  # of a block of one Triton's interpreter drops `other=0`
            "BLOCK": self.tile.block_m,
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            "enable_fp_fusion": True,
            # or ptxas spills a few registers to make room for another block
            "maxnreg": 255,
        }


@dataclass(frozen=True)
class _Sums:
    """What spans begin with, and how many lines lie between those of two spans: none where nothing is causal, and all see all."""

    sums: Tensor
    step: int = 0


def _call(launch: str, query: Tensor, key: Tensor, causal: bool, padding: Tensor | None, tile: Tiles) -> _Call:
    chosen = chosen_tile(tile, launch, SPACES, POINTERS, key_of(query, key, causal), query)
    padding = None if padding is None or padding.numel() == 0 else padding.view(torch.uint8)
    return _Call(chosen, query.shape[-1], causal, padding)


def _sums(call: _Call, x: Tensor, z: Tensor, initial: Tensor | None = None) -> tuple[_Sums, Tensor]:
    """(the sums of u(x) * z that each span begins with, the sum of all), from an initial one (B, H, D) on."""
    b, h, n = x.shape[0], x.shape[1], x.shape[-2]
    spans = call.spans(n)
    parts = torch.empty(spans, b, h, call.width, dtype=torch.float32, device=x.device)
    total = torch.empty(parts.shape[1:], dtype=torch.float32, device=x.device)
    if parts.numel():
        with device.guard(x):
            _meta_hydra.sum_kernel[grid(spans * b * h)](
                x, z, None if call.reverse else call.padding, parts, strides(x), strides(z), call.hidden, h, _members(x), spans,
                call.span, n, REVERSE=call.causal and call.reverse, **call.constants,
            )  # fmt: skip
        prefix(parts[..., None, :], total[..., None, :], None if initial is None else initial[..., None, :], 1)
    return _Sums(parts, b * h) if call.causal else _Sums(total), total


def _members(x: Tensor) -> int:
    return x.shape[2] if x.ndim == 5 else 1


def _queries(call: _Call, query: Tensor, key: Tensor, value: Tensor, before: _Sums, grad: Tensor | None, out: Tensor) -> None:
    """Fill `out`, (B, H, R, M, D) like queries and their gradient: the output, or with `grad` the gradient of queries."""
    b, h, r, m, _ = query.shape
    if out.numel():
        spans = call.spans(m)
        with device.guard(query):
            _meta_hydra.query_kernel[grid(spans * b * h)](
                query, key, value, grad, call.padding, before.sums, out, strides(query), strides(key), strides(value),
                strides(query if grad is None else grad), strides(out), call.hidden, h, r, spans, call.span, before.step, m,
                CAUSAL=call.causal, **call.constants,
            )  # fmt: skip


def meta_hydra_attention(
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    return_state: bool = False,
    tile: Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward by pointers: sm_80 and up. A head is summed once, whatever the number of branches."""
    call = _call(FORWARD, query_branches, key, causal, key_padding_mask, tile)
    out = torch.empty(query_branches.shape, dtype=query_branches.dtype, device=query_branches.device)
    before, state = _sums(call, key, value)
    _queries(call, query_branches.transpose(1, 2), key, value, before, None, out.transpose(1, 2))
    return (out, state) if return_state else out


def meta_hydra_attention_backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    state: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
    tile: Tiles = None,
) -> tuple[Tensor, ...]:
    """Gradients of queries, key and value; an empty tensor where not needed."""
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    query, grad = query_branches.transpose(1, 2), grad_out.transpose(1, 2)
    found = [x.new_empty(x.shape) if need else x.new_empty(0) for x, need in zip((query_branches, key, value), needs, strict=True)]
    if needs[0]:
        call = _call(BACKWARD_QUERY, query_branches, key, causal, key_padding_mask, tile)
        before = _sums(call, key, value)[0] if causal else _Sums(state)
        _queries(call, query, key, value, before, grad, found[0].transpose(1, 2))
    if not any(needs[1:]):
        return tuple(found)
    # from the end back to the start: what later queries ask of a key
    call = replace(_call(BACKWARD_KEY, query_branches, key, causal, key_padding_mask, tile), reverse=True)
    after, _ = _sums(call, query, grad, grad_state)
    (b, h, n, _), grad_key, grad_value = key.shape, *(x if need else None for x, need in zip(found[1:], needs[1:], strict=True))
    if key.numel():
        spans = call.spans(n)
        with device.guard(key):
            _meta_hydra.key_kernel[grid(spans * b * h)](
                key, query, grad, value, call.padding, after.sums, grad_key, grad_value, strides(key), strides(query), strides(grad),
                strides(value), call.hidden, h, _members(query), spans, call.span, after.step, n,
                CAUSAL=causal, **call.constants,
            )  # fmt: skip
    return tuple(found)


def key_of(query: Tensor, key: Tensor, causal: bool) -> Key:
    """What a call's tiles depend on: how inputs are held, how wide a head is, how long queries and keys are."""
    width = next((width for width in WIDTHS if query.shape[-1] <= width), WIDTHS[-1])
    lengths = (bucket(query.shape[-2]), bucket(key.shape[-2]))
    return Key("16bit" if query.element_size() == 2 else "float32", width, False, lengths, causal)


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """The same from a call's tensors."""
    return key_of(tensors["query_branches"], tensors["key"], bool(options.get("causal")))


def _candidates(key: Key) -> Sequence[Tile]:
    """Lines at a time, and warps: a thread holds some 16 numbers of each tile. Unmeasured."""
    if key.width == 64:
        return Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(8, 16, 4, 1)
    return Tile(16, 16, 8, 1), Tile(8, 16, 8, 1), Tile(8, 16, 4, 1), Tile(4, 16, 4, 1)


def _entries() -> Iterator[Key]:
    return (Key(operands, width, False) for operands, width in product(("16bit", "float32"), WIDTHS))


_MODULES = (_meta_hydra, _favor, _carried, _grid, sys.modules[__name__])
_SPACE = Space({(8, 0): _candidates}, lambda key: _candidates(key)[-1], _MODULES, _entries)
SPACES = {FORWARD: _SPACE, BACKWARD_QUERY: _SPACE, BACKWARD_KEY: _SPACE}
