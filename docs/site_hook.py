"""What happens to a page's text while the site is built: formulas become MathML, which needs no script, and files' names titles."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
DISPLAY, INLINE = re.compile(r"\$\$(.+?)\$\$", re.DOTALL), re.compile(r"(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])")
NAMED = re.compile(r"^```(\w+) ([\w.]+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **given: Any) -> str:
    """mkdocs calls it with each page."""
    parts = CODE.split(markdown)
    for place, part in enumerate(parts):
        if place % 2:  # code
            parts[place] = NAMED.sub(lambda found: f"```{found[1]}" + (f' title="{found[2]}"' if "." in found[2] else ""), part)
        else:
            text = DISPLAY.sub(lambda found: f'\n<p class="formula">{convert(found[1].strip(), display="block")}</p>\n', part)
            parts[place] = INLINE.sub(lambda found: convert(found[1]), text)
    return "".join(parts)
