"""Refresh what the pages take from the catalogue: the table of mechanisms in README.md, and the picture of each pattern."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from triton_attn import CATALOG
from triton_attn.mechanism import Mechanism
from triton_attn.report.markdown import mechanisms
from triton_attn.testing import patterns

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
MARK = "<!-- triton-attn list --markdown -->\n"
SHOWN = 4  # cases in a picture


def refreshed(page: str) -> str:
    """The page with the table after the mark made anew; the table ends at the next empty line."""
    before, _, rest = page.partition(MARK)
    return f"{before}{MARK}{mechanisms(CATALOG.values()).strip()}\n\n{rest.partition(chr(10) * 2)[2]}"


def picture(row: Mechanism) -> Figure:
    """Which keys (across) each query (down) sees, in the row's first cases, as its reference has it."""
    cases = row.cases[:SHOWN]
    figure = Figure(figsize=(2.6 * len(cases), 2.9), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        axes.imshow(patterns.seen(row, case)[0, 0], cmap="Blues", vmin=-0.3, vmax=1.3, interpolation="nearest")
        axes.set(title=case.name, xlabel="key", ylabel="query")
        axes.title.set_fontsize(9)
    return figure


if __name__ == "__main__":
    README.write_text(refreshed(README.read_text()))
    matplotlib.use("agg")
    for row in CATALOG.values():
        if "lse" in row.outputs:
            picture(row).savefig(DOCS / "images" / f"{row.name}.png", dpi=110, metadata={"Software": None})
