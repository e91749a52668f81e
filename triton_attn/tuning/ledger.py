"""What was tried on a device: every trial as a line of JSON, and the winners as the table that calls read.

The trials are written one by one and the table after every key, so that a killed run loses one trial at most and the next goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triton_attn import device, tiles
from triton_attn.tuning.tune import Task, Trial, winner


class Ledger:
    """The trials and the table of one device in one folder."""

    def __init__(self, folder: Path, profile: device.Profile, *, anew: bool = False) -> None:
        self.profile = profile
        self.table = folder / f"{tiles.slug(profile.name)}.json"
        self.evidence = folder / f"{tiles.slug(profile.name)}.trials.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if anew:
            self.evidence.unlink(missing_ok=True)
        self.trials = read_trials(self.evidence)
        if self.evidence.exists() and not self.evidence.read_bytes().endswith(b"\n"):
            with self.evidence.open("a", encoding="utf-8") as file:  # half a line of a killed run would take the next one with it
                file.write("\n")

    def known(self, task: Task) -> dict[str, Trial]:
        """By tile what an earlier run found, with this kernel, compiler and device."""
        same = (task.name, str(task.key), self.profile.name, device.triton_version(), task.hash)
        return {trial.tile: trial for trial in self.trials if same == (trial.launch, trial.key, trial.device, trial.triton, trial.hash)}

    def keep(self, trial: Trial) -> None:
        """Keep one trial."""
        with self.evidence.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(asdict(trial), allow_nan=False)}\n")
        self.trials.append(trial)

    def note(self, task: Task, trials: Sequence[Trial]) -> Trial | None:
        """Keep a task's trials and, if one may win, its tile; the winner."""
        for trial in trials:
            if trial not in self.trials:
                self.keep(trial)
        best = winner(trials)
        if best is not None and best.milliseconds is not None:
            write_winner(self.table, task, best)
        return best


def write_winner(path: Path, task: Task, best: Trial) -> None:
    """Put one winner into a table; what a changed kernel has left there goes."""
    launches: dict[str, Any] = dict(tiles.read(path)) if path.exists() else {}
    entry = launches.get(task.name, {})
    if entry.get("hash") != task.hash:
        entry = {}
    launches[task.name] = {
        "hash": task.hash,
        "evidence": f"tuned on {best.device}, triton {best.triton}",
        "tiles": {**entry.get("tiles", {}), best.key: tiles.Tile.parse(best.tile)},
        "milliseconds": {**entry.get("milliseconds", {}), best.key: best.milliseconds},
    }
    tiles.write(path, launches, {"by": "triton-attn tune", **device.describe()})


def read_trials(path: Path) -> list[Trial]:
    """The trials in a file. A line that is none is passed over: a killed run may have left half of one."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            found.append(Trial(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found
