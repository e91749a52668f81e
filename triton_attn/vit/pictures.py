"""Curves, speeds and attention maps as PNG and SVG, from what runs logged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triton_attn import ArgumentError
from triton_attn.arguments import ArgumentTypeError
from triton_attn.vit import training
from triton_attn.vit.attention_maps import class_attention
from triton_attn.vit.checkpoints import BEST, LOG
from triton_attn.vit.comparison import RESULT, SPEEDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
SUFFIXES = (".png", ".svg")
Log = list[dict[str, Any]]


def draw(runs: Sequence[Path], output: Path, data_dir: Path | None = None, maps: int = 4) -> list[Path]:
    """Whatever there are numbers for; the files that were written.

    Raises:
        FileNotFoundError: a run does not exist, or none of them logged anything.
        ArgumentError: a log holds something else; the message names the file.
        ModuleNotFoundError: matplotlib is not installed; the message says how to.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        raise ModuleNotFoundError("pictures are drawn by matplotlib: pip install 'triton-attn[cli]'") from None
    for run in runs:
        if not run.is_dir():
            raise FileNotFoundError(f"{run} is no folder; `triton-attn vit train` and `compare` write them")
    logs = {path.parent: read_log(path) for run in runs for path in sorted(run.rglob(LOG))}
    timed = [row for run in runs for path in sorted(run.rglob(SPEEDS)) for row in rows_of(path, ("what", "tokens", "direction", "ms"))]
    compared = [row for run in runs for path in sorted(run.rglob(RESULT)) for row in rows_of(path, ("name", "mean", "spread"))]
    bests = [path for path in logs if (path / BEST).is_file()] if maps else []
    figures: dict[str, Figure] = {}
    with mpl.rc_context({"text.parse_math": False, "svg.hashsalt": "vit", "font.size": 9}):
        if logs:
            names = _named(list(logs))
            figures["curves"] = curves({names[path]: rows for path, rows in logs.items()})
        if compared:
            figures["accuracy"] = accuracies(compared)
        if timed:
            figures["speed"] = speed_against_tokens(timed)
        if bests:
            figures["attention"] = attention([path / BEST for path in _one_of_each(bests)], data_dir, maps)
        if not figures:
            raise FileNotFoundError(f"nothing was logged in {', '.join(map(str, runs))}: no {LOG}, {RESULT} or {SPEEDS}")
        output.mkdir(parents=True, exist_ok=True)
        written = []
        for name, figure in figures.items():
            for suffix in SUFFIXES:
                path = output / f"{name}{suffix}"
                figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else {})
                written.append(path)
    return written


def read_log(path: Path) -> Log:
    """The epochs of a run.

    Raises:
        ArgumentError: a line is no epoch; the message names the file and the line.
    """
    rows: Log = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({key: float(row[key]) for key in ("epoch", "loss", "accuracy")})
        except (ValueError, KeyError, TypeError) as broken:
            raise ArgumentError("vit", "run", f"has {path}, whose line {number} is no epoch; allowed: what `vit train` logs") from broken
    return rows


def rows_of(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """What `compare` wrote.

    Raises:
        ArgumentError: it is something else; the message names the file.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        if not all(key in row for row in rows for key in keys):
            raise KeyError
    except (ValueError, KeyError, TypeError) as broken:
        raise ArgumentTypeError("vit", "run", f"has {path}, which holds no rows; allowed: what `vit compare` wrote") from broken
    return list(rows)


def curves(logs: Mapping[str, Log]) -> Figure:
    """Loss and test accuracy by epoch; seeds of one model have one colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, right = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(name.partition("-seed")[0] for name in logs))
    labelled: set[str] = set()
    for name, rows in logs.items():
        kind = name.partition("-seed")[0]
        style: dict[str, Any] = {"color": COLORS[kinds.index(kind) % len(COLORS)], "linewidth": 1}
        epochs = [row["epoch"] + 1 for row in rows]
        loss.plot(epochs, [row["loss"] for row in rows], label=None if kind in labelled else kind, **style)
        right.plot(epochs, [100 * row["accuracy"] for row in rows], **style)
        labelled.add(kind)
    for axes, said in ((loss, "training loss"), (right, "test accuracy, %")):
        _plain(axes, "epoch", said)
    loss.legend(frameon=False)
    return figure


def accuracies(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean test accuracy of each model, with its standard deviation over the seeds and every seed as a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        axes.errorbar(100 * row["mean"], place, xerr=100 * row["spread"], fmt="o", color=COLORS[0], capsize=3)
        axes.scatter([100 * x for x in row.get("accuracies", ())], [place + 0.2] * len(row.get("accuracies", ())), s=10, color=COLORS[1])
    axes.set_yticks(range(len(rows)), [str(row["name"]) for row in rows])
    axes.invert_yaxis()
    _plain(axes, "test accuracy, %: mean and standard deviation, and each seed", "")
    return figure


def speed_against_tokens(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Milliseconds an image against tokens, a panel for each direction, both axes logarithmic."""
    from matplotlib.figure import Figure

    directions = list(dict.fromkeys(row["direction"] for row in rows))
    names = list(dict.fromkeys(row["what"] for row in rows))
    figure = Figure(figsize=(4.5 * len(directions), 3.6), layout="constrained")
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        for place, name in enumerate(names):
            points = sorted((r["tokens"], r["ms"] / r.get("batch", 1)) for r in rows if (r["what"], r["direction"]) == (name, direction))
            axes.plot(*zip(*points, strict=True), marker="o", color=COLORS[place % len(COLORS)], label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")  # powers would be mathematics, which is off
            axis.set_minor_formatter("")
        _plain(axes, "tokens", f"{direction}, ms an image")
    figure.axes[0].legend(frameon=False)
    return figure


def attention(bests: Sequence[Path], data_dir: Path | None, count: int) -> Figure:
    """Test images, and for each checkpoint the class token's attention of its last block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * (len(bests) + 1), 1.5 * count + 0.4), layout="constrained")
    grid = figure.subplots(count, len(bests) + 1, squeeze=False)
    for column, path in enumerate(bests, 1):
        given, model, images = training.restored(path, data_dir)
        pixels = images.test[:count]
        with torch.no_grad():
            maps = class_attention(model, images.ready(pixels))
        for row in range(min(count, len(pixels))):
            grid[row, 0].imshow(pixels[row].permute(1, 2, 0).numpy(), cmap="gray")
            grid[row, column].imshow(maps[row].numpy(), cmap="viridis", vmin=0)
        grid[0, column].set_title(given.attention_type, fontsize=8)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure


def _plain(axes: Axes, below: str, beside: str) -> None:
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _named(paths: Sequence[Path]) -> dict[Path, str]:
    """By their own names, or with their parents' where two have one name."""
    names = [path.name for path in paths]
    return {path: path.name if names.count(path.name) == 1 else str(path) for path in paths}


def _one_of_each(paths: Sequence[Path]) -> list[Path]:
    """The first seed of each model."""
    return list({path.name.partition("-seed")[0]: path for path in reversed(paths)}.values())[::-1]
