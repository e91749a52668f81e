"""Refresh what the pages take from the code: the table of mechanisms in README.md, the table of choice, the lists of the API, the
picture of each pattern."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from triton_attn import CATALOG, sparse_attention, use_backend
from triton_attn.bench import LENGTH, Timing
from triton_attn.mechanism import Mechanism
from triton_attn.report.markdown import mechanisms, table
from triton_attn.report.tables import Table, timings
from triton_attn.testing import patterns

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
RESULTS, LENGTHS = (DOCS.parent / "benchmarks" / "results" / f"{name}.jsonl" for name in ("cpu", "lengths"))
MARK = "<!-- triton-attn list --markdown -->\n"
MEASURE = "triton-attn bench --device cpu --json > benchmarks/results/cpu.jsonl"
COLUMNS = ("mechanism", "case", "direction", "time", "peer", "its time", "ratio", "rounds", "sizes")  # the ratio within a window's width
HOW = "float32, by the portable path. Both calls take turns; a ratio above 1 says that ours is faster"
SHOWN = 4  # cases in a picture
RULED = 40  # tokens in the picture of sparse attention's rules
RULES: dict[str, dict[str, Any]] = {
    "uniform, keep 1/8": {"keep_ratio": 0.125},
    "topk, keep 1/8": {"keep_ratio": 0.125, "selection": "topk"},
    "window, keep 1/8": {"keep_ratio": 0.125, "selection": "window"},
    "fixed": {"selection": "fixed"},
    "strided, causal": {"selection": "strided", "causal": True},
}
CHOICE, PAYS = "<!-- docs/build.py -->\n", "<!-- docs/build.py: lengths -->\n"
DENSE = ("torch SDPA over all keys", "torch SDPA")
API = {
    "functions": ("Functions", "triton_attn"),
    "modules": ("Modules and models", "triton_attn.nn", "triton_attn.models"),
    "tools": ("Testing, integrations, capacity", "triton_attn.testing", "triton_attn.capacity"),
}
BESIDE = (
    "triton_attn.integrations.open_clip.replace_transformer_in_model",
    "triton_attn.integrations.transformers_clip.replace_transformer_in_model",
    "triton_attn.integrations.transformers.register",
    "triton_attn.integrations.transformers_mamba.patch_mamba",
    "triton_attn.integrations.torch_sdpa.register",
    "triton_attn.integrations.replacement.Replacement",
    "triton_attn.integrations.hub.build",
)


def refreshed(page: str) -> str:
    """The page with the table after the mark made anew; the table ends at the next empty line."""
    before, _, rest = page.partition(MARK)
    return f"{before}{MARK}{mechanisms(CATALOG.values()).strip()}\n\n{rest.partition(chr(10) * 2)[2]}"


def choice(page: str, measured: str) -> str:
    """The page with the rows of the measured table whose peer is dense attention."""
    before, _, rest = page.partition(CHOICE)
    made = ["| call | what it computes | sizes | forward | both |", "|---|---|---|---|---|"]
    for line in measured.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = re.match(r"`(\w+)`", cells[0])
        if found and len(cells) == 6 and cells[2].startswith("dense") and found[1] in CATALOG:
            name = found[1]
            called = cells[0].replace(f"`{name}`", f"[{name}]({name}.md)")
            made.append(f"| {called} | {CATALOG[name].summary} | {cells[1]} | {cells[3]} | {cells[4]} |")
    return f"{before}{CHOICE}{chr(10).join(made)}\n\n{rest.partition(chr(10) * 2)[2]}"


def pays(page: str, rows: Sequence[Timing]) -> str:
    """The page with a row for each mechanism and direction: how much faster than dense attention at each length."""
    before, _, rest = page.partition(PAYS)
    lengths = sorted({int(row.case.removeprefix(LENGTH)) for row in rows})
    made = [f"| call | direction | {' | '.join(map(str, lengths))} |", f"|---|---|{'---|' * len(lengths)}"]
    found = {(row.mechanism, row.direction, int(row.case.removeprefix(LENGTH))): row.ratio for row in rows if row.peer in DENSE}
    for name, direction in dict.fromkeys((name, direction) for name, direction, _ in found):
        ratios = [found.get((name, direction, length)) for length in lengths]
        cells = ["not run" if ratio is None else f"{ratio:.{1 if ratio < 9.95 else 0}f}" for ratio in ratios]
        case = CATALOG[name].workloads["cpu"][0]
        numbered = ", ".join(f"{option} {value}" for option, value in case.options.items() if not isinstance(value, str))
        pattern = numbered or case.name.removesuffix(" 8k")
        made.append(f"| [{name}]({name}.md), {pattern} | {direction} | {' | '.join(cells)} |")
    text = chr(10).join(made) if rows else "Not measured."
    return f"{before}{PAYS}{text}\n\n{rest.partition(chr(10) * 2)[2]}"


def api(title: str, *modules: str) -> str:
    """A page that names every public thing of some modules; its docstrings are filled in when the site is built."""
    parts = [f"# {title}\n"]
    for module in modules:
        public = [name for name in import_module(module).__all__ if callable(getattr(import_module(module), name))]
        parts += [f"## {module}\n", *(f"::: {module}.{name}\n" for name in public)]
    if modules[0] == "triton_attn.testing":
        parts += ["## triton_attn.integrations\n", *(f"::: {name}\n" for name in BESIDE)]
    return chr(10).join(parts)


def measured(file: Path) -> list[Timing]:
    """What `triton-attn bench --json` printed, a timing a line; nothing where the file is not there."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [Timing(**json.loads(line)) for line in lines if line.startswith("{")]


def numbers(rows: Sequence[Timing]) -> str:
    """A page of what was measured, or of how to measure it."""
    if not rows:
        return f"# Numbers\n\nNo results are kept yet: `{MEASURE}`, then `make docs`. [speed](speed.md) has what was measured by hand.\n"
    whole = timings(rows)
    places = [whole.names.index(name) for name in COLUMNS]
    narrow = Table(tuple(whole.titles[i] for i in places), [tuple(cells[i] for i in places) for cells in whole.cells])
    return f"# Numbers\n\nWhat `{MEASURE}` printed on two cores, {HOW}; [speed](speed.md) says more.\n\n{table(narrow)}\n"


def picture(masks: Mapping[str, Tensor]) -> Figure:
    """Which keys (across) each query (down) sees: masks (M, N) by their titles."""
    figure = Figure(figsize=(2.6 * len(masks), 2.9), layout="constrained")
    for axes, (title, mask) in zip(figure.subplots(1, len(masks), squeeze=False)[0], masks.items(), strict=True):
        axes.imshow(mask, cmap="Blues", vmin=-0.3, vmax=1.3, interpolation="nearest")
        axes.set(title=title, xlabel="key", ylabel="query")
        axes.title.set_fontsize(9)
    return figure


def of_row(row: Mechanism) -> dict[str, Tensor]:
    """The masks of a row's first cases, as its reference has them."""
    return {case.name: patterns.seen(row, case)[0, 0] for case in row.cases[:SHOWN]}


def of_rules() -> dict[str, Tensor]:
    """The masks of sparse attention's rules, off the reference: equal scores, and values that are the identity."""
    shape = 1, 1, RULED, RULED
    same, every = torch.zeros(shape), torch.eye(RULED).expand(shape)
    torch.manual_seed(0)
    with use_backend("reference"):
        return {name: sparse_attention(same, torch.randn(shape), every, **options)[0, 0] > 0 for name, options in RULES.items()}


if __name__ == "__main__":
    README.write_text(refreshed(README.read_text()))
    chosen = choice((DOCS / "choose.md").read_text(), (DOCS / "speed.md").read_text())
    (DOCS / "choose.md").write_text(pays(chosen, measured(LENGTHS)))
    (DOCS / "numbers.md").write_text(numbers(measured(RESULTS)))
    for name, page in API.items():
        (DOCS / "api" / f"{name}.md").write_text(api(*page))
    matplotlib.use("agg")
    drawn = {row.name: of_row(row) for row in CATALOG.values() if "lse" in row.outputs} | {"sparse_attention": of_rules()}
    for name, masks in drawn.items():
        picture(masks).savefig(DOCS / "images" / f"{name}.png", dpi=110, metadata={"Software": None})
