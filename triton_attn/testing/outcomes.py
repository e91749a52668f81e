"""What became of seeded faults, kept line by line: a run takes hours, and one that is killed goes on where it was.

A fault is known by its place in its function, and only while the sources stay the same. A caught one stays caught as long as the call
that caught it is asked for; one that was let pass meets only the calls that it has not met: a new case costs no new run.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triton_attn import tiles


@dataclass(frozen=True)
class Outcome:
    """The end of one fault: which exception caught it, "" if none did; by which call, or after which had let it pass."""

    caught: str
    calls: tuple[str, ...]
    seconds: float
    unmade: bool = False  # no compiler would take it


class Outcomes:
    """The ends known of one kernel's faults, in a file with those of others, and the time that there is for more.

    Args:
        path: a file of JSON lines, or None to keep nothing.
        about: which kernel, and whatever else but its functions decides what becomes of its faults.
        calls: a name for each check, the same as long as it asks the same.
        until: when, by `time.perf_counter`, to plant no further fault.
        anew: forget what the file has of this kernel.
    """

    def __init__(
        self, path: Path | None = None, *, about: str = "", calls: Sequence[str] = (), until: float = math.inf, anew: bool = False
    ) -> None:
        self.calls, self.left = tuple(calls), 0
        self._path, self._about, self._until, self._anew = path, about, until, anew
        self._sources = ""
        self._known: dict[str, Outcome] = {}

    def begin(self, functions: Mapping[str, Any]) -> None:
        """Read what is known of exactly these functions."""
        modules = [sys.modules[name] for name in sorted({function.fn.__module__ for function in functions.values()})]
        self._sources = tiles.source_hash(modules)
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        if text and not text.endswith("\n"):
            with self._path.open("a", encoding="utf-8") as file:  # half a line of a killed run would take the next one with it
                file.write("\n")
        for line in text.splitlines() if not self._anew else ():
            try:
                record = json.loads(line)
                if (record["about"], record["sources"]) == (self._about, self._sources):
                    self._known[record["place"]] = _outcome(record)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue

    def known(self, place: str) -> Outcome | None:
        """What an earlier run found; of a catch only if its call is still among these."""
        found = self._known.get(place)
        return None if found is None or (found.caught and not {*found.calls} <= {*self.calls}) else found

    def keep(self, place: str, outcome: Outcome, told: str) -> None:
        """Keep one."""
        self._known[place] = outcome
        if self._path is None:
            return
        line = {"about": self._about, "sources": self._sources, "place": place, "fault": told, **asdict(outcome)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line, allow_nan=False)}\n")

    @property
    def late(self) -> bool:
        return time.perf_counter() > self._until


def _outcome(record: Mapping[str, Any]) -> Outcome:
    return Outcome(str(record["caught"]), tuple(map(str, record["calls"])), float(record["seconds"]), bool(record["unmade"]))
