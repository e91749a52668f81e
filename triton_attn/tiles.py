"""Tiles: what a kernel may be launched with, and which tile a call gets. Nothing is timed here.

A call takes its tile from the first of: explicit argument, the user's tables, the shipped ones, the kernel's `first`; among tables
that of this very device counts before those of others of its capability, and these before the capability's own. Tables are JSON, hold
winners only, and are checked when read: a damaged one raises `TableError`, and a call goes on to the next table with a warning.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from triton_attn import device
from triton_attn.tile_keys import (
    COMMON_KEYS,
    INTERPRETED,
    LARGEST_BUCKET,
    LEAST_BUCKET,
    NORM_KEYS,
    OPERANDS,
    STATE_KEYS,
    WIDEST_TF32,
    WIDTHS,
    Key,
    Tile,
    bucket,
    every_key,
)

# theirs, known by this file's name
__all__ = [
    "COMMON_KEYS",
    "INTERPRETED",
    "LARGEST_BUCKET",
    "LEAST_BUCKET",
    "NORM_KEYS",
    "OPERANDS",
    "STATE_KEYS",
    "WIDEST_TF32",
    "WIDTHS",
    "Key",
    "Tile",
    "bucket",
    "every_key",
]

SCHEMA = 1
LARGEST_TABLE = 1 << 20
SHIPPED = Path(__file__).parent / "tables"


class TableError(ValueError):
    """A tile table that cannot be trusted: the message names file, entry and reason."""


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
    user = _user_tables or device.user_tables()
    places = [(user, "user table")] if user else []
    allowed = {*space.of(profile.capability, key), space.first(key)}
    for place, origin in [*places, (SHIPPED, "shipped table")]:
        for path in _paths(place, profile):
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


def _paths(place: Path, profile: device.Profile) -> list[Path]:
    """The tables that serve a device, the one that counts most first: a file is the only one."""
    if place.is_file():
        return [place]
    own, general = (place / f"{stem}.json" for stem in (slug(profile.name), device.architecture(profile.capability)))
    others = []
    for path in {*place.glob("*.json")} - {own, general}:
        with contextlib.suppress(TableError, OSError):  # of which device it is nobody knows
            capability, multiprocessors = _load(path)[1]
            if capability == profile.capability:
                others.append((abs(multiprocessors - profile.multiprocessors), path))
    return [own, *(path for _, path in sorted(others)), general]


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


def read(path: Path) -> dict[str, Any]:
    """The launches of a table, every entry checked; TableError otherwise."""
    return _load(path)[0]


@functools.cache
def _load(path: Path) -> tuple[dict[str, Any], tuple[tuple[int, ...], int]]:
    """The launches, and capability and multiprocessors of the device that they were tuned on: () and 0 where the table does not say."""
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
                launches[launch]["milliseconds"] = {str(Key.parse(key)): _time(time) for key, time in entry["milliseconds"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TableError(f"{path}: {launch}: {error}") from error
    try:
        gpus = [gpu for gpu in table.get("made", {}).get("gpus", ()) if slug(gpu["name"]) == path.stem]
        return launches, ((*map(int, gpus[0]["capability"]),), int(gpus[0]["multiprocessors"])) if gpus else ((), 0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableError(f"{path}: made: {type(error).__name__}: {error}") from error


def _time(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < math.inf:
        raise ValueError(f"milliseconds is {given!r}; allowed: a number from 0")
    return float(given)


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
    forget()


_user_tables: Path | None = None


def use_tables(place: Path | None) -> None:
    """Take the user's tables from this folder, or file, from now on, in this process; None: from where they are by default."""
    global _user_tables
    _user_tables = place
    forget()


def forget() -> None:
    """Read tables anew when they are next asked for."""
    _load.cache_clear()
    _look_up.cache_clear()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key stands twice among {sorted(keys)}")
    return dict(pairs)
