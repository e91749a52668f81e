"""What became faster, slower, wronger or righter from one report to another, beyond the noise that the two runs themselves show,
and which seeded faults the cases no longer catch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_attn.bench import Timing
from triton_attn.offline import Compiled
from triton_attn.report import caught, rows
from triton_attn.verify import Verdict

LARGEST, NOT_RUN = 64 << 20, "not run"
LEAST = 0.05  # of a ratio: what medians of a few rounds move by themselves
WORSE = ("slower", "wronger", "no longer fits", "no longer caught")
SHARE = 0.1  # of a bound: rounding in another order moves no error by more


@dataclass(frozen=True)
class Report:
    """The rows of a report.json."""

    verdicts: list[Verdict]
    compiled: list[Compiled]
    timings: list[Timing]
    kept: Mapping[str, caught.Kept] = field(default_factory=dict)  # seeded faults by "mechanism/kernel"


@dataclass(frozen=True)
class Change:
    """One thing that differs."""

    what: str
    before: str
    after: str
    how: str  # one of WORSE, or "faster", "righter", "fits again", "caught again"

    @property
    def worse(self) -> bool:
        return self.how in WORSE

    @property
    def text(self) -> str:
        return f"{self.what}: {self.how}, {self.before} before, {self.after} now"


def read(path: Path) -> Report:
    """A report.json; ValueError names the file and what is wrong with it."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: larger than {LARGEST} bytes")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        parts = {kind: [rows.from_record(kind, row) for row in record[name]] for name, kind in rows.PARTS.items()}
        kept = caught.from_records(record.get("caught", {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a report.json: {error}") from error
    return Report(parts[Verdict], parts[Compiled], parts[Timing], kept)


def changes(before: Report, after: Report) -> list[Change]:
    """Of what both reports have, and what is wrong in the second alone.

    A timing's ratio to its peer counts: the peer ran on the same machine at the same time.
    """
    return [*_checks(before, after), *_kernels(before, after), *_timings(before, after), *_faults(before, after)]


def _pairs(before: Iterable[Any], after: Iterable[Any], key: Callable[[Any], tuple[str, ...]]) -> Iterator[tuple[str, Any, Any]]:
    """(name, before, after) of what both have; with None before where only the second has it and it is wrong."""
    known: Mapping[tuple[str, ...], Any] = {key(row): row for row in before}
    for row in after:
        fault: str = getattr(row, "fault", "")
        if key(row) in known or fault:
            yield " ".join(filter(None, key(row))), known.get(key(row)), row


def _checks(before: Report, after: Report) -> Iterator[Change]:
    def key(row: Verdict) -> tuple[str, ...]:
        return row.mechanism, row.implementation, row.case, row.dtype, row.where

    for what, old, new in _pairs(before.verdicts, after.verdicts, key):
        if old is None:
            yield Change(what, NOT_RUN, new.fault, "wronger")
            continue
        moved = new.share - old.share
        if bool(new.fault) != bool(old.fault) or not abs(moved) <= SHARE:
            how = "wronger" if new.fault or (moved > 0 and not old.fault) else "righter"
            yield Change(what, _percent(old.share), _percent(new.share), how)


def _kernels(before: Report, after: Report) -> Iterator[Change]:
    def key(row: Compiled) -> tuple[str, ...]:
        return f"{row.mechanism}/{row.kernel}/{row.launch}", row.target, row.key

    for what, old, new in _pairs(before.compiled, after.compiled, key):
        if old is None:
            yield Change(what, NOT_RUN, new.fault, "no longer fits")
        elif bool(old.fault) != bool(new.fault):
            yield Change(what, old.fault or "fits", new.fault or "fits", "no longer fits" if new.fault else "fits again")


def _timings(before: Report, after: Report) -> Iterator[Change]:
    def key(row: Timing) -> tuple[str, ...]:
        return row.mechanism, row.case, row.sizes, row.dtype, row.where, row.direction, row.path, row.peer

    for what, old, new in _pairs(before.timings, after.timings, key):
        noise = max(LEAST, old.noise + new.noise)
        if not 1 / (1 + noise) <= new.ratio / old.ratio <= 1 + noise:
            yield Change(what, f"{old.ratio:.2f}×", f"{new.ratio:.2f}×", "faster" if new.ratio > old.ratio else "slower")


def _faults(before: Report, after: Report) -> Iterator[Change]:
    for name in sorted(before.kept.keys() & after.kept.keys()):
        for fault, was, end in sorted(caught.no_longer(before.kept[name], after.kept[name])):
            yield Change(f"{name} {fault}", was, end, "no longer caught" if end == "survived" else "caught again")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
