"""What happens while the site is built: formulas become MathML, which needs no script, files' names titles; pages of mechanisms get the
tiles that are shipped and what was measured; a new page stands with the mechanisms."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

DOCS = Path(__file__).parent
TABLES = DOCS.parent / "triton_attn" / "tables"
SHOWN = {"sm_80": "A100 (sm_80)", "sm_90": "H100 (sm_90)"}
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
DISPLAY, INLINE = re.compile(r"\$\$(.+?)\$\$", re.DOTALL), re.compile(r"(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])")
NAMED = re.compile(r"^```(\w+) ([\w.]+)$", re.MULTILINE)
TILES = """## Tiles

What is shipped for 16-bit operands, chosen without a GPU: rows by columns of a tile, warps, stages. `triton_attn/tables` has all;
[tuning](tuning.md) says what a call gets.

| launch | operands | {titles} |
|---|---|{rule}
{rows}
"""
MEASURED = """## Measured

From {source}:

{rows}

On a GPU: not run.
"""
UNMEASURED = """## Measured

Not measured yet: `triton-attn bench {name}` times it beside its peers. On a GPU: not run.
"""


def tiles(name: str) -> str:
    """The shipped tiles of a mechanism's launches for 16-bit operands; nothing where none are shipped."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for capability in SHOWN:
        for launch, entry in json.loads((TABLES / f"{capability}.json").read_text())["launches"].items():
            mechanism, _, rest = launch.partition("/")
            keys = [key for key in entry["tiles"] if key.startswith("16bit")] if mechanism == name else []
            for key in keys if len(keys) <= 4 else [key for key in keys if {"d64", "d128"} & {*key.split()}]:
                found.setdefault((rest, key.removeprefix("16bit ")), {})[capability] = entry["tiles"][key]
    rows = []
    for (launch, key), of_each in found.items():
        rows.append(f"| {launch} | {key} | {' | '.join(of_each.get(capability, 'none') for capability in SHOWN)} |")
    return TILES.format(titles=" | ".join(SHOWN.values()), rule="---|" * len(SHOWN), rows="\n".join(rows)) if rows else ""


def measured(name: str) -> str:
    """The rows of the table of speeds that are a mechanism's, with those of its further peers, or of the page of numbers."""
    titles: list[str] = []
    rows: list[str] = []
    of_ours = False
    for line in (DOCS / "speed.md").read_text().splitlines():
        if line.startswith("|"):
            titles = [*titles, line] if len(titles) < 2 else titles
            first = line.split("|")[1].strip()
            of_ours = f"`{name}`" in first or (of_ours and (not first or first.startswith("the same")))
            rows += [line] * of_ours
    if rows:
        return MEASURED.format(source="[speed](speed.md), two cores of a CPU, the peer's time over ours", rows="\n".join([*titles, *rows]))
    rows = [line for line in (DOCS / "numbers.md").read_text().splitlines() if line.startswith("| ")]
    titles, rows = rows[:2], [line for line in rows[2:] if line.startswith(f"| {name} |")]
    if rows:
        return MEASURED.format(
            source="[numbers](numbers.md), two cores of a CPU, the peer's time over ours", rows="\n".join([*titles, *rows])
        )
    return UNMEASURED.format(name=name)


def with_results(name: str, markdown: str) -> str:
    """A mechanism's page, which has a portable path: tiles before it, what was measured at the end if the page has nothing of its own."""
    before, portable, rest = markdown.partition("## Portable\n")
    if not portable:
        return markdown
    more = "" if re.search(r"^## Measured$", markdown, re.MULTILINE) else measured(name)
    return f"{before.rstrip()}\n\n{tiles(name)}\n{portable}{rest.rstrip()}\n\n{more}"


def on_page_markdown(markdown: str, page: Any, **given: Any) -> str:
    """mkdocs calls it with each page."""
    parts = CODE.split(with_results(Path(page.file.src_uri).stem, markdown) if page.file.src_uri.count("/") == 0 else markdown)
    for place, part in enumerate(parts):
        if place % 2:  # code
            parts[place] = NAMED.sub(lambda found: f"```{found[1]}" + (f' title="{found[2]}"' if "." in found[2] else ""), part)
        else:
            text = DISPLAY.sub(lambda found: f'\n<p class="formula">{convert(found[1].strip(), display="block")}</p>\n', part)
            parts[place] = INLINE.sub(lambda found: convert(found[1]), text)
    return "".join(parts)


def pages(navigation: Any) -> Iterator[str]:
    """Every page that a navigation names."""
    if isinstance(navigation, str):
        yield navigation
    else:
        for part in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from pages(part)


def on_config(config: Any) -> Any:
    """mkdocs calls it once. A page of docs that mkdocs.yml does not name stands with the mechanisms, so that a new one edits nothing."""
    named = set(pages(config["nav"]))
    new = sorted(path.name for path in Path(config["docs_dir"]).glob("*.md") if path.name not in named)
    for section in config["nav"]:
        section.get("Mechanisms", []).extend(new)
    return config
