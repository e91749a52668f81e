"""Tiles: what a kernel may be launched with, and which tile a call gets. Nothing is timed here.

A call takes its tile from the first of: explicit argument, user table, table of this very device, table of its capability,
the kernel's `first`. Tables are JSON, hold winners only, and are checked when read: a damaged one raises `TableError`, and a call
goes on to the next table with a warning.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from triton_attn import device

SCHEMA = 1
LARGEST_TABLE = 1 << 20
SHIPPED = Path(__file__).parent / "tables"


class TableError(ValueError):
    """A tile table that cannot be trusted: the message names file, entry and reason."""


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


@dataclass(frozen=True, eq=False)
class Space:
    """The tiles of one launch: per capability those worth trying, best guess first, and one that fits every supported GPU."""

    candidates: Mapping[tuple[int, int], Callable[[Key], Sequence[Tile]]]
    first: Callable[[Key], Tile]
    modules: tuple[ModuleType, ...]
    entries: Callable[[], Iterable[Key]] = lambda: every_key()  # the keys that tables hold

    def of(self, capability: tuple[int, int], key: Key) -> Sequence[Tile]:
        """Candidates for a capability: its own, or those of the nearest older one, as sm_86 takes sm_80's."""
        older = max((known for known in self.candidates if known <= capability), default=None)
        return self.candidates[older](key) if older else (self.first(key),)


def ranges(block_m: Sequence[int], block_n: Sequence[int], warps: Sequence[int], stages: Sequence[int]) -> Iterator[Tile]:
    """Every tile of a product of ranges, in the order given."""
    for m, n, w, s in product(block_m, block_n, warps, stages):
        yield Tile(m, n, w, s)


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes of a multiprocessor, as the assembler reports it."""

    registers: int
    spilled: int  # bytes of stack
    shared: int  # bytes per block
    warps: int
    tensor_core: int  # wgmma or mma instructions
    asynchronous: int  # cp.async or bulk copies
    atomics: int = 0
    specialised: bool = False  # setmaxnreg present


def illegal(usage: Usage, limits: device.Limits) -> str:
    """Why a compiled tile may not be used on such a GPU; empty if it may. Tuner, tables and tests share this one rule."""
    if usage.shared > limits.shared_per_block:
        return f"needs {usage.shared} bytes of shared memory, a block has {limits.shared_per_block}"
    if usage.spilled:
        return f"spills {usage.spilled} bytes"
    if usage.atomics:
        return f"has {usage.atomics} atomic operations, whose order decides the last bits"
    return ""


def blocks_per_multiprocessor(usage: Usage, limits: device.Limits) -> int:
    """How many blocks are resident at once: the least of what registers, threads and shared memory allow."""
    per_warp = -(-usage.registers * 32 // 256) * 256
    # a warp's registers lie in one of four partitions
    by_registers = 4 * (limits.registers // 4 // max(per_warp, 256)) // usage.warps
    by_shared = limits.shared_per_multiprocessor // (usage.shared + 1024)
    return min(by_registers, by_shared, limits.threads // (32 * usage.warps), limits.blocks)


def source_hash(modules: Sequence[ModuleType]) -> str:
    """Of the sources without comments, docstrings and layout: a changed comment voids no table, a changed kernel does.

    Unparsed, because what `ast.dump` prints differs between Python versions.
    """
    digest = hashlib.sha256()
    for module in modules:
        assert module.__file__ is not None
        tree = ast.parse(Path(module.__file__).read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body[0].value.value = None
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Found:
    """A tile and where it came from; `stale` if its kernel has changed since."""

    tile: Tile
    source: str
    stale: bool = False


Tiles = Tile | Mapping[str, Tile] | None


def chosen_tile(tile: Tiles, launch: str, spaces: Mapping[str, Space], name: str, key: Key, tensor: Any) -> Tile:
    """The tile of one launch of the kernel `name` ("attention/pointers"): asked for, or from the tables of a tensor's device."""
    if isinstance(tile, Tile):
        return tile
    if tile is not None and launch in tile:
        return tile[launch]
    if device.interpreting() and not tensor.is_cuda:
        return INTERPRETED
    if not tensor.is_cuda:
        return spaces[launch].first(key)
    return look_up(f"{name}/{launch}", spaces[launch], key, device.profile(tensor.device.index)).tile


@functools.cache
def _look_up(launch: str, space: Space, key: Key, profile: device.Profile) -> Found:
    user = _table_folder or device.user_tables()
    architecture = device.architecture(profile.capability)
    folders = [(user, "user table")] if user else []
    allowed = {*space.of(profile.capability, key), space.first(key)}
    for folder, origin in [*folders, (SHIPPED, "shipped table")]:
        for stem in (slug(profile.name), architecture):
            path = folder / f"{stem}.json"
            try:
                entry = read(path).get(launch) if path.is_file() else None
            except (TableError, OSError) as error:
                warnings.warn(f"tile table left out: {error}", stacklevel=2)
                continue
            near = _nearest(entry["tiles"], key) if entry else ""
            if not entry or not near:
                continue
            if entry["tiles"][near] not in allowed:
                warnings.warn(f"{path}: {launch} {near}: {entry['tiles'][near]} is none of the kernel's tiles", stacklevel=2)
                continue
            told = entry["evidence"] if near in (str(key), str(key.anywhere)) else f"{entry['evidence']}, for {near}"
            return Found(entry["tiles"][near], f"{origin} {path.name} ({told})", entry["hash"] != source_hash(space.modules))
    return Found(space.first(key), "first of its tile space")


def _nearest(keys: Iterable[str], key: Key) -> str:
    """Which key of a table serves a call: its own, the nearest in length, the one for any length, or none."""
    apart = {text: Key.parse(text).far_from(key) for text in keys}
    near = min(apart, key=apart.__getitem__, default="")
    if near and math.isfinite(apart[near]):
        return near
    return str(key.anywhere) if str(key.anywhere) in apart else ""


def look_up(launch: str, space: Space, key: Key, profile: device.Profile) -> Found:
    """Tile, source and staleness for a device, which need not be here. A tile that is not of the space is as good as none."""
    return _look_up(launch, space, key, profile)


def slug(name: str) -> str:
    """A device name as a file stem: "NVIDIA H200" -> "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@functools.cache
def read(path: Path) -> dict[str, Any]:
    """The launches of a table, every entry checked; TableError otherwise."""
    if path.stat().st_size > LARGEST_TABLE:
        raise TableError(f"{path}: larger than {LARGEST_TABLE} bytes")
    try:
        table = json.loads(path.read_text(), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path}: {error}") from error
    if not isinstance(table, dict) or table.get("schema") != SCHEMA or not isinstance(table.get("launches"), dict):
        raise TableError(f"{path}: not a tile table of schema {SCHEMA}")
    launches: dict[str, Any] = {}
    for launch, entry in table["launches"].items():
        try:
            tiles = {str(Key.parse(key)): Tile.parse(text) for key, text in entry["tiles"].items()}
            launches[launch] = {"hash": str(entry["hash"]), "evidence": str(entry["evidence"]), "tiles": tiles}
            launches[launch] |= {"compilers": [str(name) for name in entry["compilers"]]} if "compilers" in entry else {}
            if "milliseconds" in entry:
                launches[launch]["milliseconds"] = {str(Key.parse(key)): float(time) for key, time in entry["milliseconds"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TableError(f"{path}: {launch}: {error}") from error
    return launches


def write(path: Path, launches: Mapping[str, Mapping[str, Any]], made: Mapping[str, Any]) -> None:
    """Write a table so that a reader never sees half of one."""
    tidy = {
        launch: {**entry, "tiles": {str(Key.parse(key)): str(Tile.parse(str(tile))) for key, tile in entry["tiles"].items()}}
        for launch, entry in sorted(launches.items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"schema": SCHEMA, "made": made, "launches": tidy}, indent=1, allow_nan=False) + "\n")
    partial.replace(path)
    read.cache_clear()
    _look_up.cache_clear()


_table_folder: Path | None = None


def use_tables(folder: Path | None) -> None:
    """Look for the user's tables there from now on, in this process; None: where they are by default."""
    global _table_folder
    _table_folder = folder
    read.cache_clear()
    _look_up.cache_clear()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key stands twice among {sorted(keys)}")
    return dict(pairs)
