"""What became of seeded faults, kept line by line: a run takes hours, and one that is killed goes on where it was.

A fault is known by its place in its function, and only while the sources stay the same. A caught one stays caught as long as the call
that caught it is asked for; one that was let pass meets only the calls that it has not met: a new case costs no new run. A function that
several kernels run is one function: what one kernel's calls caught in it need not be planted for the others.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
        others: what `about` and `calls` are of kernels that may have functions in common with this one.
        until: when, by `time.perf_counter`, to plant no further fault.
        anew: forget what the file has.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        about: str = "",
        calls: Sequence[str] = (),
        others: Mapping[str, Sequence[str]] | None = None,
        until: float = math.inf,
        anew: bool = False,
    ) -> None:
        self.calls, self.left = tuple(calls), 0
        self._path, self._about, self._others, self._until, self._anew = path, about, others or {}, until, anew
        self._sources: dict[str, str] = {}
        self._hash = functools.cache(_hash)
        self._known: dict[str, Outcome] = {}
        self._elsewhere: dict[str, Outcome] = {}

    def begin(self, functions: Mapping[str, Any]) -> None:
        """Read what is known while the sources are what they are."""
        self._sources = {name: self._hash(name) for name in sorted({function.fn.__module__ for function in functions.values()})}
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        if text and not text.endswith("\n"):
            with self._path.open("a", encoding="utf-8") as file:  # half a line of a killed run would take the next one with it
                file.write("\n")
        for line in text.splitlines() if not self._anew else ():
            try:
                self._learn(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue

    def _learn(self, record: Mapping[str, Any]) -> None:
        about, place, outcome = record["about"], record["place"], _outcome(record)
        if about == self._about and record["sources"] == self._sources:
            self._known[place] = outcome
        elif outcome.caught and {*outcome.calls} <= {*self._others.get(about, ())} and self._stand(record["sources"]):
            self._elsewhere.setdefault(place, replace(outcome, caught=f"{about.partition(' ')[0]}: {outcome.caught}"))

    def _stand(self, sources: Mapping[str, str]) -> bool:
        return all(self._hash(name) == found for name, found in sources.items())

    def known(self, place: str) -> Outcome | None:
        """What an earlier run found; of a catch only if its call is still among these, or among another kernel's."""
        found = self._known.get(place)
        if found is not None and found.caught and {*found.calls} <= {*self.calls}:
            return found
        return self._elsewhere.get(place, None if found is None or found.caught else found)

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


def _hash(name: str) -> str:
    """Of a module that is there; none stands for one that nobody has imported."""
    module = sys.modules.get(name)
    return "" if module is None else tiles.source_hash([module])


def _outcome(record: Mapping[str, Any]) -> Outcome:
    return Outcome(str(record["caught"]), tuple(map(str, record["calls"])), float(record["seconds"]), bool(record["unmade"]))
