"""Tiles worth trying for FAVOR+: `block_m` tokens of a chunk by `block_n` features of a pass. Features of one pass live in registers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from triton_attn.kernels._carried_launch import BACKWARD_KEY, BACKWARD_QUERY, FORWARD
from triton_attn.kernels._favor_launch import MODULES
from triton_attn.tiles import OPERANDS, Key, Space, Tile

WIDEST = {"16bit": 128, "tf32": 64, "float32": 32}  # of wider ones every tile that was tried spilled


def _candidates(key: Key) -> Sequence[Tile]:
    if key.operands == "float32":  # no tensor cores: products are unrolled into registers
        return Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)
    tensor_cores = {
        ("16bit", 32): (Tile(64, 64, 8, 2), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
        ("16bit", 64): (Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
        ("16bit", 128): (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
        ("tf32", 32): (Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
        ("tf32", 64): (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    }
    return tensor_cores.get((key.operands, key.width), (_first(key),))


def _first(key: Key) -> Tile:
    """Small enough for 99 KiB of shared memory at any width."""
    return Tile(16, 16, 8 if key.width > (32 if key.operands == "float32" else 64) else 4, 1)


def _entries() -> Iterator[Key]:
    """The keys that tables hold. Hidden keys change no code."""
    for operands, width in product(OPERANDS, (32, 64, 128)):
        if width <= WIDEST[operands]:
            yield Key(operands, width)


_SPACE = Space({(8, 0): _candidates}, _first, MODULES, _entries)
SPACES = {FORWARD: _SPACE, BACKWARD_QUERY: _SPACE, BACKWARD_KEY: _SPACE}
