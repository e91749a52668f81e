"""Results as a Markdown page, with rows and plots beside it."""

from __future__ import annotations

import datetime
import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from triton_attn.mechanism import Mechanism
from triton_attn.report import Results, plots, tables, tile_tables
from triton_attn.report.tables import Table

_TEMPLATES = Path(__file__).parent / "templates"
SHORT, LONG = 15, 45  # rows
_STRUCTURE = re.compile(r"[|`\[\]*\\$~]")


def escape(text: Any) -> str:
    """Any value as plain text of a Markdown cell: no HTML, no link, no code, no new cell, no new line."""
    flat = "".join(char if char.isprintable() else " " for char in str(text))
    return _STRUCTURE.sub(lambda found: f"&#{ord(found[0])};", html.escape(flat, quote=False))


def table(given: Table) -> Markup:
    """A table in Markdown."""
    lines = [given.names, ["---:" if right else "---" for right in given.right]]
    lines += [
        [f"**{escape(cell)}**" if place in given.wrong and cell else escape(cell) for cell in cells]
        for place, cells in enumerate(given.cells)
    ]
    return Markup("\n".join(f"| {' | '.join(line)} |" for line in lines))


def folded(given: Table, what: str) -> Markup:
    """A table that folds, where it is long; open where it is not very long."""
    if len(given.cells) <= SHORT:
        return table(given)
    opened = " open" if len(given.cells) <= LONG else ""
    return Markup(f"<details{opened}><summary>{escape(what)}: {len(given.cells)} rows</summary>\n\n{table(given)}\n\n</details>")


def mechanisms(catalog: Iterable[Mechanism]) -> str:
    """The table of mechanisms that README and docs embed."""
    return str(table(tables.mechanisms(catalog)))


def page(results: Results, made: datetime.datetime) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escape(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("report.md.j2").render(
        results=results,
        made=made.isoformat(" ", "minutes"),
        has_gpu=bool(results.machine.get("gpus")),
        table=table,
        folded=folded,
        tables=tables,
        tile_tables=tile_tables,
        plots=plots,
    )
    return re.sub(r"\n{3,}", "\n\n", text)
