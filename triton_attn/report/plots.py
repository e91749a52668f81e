"""The pictures of the page: shares of error bounds, speed against peers, time against length, and what the tuner tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from triton_attn.bench import FORWARD, LENGTH, Timing
from triton_attn.report import Results
from triton_attn.report.candidates import Candidates
from triton_attn.tuning.tune import Trial
from triton_attn.verify import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHECKS, TIMINGS, LENGTHS, TILES, CANDIDATES = "checks.svg", "timings.svg", "lengths.svg", "tiles.svg", "candidates.svg"
_PEERS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_KERNEL, _PORTABLE, _WRONG, _FORWARD, _BOTH = "#0072b2", "#e69f00", "#c1272d", "#0072b2", "#56b4e9"
_WIDTH, _LEAST, _LONGEST_NAME = 9.0, 1e-3, 40


def draw(results: Results, folder: Path) -> list[str]:
    """Draw what there are rows for; the names of the pictures. One of an earlier run goes."""
    import matplotlib as mpl

    by_length = [row for row in results.timings if _length(row) and row.direction == FORWARD]
    pictures: list[tuple[str, Callable[[], Figure], bool]] = [
        (CHECKS, lambda: checks(results.verdicts), bool(results.verdicts)),
        (TIMINGS, lambda: timings(_longest(results.timings)), bool(results.timings)),
        (LENGTHS, lambda: lengths(by_length), bool(by_length)),
        (TILES, lambda: tiles(results.trials), bool(results.trials)),
        (CANDIDATES, lambda: candidates(results.predicted), bool(results.predicted)),
    ]
    drawn = []
    for name, picture, wanted in pictures:
        (folder / name).unlink(missing_ok=True)
        if wanted:
            with mpl.rc_context({"text.parse_math": False, "svg.hashsalt": name, "font.size": 9}):
                picture().savefig(folder / name, metadata={"Date": None})
            drawn.append(name)
    return drawn


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


def lengths(rows: Sequence[Timing]) -> Figure:
    """A panel per mechanism: time against length, ours and each peer's, both axes logarithmic: a straight line is a power."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.mechanism for row in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(_WIDTH, 2.4 * lines + 0.6), layout="constrained", facecolor="white")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        axes.set_visible(True)
        mine = [row for row in rows if row.mechanism == name]
        ours = {_length(row): row.milliseconds for row in mine}
        longest = max(mine, key=_length)
        label = "ours" if longest.limit is None else f"ours, {100 * longest.limit:.0f} % of the limit at {_length(longest)}"
        axes.plot(list(ours), list(ours.values()), color=_KERNEL, marker="o", markersize=3.5, label=label, zorder=3)
        for color, peer in zip(_PEERS, dict.fromkeys(row.peer for row in mine), strict=False):
            theirs = [(_length(row), row.peer_milliseconds) for row in mine if row.peer == peer]
            axes.plot(*zip(*theirs, strict=True), color=color, marker="s", markersize=3, linewidth=1, label=_drawable(peer))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(ours), [str(length) for length in ours])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [step * 10.0**power for power in range(-4, 6) for step in (1, 3) if low <= step * 10.0**power <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_title(_drawable(name), fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=6, loc="upper left")
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("milliseconds, forward", fontsize=9)
    return figure


def tiles(rows: Sequence[Trial]) -> Figure:
    """A line per launch and key: each right tile's time over the fastest one's, the first candidate marked."""
    groups: dict[str, list[Trial]] = {}
    for row in rows:
        groups.setdefault(f"{_drawable(row.launch)}\n{_drawable(row.key)}", []).append(row)
    figure, axes = _canvas(0.45 * len(groups) + 1.5)
    for height, group in enumerate(groups.values()):
        timed = [row.milliseconds for row in group if row.milliseconds is not None and not row.fault]
        if timed:
            axes.scatter([time / min(timed) for time in timed], [height] * len(timed), s=16, c=_KERNEL, alpha=0.6, linewidths=0)
            if group[0].milliseconds is not None:
                axes.scatter([group[0].milliseconds / min(timed)], [height], s=40, facecolors="none", edgecolors=_PORTABLE)
    axes.set_xlabel("a tile's time over the fastest right one's (ring: the first candidate)")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    return figure


def candidates(rows: Sequence[Candidates]) -> Figure:
    """A line per launch and key: each tile's predicted time over the least one's; what a call gets and the first of the space marked."""
    figure, axes = _canvas(0.45 * len(rows) + 1.5)
    marked: list[tuple[str, str, int, Callable[[Candidates], str]]] = [
        ("what a call gets", _WRONG, 60, lambda row: row.gets),
        ("first of the space, which fits every GPU", _PORTABLE, 120, lambda row: row.first),
    ]
    places = [(time, height) for height, row in enumerate(rows) for each in row.ranked if (time := row.over_the_best(each.tile))]
    axes.scatter(
        [time for time, _ in places], [height for _, height in places], s=16, c=_KERNEL, alpha=0.6, linewidths=0, label="a candidate"
    )
    for label, color, size, tile in marked:
        rings = [(time, height) for height, row in enumerate(rows) if (time := row.over_the_best(tile(row)))]
        if rings:
            axes.scatter(
                [time for time, _ in rings], [height for _, height in rings], s=size, facecolors="none", edgecolors=color, label=label
            )
    axes.set_xlabel("a tile's predicted time over the least (a model's, not measured)")
    _finish(axes, [f"{_drawable(row.ranked[0].launch)}\n{_drawable(f'{row.ranked[0].target} {row.ranked[0].key}')}" for row in rows])
    return figure


def _longest(rows: Sequence[Timing]) -> list[Timing]:
    """Of several lengths the longest of each mechanism, peer and direction."""
    most: dict[tuple[str, str, str], int] = {}
    for row in rows:
        group = (row.mechanism, row.peer, row.direction)
        most[group] = max(most.get(group, 0), _length(row))
    return [row for row in rows if _length(row) in (0, most[row.mechanism, row.peer, row.direction])]


def _length(row: Timing) -> int:
    """The number of tokens of a case that is the first workload at another length; 0 of other cases."""
    number = row.case.removeprefix(LENGTH)
    return int(number) if row.case.startswith(LENGTH) and number.isascii() and number.isdigit() else 0


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
