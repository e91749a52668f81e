"""Every candidate of a launch, as `triton-attn tune --offline --rank` has compiled them earlier: that takes hours, so the lines are kept.

They are shown where sources and compiler are still those, and one of each target is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from triton_attn import device, tiles
from triton_attn.mechanism import Mechanism
from triton_attn.tuning import ranking
from triton_attn.tuning.ranking import Built, Ranked
from triton_attn.tuning.tune import Task

KEPT = Path(__file__).parents[2] / "benchmarks" / "results"  # of a checkout; an installed package has none


@dataclass(frozen=True)
class Candidates:
    """The candidates of one launch and key by predicted time; which tile a call gets and whence; which one fits every supported GPU."""

    ranked: tuple[Ranked, ...]
    gets: str
    source: str
    first: str

    @property
    def name(self) -> str:
        row = self.ranked[0]
        return f"{row.launch} {row.target} {row.key}"

    def place(self, tile: str) -> str:
        """A tile's place by predicted time."""
        return next((str(row.place) for row in self.ranked if row.tile == tile), "-")

    def over_the_best(self, tile: str) -> float | None:
        """A tile's predicted time over the least; None of one that may not run."""
        times = {row.tile: row.milliseconds for row in self.ranked if row.milliseconds is not None}
        return times[tile] / min(times.values()) if tile in times else None


def find(
    rows: Sequence[Mechanism], targets: Sequence[str], folder: Path | None = None, *, tick: Callable[[str], None] = lambda text: None
) -> tuple[list[Candidates], list[str]]:
    """What the folder has of these mechanisms and targets, and what is not true any more of the sample that was compiled again."""
    found, wrong = list[Candidates](), list[str]()
    for target in targets:
        profile = device.Profile(target, device.capability(target))
        if profile.capability not in device.PEAKS:
            continue
        groups = list(ranking.kept(rows, target, folder or KEPT))
        for task, built in groups:
            tile = tiles.look_up(task.name, task.space, task.key, profile)
            ranked = tuple(ranking.ordered(task, built, target))
            found.append(Candidates(ranked, str(tile.tile), tile.source, str(task.space.first(task.key))))
        for task, one in _sample(groups, found):
            tick(f"{task.name} {target} {one.tile}")
            wrong += filter(None, [ranking.differs(task, one)])
    return found, wrong


def _sample(groups: Sequence[tuple[Task, Sequence[Built]]], found: Sequence[Candidates]) -> list[tuple[Task, Built]]:
    """Of the first launch of a target the tile that calls get."""
    for (task, built), candidates in zip(groups[:1], found[len(found) - len(groups) :], strict=False):
        return [(task, next((one for one in built if one.tile == candidates.gets), built[0]))]
    return []
