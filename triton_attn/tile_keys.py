"""What tables are made of: a tile, and the key it is found by. Both are read back from text with every range checked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product


@dataclass(frozen=True, order=True)
class Tile:
    """`block_m` queries by `block_n` keys, or channels by steps, how the compiler schedules them, and how many
    programs share the keys of a forward call.

    Tables leave `splits` at 1: there the launcher counts from the sizes of the call.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    warp_specialize: bool = False
    splits: int = 1

    def __str__(self) -> str:
        riders = f"{' ws' if self.warp_specialize else ''}{f' /{self.splits}' if self.splits > 1 else ''}"
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}{riders}"

    @classmethod
    def parse(cls, text: str) -> Tile:
        """The inverse of str; ValueError on anything else, powers of two and ranges included."""
        found = re.fullmatch(r"([1-9][0-9]{0,2})x([1-9][0-9]{0,2}) w([0-9]) s([0-9])( ws)?(?: /([1-9][0-9]{0,2}))?", text)
        if found is None:
            raise ValueError(f"tile is {text!r}; allowed: like '128x64 w4 s3'")
        m, n, warps, stages = (int(found[i]) for i in range(1, 5))
        if {m, n} - {2, 4, 8, 16, 32, 64, 128, 256} or warps not in (1, 2, 4, 8) or not 1 <= stages <= 5:
            raise ValueError(f"tile is {text!r}; allowed: blocks 2 to 256 by powers of two, 1, 2, 4 or 8 warps, 1 to 5 stages")
        if found[6] == "1":
            raise ValueError(f"tile is {text!r}; allowed: splits from 2, or none")
        return cls(m, n, warps, stages, bool(found[5]), int(found[6] or 1))


INTERPRETED = Tile(16, 16, 4, 1)


@dataclass(frozen=True)
class Key:
    """What a tile depends on: how operands are held, the padded width, whether a mask, padding or dropout rides along, the buckets of
    the call's lengths (none: of any length), and whether it is causal."""

    operands: str  # "16bit", "float32" or "tf32"
    width: int
    plain: bool = True
    lengths: tuple[int, ...] = ()
    causal: bool = False  # tables without lengths serve both

    def __str__(self) -> str:
        lengths = f" {'x'.join(map(str, self.lengths))}" if self.lengths else ""
        return f"{self.operands} d{self.width}{lengths}{' causal' if self.causal else ''}{'' if self.plain else ' masked'}"

    @property
    def anywhere(self) -> Key:
        """The same for calls of any length, causal or not."""
        return Key(self.operands, self.width, self.plain)

    def far_from(self, other: Key) -> float:
        """By how many octaves the lengths differ; infinite where another key's tile is no guess for this one."""
        if self.anywhere != other.anywhere or self.causal != other.causal or len(self.lengths) != len(other.lengths):
            return math.inf
        octaves = [abs(math.log2(a / b)) for a, b in zip(self.lengths, other.lengths, strict=True)]
        return sum(octaves) if max(octaves, default=math.inf) <= FARTHEST else math.inf

    @classmethod
    def parse(cls, text: str) -> Key:
        """The inverse of str; ValueError on anything else."""
        found = re.fullmatch(r"(\w+ d\d+)( \d+(?:x\d+)*)?( causal)?( masked)?", text, re.ASCII)
        if found is not None:
            base, lengths = found[1] + (found[4] or ""), tuple(map(int, found[2].split("x"))) if found[2] else ()
            known = next((key for key in (*every_key(), *STATE_KEYS, *NORM_KEYS) if str(key) == base), None)
            if known is not None and all(bucket(length) == length for length in lengths) and (lengths or not found[3]):
                key = replace(known, lengths=lengths, causal=bool(found[3]))
                if str(key) == text:
                    return key
        raise ValueError(f"key is {text!r}; allowed: like '16bit d64', '16bit d64 masked' or '16bit d64 4096x4096 causal'")


FARTHEST = 2.0  # octaves: beyond, a tile tuned for another length is no better a guess than one for any
LEAST_BUCKET, LARGEST_BUCKET = 16, 1 << 24


def bucket(length: int) -> int:
    """The power of two that stands for a length, so that lengths of one octave share a tile."""
    return min(max(LEAST_BUCKET, 1 << (length - 1).bit_length() if length > 1 else 1), LARGEST_BUCKET)


OPERANDS = ("16bit", "float32", "tf32")
WIDTHS = (32, 64, 128, 256)  # narrower heads take the tiles of 32
WIDEST_TF32 = 128  # of a wider one every dK and dV tile that was tried spilled, so it is computed in exact float32


def every_key() -> Iterator[Key]:
    """Every key that a table holds."""
    for operands, width, plain in product(OPERANDS, WIDTHS, (True, False)):
        if operands != "tf32" or width <= WIDEST_TF32:
            yield Key(operands, width, plain)


# of patterns beside dense attention tables hold these; other calls take the first tile of their space
COMMON_KEYS = tuple(Key("16bit", width, plain) for width in (64, 128) for plain in (True, False))

# of a recurrence whose state has this padded width: what rides along costs it little, so tiles are chosen with everything
STATE_KEYS = tuple(Key(operands, width, False) for operands in ("16bit", "float32") for width in (16, 64, 256))

# of a norm whose rows have this padded width
NORM_KEYS = tuple(Key(operands, width, False) for operands in ("16bit", "float32") for width in (256, 1024, 4096))
