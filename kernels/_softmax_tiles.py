"""Tiles worth trying for the softmax loop, best guess first.

The order follows what public kernels measured as fastest (FlexAttention's and FlashAttention's tables for A100 and H100); the
offline compile strikes out what spills or does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType

from triton_attn.kernels._softmax_choice import BACKWARD_KEY, BACKWARD_QUERY, FORWARD, SPLIT
from triton_attn.kernels._softmax_launch import MODULES
from triton_attn.tiles import COMMON_KEYS, Key, Space, Tile, every_key, ranges


def _wide_operands(key: Key) -> Sequence[Tile]:
    """float32 and tf32: half the elements fit; exact float32 has no tensor cores, and its products are unrolled into registers."""
    if key.operands == "tf32" or key.width <= 32:
        return tuple(ranges((64, 32, 16), (32, 16), (4, 8), (2, 1)))
    rows = (32, 16) if key.width <= 128 else (16,)
    return tuple(ranges(rows, (32, 16) if key.width <= 64 else (16,), (4, 8), (2, 1)))


def _laden(key: Key, *, backward: bool) -> Sequence[Tile]:
    """A mask, padding and dropout beside the loop take the registers of half a tile, of more in the backward pass."""
    rows = {32: (128, 64), 64: (64, 32), 128: (32, 16) if backward else (64, 32), 256: (16,) if backward else (32, 16)}
    return tuple(ranges(rows[key.width], (32, 16), (8, 4), (2, 1)))


def _forward_sm80(key: Key) -> Sequence[Tile]:
    if key.operands != "16bit":
        return _wide_operands(key)
    if not key.plain:
        return _laden(key, backward=False)
    if key.width <= 64:
        return tuple(ranges((128, 64), (64, 32), (4, 8), (3, 2)))
    if key.width <= 128:
        return tuple(ranges((128, 64), (64, 32), (8, 4), (3, 2)))
    return tuple(ranges((64, 32), (32, 16), (8, 4), (2, 1)))


def _forward_sm90(key: Key) -> Sequence[Tile]:
    if key.operands != "16bit":
        return _wide_operands(key)
    if not key.plain:
        return _laden(key, backward=False)
    keys = (128, 64, 32) if key.width <= 128 else (64, 32)
    return tuple(ranges((128, 64), keys, (8, 4), (2, 3, 1)))


def _forward_descriptors(key: Key) -> Sequence[Tile]:
    # warp specialisation wants 4 warps, which it triples; unmeasured, so it comes last
    return (*_forward_sm90(key), Tile(128, 128, 4, 2, warp_specialize=True), Tile(128, 64, 4, 2, warp_specialize=True))


def _backward_query(key: Key, most_rows: int) -> Sequence[Tile]:
    if key.operands != "16bit":
        return _wide_operands(key)
    if not key.plain:
        return _laden(key, backward=True)
    rows = (128, 64, 32) if key.width <= 128 else tuple(rows for rows in (128, 64, 32) if rows <= most_rows)
    return tuple(ranges(rows, (64, 32) if key.width <= 128 else (32, 16), (8, 4), (2, 1)))


def _backward_key(key: Key, most_keys: int) -> Sequence[Tile]:
    if key.operands != "16bit":
        return _wide_operands(key)
    if not key.plain:
        return _laden(key, backward=True)
    # many keys first: they are the rows of every product here, and Hopper's instruction takes 64 of them
    keys = (128, 64, 32) if key.width <= 128 else tuple(keys for keys in (32, 16) if keys <= most_keys)
    return tuple(tile for columns in keys for tile in ranges((64, 32), (columns,), (8, 4), (2, 1)))


def _split(key: Key) -> Sequence[Tile]:
    """The fewest rows that a product has: the call is read from memory, and what it lacks is programs."""
    if key.operands != "16bit":
        return tuple(ranges((16,), (32, 16), (4, 8), (2, 1)))
    return tuple(ranges((16,), (64, 32) if key.width <= 128 else (32, 16), (4, 8), (3, 2, 1)))


def _first_split(key: Key) -> Tile:
    return Tile(16, 32 if key.operands == "16bit" else 16, 4, 1)


def _first(key: Key) -> Tile:
    """Small enough for 99 KiB of shared memory at any width."""
    if key.operands != "16bit":
        return Tile(16, 16, 4, 1)
    return Tile(64, 32, 4, 1) if key.width <= 128 else Tile(32, 32, 4, 1)


def by_pointers(pattern: ModuleType, *, dense: bool = False) -> dict[str, Space]:
    """The tile spaces of a pattern's launches; its module counts for their hash. Dense attention has splits and every key."""
    made = partial(Space, first=_first, modules=(*MODULES, pattern), entries=every_key if dense else lambda: COMMON_KEYS)
    spaces = {
        FORWARD: made({(8, 0): _forward_sm80, (9, 0): _forward_sm90}),
        BACKWARD_QUERY: made({(8, 0): partial(_backward_query, most_rows=64), (9, 0): partial(_backward_query, most_rows=128)}),
        BACKWARD_KEY: made({(8, 0): partial(_backward_key, most_keys=16), (9, 0): partial(_backward_key, most_keys=32)}),
    }
    return {**spaces, SPLIT: made({(8, 0): _split}, first=_first_split)} if dense else spaces


def by_descriptors(pattern: ModuleType) -> dict[str, Space]:
    """The same of the forward that reads by tensor descriptors."""
    return {FORWARD: Space({(9, 0): _forward_descriptors}, _first, (*MODULES, pattern))}
