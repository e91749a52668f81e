"""Tiles worth trying for the carried state: `block_m` tokens of a chunk by `block_n` columns of the state that a program owns.

A state of (features, block_n) lives in registers, so wide heads take few columns; the offline compile strikes out what spills.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from types import ModuleType

from triton_attn.kernels._carried_launch import BACKWARD_KEY, BACKWARD_QUERY, FORWARD, MODULES
from triton_attn.tiles import OPERANDS, Key, Space, Tile


def _candidates(key: Key) -> Sequence[Tile]:
    if key.operands == "float32":  # no tensor cores: products are unrolled into registers
        return Tile(16, 16, 8, 1), Tile(16, 16, 4, 1), Tile(32, 16, 8, 1)
    tensor_cores = {
        ("16bit", 32): (Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)),
        ("16bit", 64): (Tile(64, 32, 4, 2), Tile(32, 32, 8, 1), Tile(32, 16, 4, 1)),
        ("16bit", 128): (Tile(32, 16, 4, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
        ("16bit", 256): (Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
        ("tf32", 32): (Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 16, 4, 1)),
        ("tf32", 64): (Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
        ("tf32", 128): (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
    }
    return tensor_cores[key.operands, key.width]


def _first(key: Key) -> Tile:
    """Small enough for 99 KiB of shared memory at any width."""
    return Tile(16, 16, 8 if key.width > (32 if key.operands == "float32" else 128) else 4, 1)


def _entries() -> Iterator[Key]:
    """The keys that tables hold: those whose states registers hold."""
    for operands, width, plain in product(OPERANDS, (32, 64, 128), (True, False)):
        if operands == "16bit" or width <= 64 or (operands == "tf32" and plain):
            yield Key(operands, width, plain)


def by_pointers(mechanism: ModuleType) -> dict[str, Space]:
    """The tile spaces of a mechanism's launches; its module counts for their hash."""
    space = Space({(8, 0): _candidates}, _first, (*MODULES, mechanism), _entries)
    return {FORWARD: space, BACKWARD_QUERY: space, BACKWARD_KEY: space}
