"""Timings at full sizes that an earlier run took: they need many minutes, so the report shows them and takes short ones of its own."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path

from triton_attn.bench import Timing
from triton_attn.report import rows

ROOT = Path(__file__).parents[2]  # of a checkout; an installed package has neither file
BENCH = ROOT / "build" / "bench.jsonl"  # what `make bench` has timed last, on this machine
COMMITTED = ROOT / "benchmarks" / "results" / "cpu.jsonl"


@dataclass(frozen=True)
class Earlier:
    """Timings, and which run took them."""

    said: str = ""
    timings: list[Timing] = field(default_factory=list)


def keep(row: Timing, path: Path | None = None) -> None:
    """Put one timing into the file, in the place of what it had of the same call beside the same peer; the others stay."""
    path = path or BENCH
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        kept = {_name(each): each for each in read(path)} if path.exists() else {}
    except ValueError:  # of another release, or half of one
        kept = {}
    kept[_name(row)] = row
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{rows.to_json(each)}\n" for each in kept.values()), encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> list[Timing]:
    """The timings in a file; ValueError names it."""
    try:
        return [rows.from_json(Timing, line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no timings: {error}") from error


def find() -> Earlier:
    """Those of the last `make bench`, else the committed ones, else none. ValueError or OSError where there is a file that is none."""
    for path, said in ((BENCH, "the last `make bench` here"), (COMMITTED, "benchmarks/results/cpu.jsonl, on another machine")):
        if path.is_file():
            written = datetime.datetime.fromtimestamp(path.stat().st_mtime).astimezone()
            return Earlier(f"{said}, {written:%Y-%m-%d}" if path == BENCH else said, read(path))
    return Earlier()


def _name(row: Timing) -> tuple[str, ...]:
    return row.mechanism, row.case, row.dtype, row.where, row.direction, row.peer
