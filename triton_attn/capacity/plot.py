"""Memory against length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from triton_attn.capacity.memory import Peak
from triton_attn.capacity.training import Setup

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
DASHES = ("solid", "dashed", "dotted", "dashdot", (0, (5, 1, 1, 1, 1, 1)))


def draw(peaks: Sequence[Peak], memory: float, path: Path, named: Callable[[Setup], str]) -> None:
    """A line for each step that was counted, both axes logarithmic, and the memory there is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    lines = defaultdict[Setup, list[Peak]](list)
    for peak in peaks:
        lines[peak.setup].append(peak)
    # a colour for what is trained, a dash for how
    kinds = list(dict.fromkeys((setup.params, setup.attention, setup.component, setup.batch) for setup in lines))
    ways = list(dict.fromkeys((setup.dtype, setup.optimizer, setup.checkpointing, setup.chunk) for setup in lines))
    for setup, points in lines.items():
        points.sort(key=lambda peak: peak.length)
        axes.plot(
            [peak.length for peak in points],
            [peak.bytes / 1e9 for peak in points],
            color=COLOURS[kinds.index((setup.params, setup.attention, setup.component, setup.batch)) % len(COLOURS)],
            linestyle=DASHES[ways.index((setup.dtype, setup.optimizer, setup.checkpointing, setup.chunk)) % len(DASHES)],
            label=named(setup),
        )
    axes.axhline(memory / 1e9, color="#c1272d", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="GB at the worst moment of a step")
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
