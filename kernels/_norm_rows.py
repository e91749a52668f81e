"""What the kernels that hold whole rows in registers share: how rows are read, tiles, constants."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triton_attn.tiles import NORM_KEYS, Key, Space, Tile, bucket

FORWARD, BACKWARD = "forward", "backward"
WIDTHS = (256, 1024, 4096)
WIDEST = WIDTHS[-1]


@triton.jit
def rows_of(x, row, live, column, length, strides, D: tl.constexpr):
    """Some rows, counted through batch and time, in float32; 0 in those that are not live."""
    start = (row // length) * strides[0] + (row % length) * strides[1]
    seen = live[:, None] & (column < D)[None, :]
    return tl.load(x + start[:, None] + column[None, :] * strides[2], mask=seen, other=0.0).to(tl.float32)


def constants(tile: Tile, d: int) -> dict[str, Any]:
    """What a launch over rows of width `d` is compiled with."""
    return {
        "D": d,
        "BLOCK_D": triton.next_power_of_2(max(d, 2)),  # of a block of one Triton's interpreter drops `other=0`
        "BLOCK_R": tile.block_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def key_of(x: Tensor) -> Key:
    """What a call's tiles depend on: how inputs are held, the width of a row, how many rows there are."""
    width = next((width for width in WIDTHS if x.shape[-1] <= width), WIDEST)
    return Key("16bit" if x.element_size() == 2 else "float32", width, False, (bucket(x.shape[0] * x.shape[1]),))


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """The same from a call's tensors."""
    return key_of(tensors["x"])


def _candidates(launch: str, key: Key) -> Sequence[Tile]:
    """(rows at a time, times, warps), best guess first; only backward programs go on to further rows. Unmeasured."""
    widest = {
        (FORWARD, 256): ((8, 2, 4), (4, 2, 4)),
        (FORWARD, 1024): ((4, 2, 4), (2, 2, 4)),
        (FORWARD, 4096): ((2, 2, 8),),
        (BACKWARD, 256): ((8, 4, 4), (4, 8, 4)),
        (BACKWARD, 1024): ((4, 8, 8), (2, 16, 4)),
        (BACKWARD, 4096): ((2, 16, 8),),
    }
    return tuple(Tile(rows, times, warps, 1) for rows, times, warps in widest[launch, key.width])


def spaces(module: ModuleType) -> dict[str, Space]:
    """The tile spaces of a kernel file. Nothing here differs between capabilities: no tensor cores, no asynchronous copies."""
    hashed = (module, sys.modules[__name__])

    def of(launch: str) -> Space:
        return Space({(8, 0): partial(_candidates, launch)}, lambda key: _candidates(launch, key)[-1], hashed, lambda: NORM_KEYS)

    return {launch: of(launch) for launch in (FORWARD, BACKWARD)}
