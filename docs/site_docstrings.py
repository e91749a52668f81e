"""Docstrings are plain text with back quotes; the site reads them as Markdown, where <query_i, key_j> would be a tag and vanish."""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`\n]*`)")
TAG = re.compile(r"<(?=[A-Za-z/!_])")


def as_text(docstring: str) -> str:
    """What looks like a tag, outside of code, escaped."""
    parts = CODE.split(docstring)
    return "".join(part if place % 2 else TAG.sub("&lt;", part) for place, part in enumerate(parts))


class PlainText(griffe.Extension):
    """griffe calls it with each object that it has read."""

    def on_object(self, *, obj: griffe.Object, **given: Any) -> None:
        """Escape its docstring."""
        if obj.docstring:
            obj.docstring.value = as_text(obj.docstring.value)
