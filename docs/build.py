"""Refresh what the pages take from the catalogue: the table of mechanisms in README.md."""

from __future__ import annotations

from pathlib import Path

from triton_attn import CATALOG
from triton_attn.report.markdown import mechanisms

README = Path(__file__).parent.parent / "README.md"
MARK = "<!-- triton-attn list --markdown -->\n"


def refreshed(page: str) -> str:
    """The page with the table after the mark made anew; the table ends at the next empty line."""
    before, _, rest = page.partition(MARK)
    return f"{before}{MARK}{mechanisms(CATALOG.values()).strip()}\n\n{rest.partition(chr(10) * 2)[2]}"


if __name__ == "__main__":
    README.write_text(refreshed(README.read_text()))
