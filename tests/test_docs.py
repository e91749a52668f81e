"""What README and docs say is true of the code."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import triton_attn
from triton_attn import CATALOG
from triton_attn.bench import Timing
from triton_attn.report.markdown import mechanisms

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def test_the_example_of_the_readme_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102  our own page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (page.parent / target).exists(), target


def test_the_table_of_mechanisms_is_the_catalogue_s() -> None:
    """`make docs` refreshes it."""
    (found,) = re.findall(r"<!-- triton-attn list --markdown -->\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found == mechanisms(CATALOG.values()).strip()


def test_every_mechanism_has_a_page_that_the_readme_links() -> None:
    text = (ROOT / "README.md").read_text()
    for name in CATALOG:
        assert f"(docs/{name}.md)" in text


def test_every_public_name_has_a_docstring() -> None:
    for name in triton_attn.__all__:
        if name != "CATALOG":
            assert getattr(triton_attn, name).__doc__, name


def built(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def test_the_lists_and_tables_of_the_site_are_what_the_code_makes() -> None:
    """`make docs` refreshes them."""
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert built("choose") == build.choice(built("choose"), built("speed"))
    assert built("choose") == build.pays(built("choose"), build.measured(build.LENGTHS))
    assert built("numbers") == build.numbers(build.measured(build.RESULTS))
    timing = Timing("attention", "dense", "n=8", "float32", "cpu", "forward", "portable", 1.0, "torch SDPA", 2.0, 2.0, 3, None)
    assert "| torch SDPA | 2 ms | 2.00 |" in build.numbers([timing])
    of_length = replace(timing, case="length 64", ratio=1.26)
    assert "| [attention](attention.md), dense | forward | 1.3 |" in build.pays(built("choose"), [of_length])
    for name, page in build.API.items():
        assert built(f"api/{name}") == build.api(*page)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):  # docs/site_hook.py adds the page of a new mechanism
        assert page.stem in CATALOG or str(page.relative_to(ROOT / "docs")) in navigation, page
