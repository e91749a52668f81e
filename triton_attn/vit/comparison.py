"""The same data, seeds and steps for several models: accuracy with its spread, time, memory, parameters."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from triton_attn import ArgumentError
from triton_attn.vit import checkpoints, speed, training
from triton_attn.vit.images import DATASETS
from triton_attn.vit.settings import Settings, build

RESULT, PAGE, SPEEDS = "comparison.json", "comparison.md", "speeds.json"


@dataclass(frozen=True)
class Variant:
    """A name, and the settings that make it differ from the others."""

    name: str
    changed: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """The start of its runs' folders."""
        return re.sub(r"\W+", "_", self.name)


@dataclass(frozen=True)
class Row:
    """One variant. Accuracies are of the last epoch, one for each seed: no epoch is chosen by the test images."""

    name: str
    accuracies: tuple[float, ...]
    mean: float
    spread: float
    step_ms: float
    peak_bytes: int | None
    parameters: int
    train_seconds: float


def compare(
    base: Settings,
    variants: Sequence[Variant],
    folder: Path,
    *,
    seeds: int = 3,
    data_dir: Path | None = None,
    device: str | None = None,
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> list[Row]:
    """Train every variant with every seed, each in a folder of its own under `folder`; runs that are there go on or count as done.

    Then time their training steps in turns, and write `comparison.json` and `comparison.md`.

    Raises:
        ArgumentError: a setting is wrong, a run in the folder has others, or torchrun started this.
        TrainingStopped: a loss is not finite.
        OSError: something cannot be read or written.
    """
    if dist.is_available() and dist.is_torchelastic_launched():
        raise ArgumentError("vit", "compare", "is under torchrun; allowed: one process, whose runs follow one another")
    models = {variant.name: replace(base, **variant.changed) for variant in variants}
    images = DATASETS[base.dataset](data_dir)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = {name: sum(x.numel() for x in build(given, images).parameters()) for name, given in models.items()}  # wrong ones say so now
    histories: dict[str, list[list[training.Epoch]]] = {name: [] for name in models}
    runs = [(variant, seed) for seed in range(seeds) for variant in variants]
    for place, (variant, seed) in enumerate(runs):
        run = folder / f"{variant.folder}-seed{seed}"
        given = replace(models[variant.name], seed=seed)
        there = (run / checkpoints.LAST).exists()

        def overall(done: int, of: int, place: int = place) -> None:
            tick(place * of + done, len(runs) * of)

        histories[variant.name].append(training.train(given, run, data_dir=data_dir, resume=there, device=device, tick=overall))
    size = (images.side, images.classes, images.channels)
    calls = {name: speed.step(given, size, base.batch_size, where) for name, given in models.items()}
    times = speed.in_turns(calls, where)
    rows = []
    for name, given in models.items():
        ends = tuple(history[-1].accuracy for history in histories[name])
        took = sum(row.seconds for history in histories[name] for row in history) / seeds
        peak = speed.peak(given, size, base.batch_size, where)
        spread = statistics.stdev(ends) if seeds > 1 else 0.0
        rows.append(Row(name, ends, statistics.mean(ends), spread, statistics.median(times[name]), peak, sizes[name], took))
    held = {"settings": asdict(base), "seeds": seeds, "device": described(where), "rows": [as_dict(row) for row in rows]}
    checkpoints.write(json.dumps(held, indent=1) + "\n", folder / RESULT)
    checkpoints.write(markdown(titles(), cells(rows)), folder / PAGE)
    return rows


def speeds(
    base: Settings,
    variants: Sequence[Variant],
    folder: Path,
    sides: Sequence[int],
    device: str | None = None,
    seconds: float | None = None,
) -> list[speed.Speed]:
    """Time the variants at other sizes of image, and write `speeds.json`. Raises as `speed.speeds` does."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = {variant.name: replace(base, **variant.changed) for variant in variants}
    rows = speed.speeds(models, sides, where, seconds=seconds)
    held = {"settings": asdict(base), "device": described(where), "rows": [asdict(row) for row in rows]}
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.write(json.dumps(held, indent=1) + "\n", folder / SPEEDS)
    return rows


def described(where: torch.device) -> str:
    """What computed, for whoever reads the numbers later."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def as_dict(row: Row) -> dict[str, Any]:
    """For JSON."""
    return asdict(row)


def titles() -> tuple[str, ...]:
    """Of the table."""
    return "model", "test accuracy", "spread", "seeds", "ms a step", "memory of a step", "parameters", "training"


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Of the table; the spread is the standard deviation over the seeds."""
    return [
        (
            row.name,
            f"{100 * row.mean:.1f} %",
            f"{100 * row.spread:.1f}" if len(row.accuracies) > 1 else "one seed",
            str(len(row.accuracies)),
            f"{row.step_ms:.1f}",
            "not measured" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB",
            f"{row.parameters:,}",
            f"{row.train_seconds:.0f} s",
        )
        for row in rows
    ]


SPEED_TITLES = ("model", "pixels", "tokens", "direction", "ms", "images a second", "rounds")


def speed_cells(rows: Sequence[speed.Speed]) -> list[tuple[str, ...]]:
    """Of the table of speeds."""
    return [
        (row.what, str(row.side), str(row.tokens), row.direction, f"{row.ms:.1f}", f"{row.images_per_second:.2f}", str(row.rounds))
        for row in rows
    ]


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table for a page."""
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
