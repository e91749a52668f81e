"""Tiles worth trying for the softmax loop, best guess first.

The order follows what public kernels measured as fastest (FlexAttention's and FlashAttention's tables for A100 and H100); the
offline compile strikes out what spills or does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from triton_attn.kernels._softmax_launch import BACKWARD_KEY, BACKWARD_QUERY, FORWARD, MODULES
from triton_attn.tiles import Key, Space, Tile, ranges


def _forward(key: Key) -> Sequence[Tile]:
    if key.operands != "16bit":
        return tuple(ranges((64, 32, 16), (32, 16), (4, 8), (2, 1)))
    if key.width <= 64:
        return tuple(ranges((128, 64), (64, 32), (4, 8), (3, 2)))
    return tuple(ranges((128, 64), (64, 32), (8, 4), (3, 2)))


def _first(key: Key) -> Tile:
    return Tile(32, 16, 4, 1) if key.operands != "16bit" or key.width > 128 else Tile(64, 32, 4, 2)


_ANY = {(8, 0): _forward}
SPACES = {launch: Space(_ANY, _first, MODULES) for launch in (FORWARD, BACKWARD_QUERY, BACKWARD_KEY)}
DESCRIPTOR_SPACES = {FORWARD: Space({(9, 0): _forward}, _first, MODULES)}
