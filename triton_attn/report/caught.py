"""Seeded faults that an earlier run of `triton-attn teeth` planted: kept in a file, because a run takes hours, and shown in the report."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from triton_attn import device, tiles
from triton_attn.mechanism import Kernel, Mechanism
from triton_attn.teeth import Tooth

SCHEMA = 1
KEPT = Path(__file__).parents[2] / "benchmarks" / "results" / "teeth.json"  # of a checkout; an installed package has none


@dataclass(frozen=True)
class Kept:
    """What became of the faults of one kernel, and which kernel that was."""

    command: str
    triton: str
    hash: str  # of the kernel's sources
    planted: int
    caught: int
    argued: int  # they change nothing, and it is written down why
    survived: int
    faults: tuple[str, ...] = field(default=(), repr=False)


def evidence(path: Path) -> Path:
    """Where the ends of single faults stand while a run is under way, by which the next goes on."""
    return path.with_suffix(".planted.jsonl")


def keep(path: Path, found: Sequence[Tooth], catalog: Mapping[str, Mechanism], command: str) -> None:
    """Put the kernels of one run into the file, in the place of what it had of them; the others stay."""
    entries = read(path) if path.exists() else {}
    groups: dict[str, list[Tooth]] = {}
    for tooth in found:
        groups.setdefault(f"{tooth.mechanism}/{tooth.kernel}", []).append(tooth)
    for name, group in groups.items():
        mechanism, _, kernel = name.partition("/")
        entries[name] = Kept(
            command,
            device.triton_version(),
            hash_of(next(each for each in catalog[mechanism].kernels if each.name == kernel)),
            len(group),
            sum(bool(tooth.caught) for tooth in group),
            sum(bool(tooth.equivalent) for tooth in group),
            sum(bool(tooth.fault) for tooth in group),
            tuple(_told(tooth) for tooth in group),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    told = {"schema": SCHEMA, "kernels": {name: asdict(entries[name]) for name in sorted(entries)}}
    partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> dict[str, Kept]:
    """By "mechanism/kernel"; ValueError names the file."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["schema"] != SCHEMA:
            raise ValueError(f"schema is {told['schema']!r}; allowed: {SCHEMA}")
        return from_records(told["kernels"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no kept faults: {type(error).__name__}: {error}") from error


def hash_of(kernel: Kernel) -> str:
    """Of a kernel's sources, as tile tables have it."""
    spaces: Mapping[str, tiles.Space] = kernel.load().spaces
    return tiles.source_hash(spaces[kernel.launches[0].name].modules)


def to_records(kept: Mapping[str, Kept], stale: Container[str] = ()) -> dict[str, Any]:
    """As a report.json has them; "stale" where the kernel has changed since."""
    return {name: {**asdict(kept[name]), "stale": name in stale} for name in sorted(kept)}


def from_records(records: Mapping[str, Any]) -> dict[str, Kept]:
    """The inverse, but for what is stale; ValueError, TypeError, KeyError or AttributeError on anything else."""
    return {str(name): _kept(entry) for name, entry in records.items()}


def no_longer(before: Kept, after: Kept) -> Iterator[tuple[str, str, str]]:
    """(fault, its end before, its end now) of what was planted both times and ended in another way: one of the two is "survived".

    Where the sources are others, lines have moved: a fault is then known by its function, kind and change.
    """
    moved = before.hash != after.hash
    earlier = dict(_ends(before.faults, moved))
    for fault, end in _ends(after.faults, moved):
        was = earlier.get(fault, end)
        if "survived" in (was, end) and was != end:
            yield fault[0], was, end


def _ends(faults: Sequence[str], moved: bool) -> Iterator[tuple[tuple[str, int], str]]:
    """((fault, how many like it stand before), its end) of lines as `_told` writes them."""
    seen: Counter[str] = Counter()
    for line in faults:
        found = re.fullmatch(r"(.*?): (caught, \S*|changes nothing: .*|survived)", line, re.DOTALL)
        if found:
            name = re.sub(r"^(\w+):\d+ ", r"\1 ", found[1]) if moved else found[1]
            yield (name, seen[name]), found[2].partition(",")[0].partition(":")[0]
            seen[name] += 1


def _kept(entry: Mapping[str, Any]) -> Kept:
    counts = {name: int(entry[name]) for name in ("planted", "caught", "argued", "survived")}
    if min(counts.values()) < 0 or counts["planted"] != counts["caught"] + counts["argued"] + counts["survived"]:
        raise ValueError(f"{counts} do not add up")
    command, triton, source_hash = (str(entry[name]) for name in ("command", "triton", "hash"))
    return Kept(command, triton, source_hash, **counts, faults=tuple(map(str, entry["faults"])))


def _told(tooth: Tooth) -> str:
    """One fault in one line: where, what, and its end."""
    end = (
        f"caught, {tooth.caught.partition(':')[0]}"
        if tooth.caught
        else f"changes nothing: {tooth.equivalent}"
        if tooth.equivalent
        else "survived"
    )
    return f"{tooth.function.rpartition('.')[2]}:{tooth.line} {tooth.kind}: {tooth.change}: {end}"
