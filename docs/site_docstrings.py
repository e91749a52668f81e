"""Docstrings are plain text with back quotes, and several arguments may share a line; the site reads Markdown, a row for each argument."""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`\n]*`)")
TAG = re.compile(r"<(?=[A-Za-z/!_])")  # <query_i, key_j> would vanish
ARGUMENTS = re.compile(r"^Args:\n((?: +.*\n?)+)", re.MULTILINE)
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


def as_text(docstring: str) -> str:
    """What looks like a tag, outside of code, escaped."""
    parts = CODE.split(docstring)
    return "".join(part if place % 2 else TAG.sub("&lt;", part) for place, part in enumerate(parts))


def apart(docstring: str) -> str:
    """`a, b: text` among the arguments becomes `a: text` and `b: text`."""

    def each(found: re.Match[str]) -> str:
        return "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", "))

    return ARGUMENTS.sub(lambda section: SHARED.sub(each, section[0]), docstring)


class PlainText(griffe.Extension):
    """griffe calls it with each object that it has read."""

    def on_object(self, *, obj: griffe.Object, **given: Any) -> None:
        """Give its docstring the form that the site reads."""
        if obj.docstring:
            obj.docstring.value = as_text(apart(obj.docstring.value))
