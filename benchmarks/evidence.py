"""Checks that take minutes, finished one by one: each is a line of JSON when it ends, and a later start goes on with the others.

A check counts as finished for the sources, the compiler and the device that it ran with, and for no others.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_STARTS = 3  # of a check that ends the process each time nobody needs a fourth


@dataclass(frozen=True)
class Check:
    """One thing to find out: `run` gives a row, in which "fault" says what is wrong and "not run" what kept it from running."""

    name: str
    of: str  # which sources it is a check of
    run: Callable[[], dict[str, Any]]


@dataclass
class Outcome:
    """The rows of all checks that are finished, how many are not, and whether the device was lost on the way."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    lost: bool = False

    @property
    def wrong(self) -> int:
        return sum(bool(row.get("fault")) for row in self.rows)

    @property
    def ended(self) -> int:
        """The process's exit code: 3 to start it again at once, 1 if something is wrong, 4 if there was no time for everything."""
        return 3 if self.lost else 1 if self.wrong else 4 if self.left else 0


def finish(
    checks: Iterable[Check],
    path: Path,
    *,
    made: str,
    seconds: float,
    alive: Callable[[], bool] = lambda: True,
    tell: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Outcome:
    """Run what `path` does not hold yet; past `seconds` nothing more begins.

    Args:
        checks: no two of the same name.
        path: one line of JSON for each check that began, and one for each that ended.
        made: with what they run: compiler, device.
        seconds: the time for new checks.
        alive: whether the device still answers; asked after each fault, because an access out of bounds is the end of a CUDA context.
        tell: called with each new row.
    """
    start, outcome = time.perf_counter(), Outcome()
    rows, begun = read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    end_line(path)
    with path.open("a", encoding="utf-8") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        for check in checks:
            name = (check.name, check.of, made)
            if name not in rows:
                if outcome.lost or time.perf_counter() - start > seconds:
                    outcome.left += 1
                    continue
                said = dict(zip(("check", "of", "made"), name, strict=True))
                if begun[name] < MOST_STARTS:
                    write({**said, "begun": True})
                    try:
                        rows[name] = check.run()
                    except KeyboardInterrupt:  # somebody's wish and no fault of the check
                        write({**said, "begun": False})
                        raise
                    outcome.lost = bool(rows[name].get("fault")) and not alive()
                else:
                    rows[name] = {"fault": f"began {begun[name]} times and never ended"}
                rows[name] = {"name": check.name, **rows[name]}
                write({**said, "row": rows[name]})
                tell(rows[name])
            outcome.rows.append(rows[name])
    return outcome


Name = tuple[str, str, str]


def read(path: Path) -> tuple[dict[Name, dict[str, Any]], Counter[Name]]:
    """Rows by check, and how often each check began. A line that is none is passed over: a killed run may have left half of one."""
    rows, begun = dict[Name, dict[str, Any]](), Counter[Name]()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            name = (str(record["check"]), str(record["of"]), str(record["made"]))
            if "row" in record:
                rows[name] = dict(record["row"])
            else:
                begun[name] += 1 if record["begun"] else -1
        except (ValueError, TypeError, KeyError):
            continue
    return rows, begun


def end_line(path: Path) -> None:
    """What a killed run has left without an end gets one, so that the next line is not lost with it."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
