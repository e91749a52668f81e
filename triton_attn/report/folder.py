"""A report as a folder: one page for a browser, the same in Markdown, its rows as JSON, its pictures."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triton_attn.report import Results, caught, html, markdown, plots, rows

PAGE, MARKDOWN, DATA = "report.html", "report.md", "report.json"


def write(results: Results, folder: Path) -> Path:
    """Write it all; the page's path. OSError where the folder does not take it."""
    made = datetime.datetime.now().astimezone()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(results, folder)
    text = markdown.page(results, made)
    (folder / DATA).write_text(json.dumps(_data(results, made), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / MARKDOWN).write_text(text, encoding="utf-8")
    written = folder / PAGE
    written.write_text(html.page(text, {name: (folder / name).read_text(encoding="utf-8") for name in drawn}), encoding="utf-8")
    return written


def _data(results: Results, made: datetime.datetime) -> dict[str, Any]:
    members: list[Sequence[rows.Row]] = [results.verdicts, results.compiled, results.timings, results.explained]
    return {
        "made": made.isoformat(),
        "machine": dict(results.machine),
        "targets": list(results.targets),
        **{name: [rows.to_record(row) for row in part] for name, part in zip(rows.PARTS, members, strict=True)},
        "caught": caught.to_records(results.kept, results.stale),
        "earlier": {"by": results.earlier.said, "bench": [rows.to_record(row) for row in results.earlier.timings]},
        "candidates": [dataclasses.asdict(each) for each in results.candidates],
        "notes": results.notes,
        "wrong": results.wrong,
    }
