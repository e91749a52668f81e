"""Two pictures beside the page: how much of its error bound each check used, and speed against peers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from triton_attn.bench import FORWARD, Timing
from triton_attn.report import Results
from triton_attn.verify import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHECKS, TIMINGS = "checks.svg", "timings.svg"
_KERNEL, _PORTABLE, _WRONG, _FORWARD, _BOTH = "#0072b2", "#e69f00", "#c1272d", "#0072b2", "#56b4e9"
_WIDTH, _LEAST, _LONGEST_NAME = 9.0, 1e-3, 40


def draw(results: Results, folder: Path) -> None:
    """Draw what there are rows for; a picture of an earlier run goes."""
    import matplotlib as mpl

    for name, rows in ((CHECKS, results.verdicts), (TIMINGS, results.timings)):
        (folder / name).unlink(missing_ok=True)
        if rows:
            with mpl.rc_context({"text.parse_math": False, "svg.hashsalt": name, "font.size": 9}):
                figure = checks(results.verdicts) if name == CHECKS else timings(results.timings)
                figure.savefig(folder / name, metadata={"Date": None})


def checks(rows: Sequence[Verdict]) -> Figure:
    """A line per mechanism, a dot per check: its share of the bound, which ends at 100 %."""
    names = list(dict.fromkeys(_drawable(row.mechanism) for row in rows))
    shares = [min(max(row.share, _LEAST), 10.0) if math.isfinite(row.share) else 10.0 for row in rows]
    figure, axes = _canvas(0.42 * len(names) + 1.5)
    for label, color, marker, kernel in (("kernel", _KERNEL, "o", True), ("portable", _PORTABLE, "s", False)):
        picked = [
            (share, row) for share, row in zip(shares, rows, strict=True) if (row.implementation != "portable") == kernel and not row.fault
        ]
        heights = [names.index(_drawable(row.mechanism)) + (-0.16 if kernel else 0.16) for _, row in picked]
        axes.scatter([share for share, _ in picked], heights, s=18, c=color, marker=marker, alpha=0.75, linewidths=0, label=label)
    faulty = [(share, names.index(_drawable(row.mechanism))) for share, row in zip(shares, rows, strict=True) if row.fault]
    if faulty:
        axes.scatter([share for share, _ in faulty], [height for _, height in faulty], s=36, c=_WRONG, marker="X", label="wrong")
    axes.axvline(1.0, color=_WRONG, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min(0.01, min(shares) / 1.5), max(2.0, max(shares) * 1.5))
    axes.xaxis.set_major_formatter(lambda value, position: f"{100 * value:g} %")
    axes.set_xlabel("worst error, as share of what rounding may explain (right of the line is wrong)")
    _finish(axes, names)
    return figure


def timings(rows: Sequence[Timing]) -> Figure:
    """A bar per timing: the peer's time over ours."""
    rows = [row for row in rows if math.isfinite(row.ratio) and row.ratio > 0]
    labels = list(dict.fromkeys(_label(row) for row in rows))
    figure, axes = _canvas(0.5 * len(labels) + 1.5)
    for direction in dict.fromkeys(row.direction for row in rows):
        forward = direction == FORWARD
        picked = [row for row in rows if row.direction == direction]
        heights = [labels.index(_label(row)) + (-0.19 if forward else 0.19) for row in picked]
        # from 1, so that slower points left and faster right
        lengths = [row.ratio - 1.0 for row in picked]
        axes.barh(heights, lengths, height=0.36, left=1.0, color=_FORWARD if forward else _BOTH, label=_drawable(direction))
        for height, row in zip(heights, picked, strict=True):
            axes.annotate(
                f"{row.ratio:.2f}×",
                (row.ratio, height),
                xytext=(3 if row.ratio >= 1 else -3, 0),
                textcoords="offset points",
                ha="left" if row.ratio >= 1 else "right",
                va="center",
                fontsize=7.5,
            )
    ratios = [row.ratio for row in rows]
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(min([0.6, *ratios]) / 1.6, max([1.6, *ratios]) * 1.35)
    low, high = axes.get_xlim()
    ticks = [step * 10.0**power for power in range(-4, 5) for step in (1, 2, 5) if low <= step * 10.0**power <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("peer's time over ours (right of the line we are faster)")
    _finish(axes, labels)
    return figure


def _canvas(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, fontsize=8)


def _drawable(text: str) -> str:
    # the fonts at hand draw ASCII; any other letter would be a warning and a box
    drawn = "".join(char if char.isascii() and char.isprintable() else "?" for char in text)
    return drawn if len(drawn) <= _LONGEST_NAME else f"{drawn[: _LONGEST_NAME - 3]}..."


def _label(row: Timing) -> str:
    return f"{_drawable(f'{row.mechanism}, {row.case}')}\n{_drawable(f'beside {row.peer}, {row.dtype}')}"
