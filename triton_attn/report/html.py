"""The page for a browser: the Markdown page, rendered, with its pictures in it. One file, no network, no trust in what it shows."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_SVG = "http://www.w3.org/2000/svg"
_PICTURE = re.compile(r'<p><img src="([^"]*)" alt="([^"]*)" /></p>')


def page(markdown: str, pictures: Mapping[str, str]) -> str:
    """The whole page from the Markdown one, whose text is escaped already, and SVG pictures by file name."""
    # the Markdown page holds no HTML but its own <details>
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    body = _PICTURE.sub(lambda found: _inline(found[1], found[2], pictures), body)
    body = _named(body).replace("</table>", "</table></div>")
    headings = re.findall(r"<h2>(.*?)</h2>", body)
    for place, heading in enumerate(headings):
        body = body.replace(f"<h2>{heading}</h2>", f'<h2 id="part{place}">{heading}</h2>', 1)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined)
    script, style = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    return environment.get_template("report.html.j2").render(
        body=Markup(body),
        contents=[(place, Markup(heading)) for place, heading in enumerate(headings)],
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
    )


def _named(body: str) -> str:
    """Each table in a part that scrolls by itself, named after the heading or the fold above it."""
    name = ""

    def pass_by(found: re.Match[str]) -> str:
        nonlocal name
        if found[0] == "<table>":
            return f'<div class="wide" tabindex="0" role="region" aria-label="{name}"><table>'
        name = re.sub(r"<[^>]*>", "", found[0]).replace('"', "&quot;")
        return found[0]

    return re.sub(r"<(h[123]|summary)>.*?</\1>|<table>", pass_by, body, flags=re.DOTALL)


def _inline(name: str, alt: str, pictures: Mapping[str, str]) -> str:
    """A picture as part of the page, named for those who do not see it; what is a document's own goes, as do styles for all."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(pictures[name])
    for parent in root.iter():
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("style", "metadata", "title"):
                parent.remove(child)
    # two pictures have the same names for their own parts
    prefix, text = re.sub(r"\W", "_", name), ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r'\bid="', f'id="{prefix}_', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}_", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', _opened(alt), text, count=1)
    return f"<figure>{text}</figure>"


def _opened(alt: str) -> str:
    spaces = f'xmlns="{_SVG}" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return rf'<svg {spaces} \1 role="img" aria-label="{alt}">'


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
