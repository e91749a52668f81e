"""The documentation site as `make site` builds it: whole, readable at two widths, on its own. Skipped where it is not built, or older."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

import triton_attn
from tests.test_browser import CHROMIUM, DRIVER, WIDTHS, browser

__all__ = ["browser"]
ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "site"
BUILT = SITE / "index.html"
SOURCES = [ROOT / "mkdocs.yml", *(path for path in (ROOT / "docs").rglob("*.*") if path.suffix != ".pyc")]
PAGES = sorted(path for path in SITE.rglob("*.html") if path.name != "404.html")
CURRENT = BUILT.exists() and BUILT.stat().st_mtime >= max(path.stat().st_mtime for path in SOURCES)
pytestmark = pytest.mark.skipif(not CURRENT, reason="the site is not built, or older than docs: make site")
in_a_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and its driver are not installed")
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
WIDER = """
const inside = (part) => part && !part.classList.contains("md-content__inner") && getComputedStyle(part).overflowX !== "visible";
const held = (part) => { for (; part; part = part.parentElement) if (inside(part)) return true; return false; };
return [...document.querySelectorAll(".md-content__inner *")]
    .filter((part) => part.getBoundingClientRect().width && part.getBoundingClientRect().right > innerWidth + 1 && !held(part))
    .map((part) => part.tagName + " " + part.textContent.slice(0, 40));
"""


class Page(HTMLParser):
    """What a page loads, links to, can be linked at, and says."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.formulas, self.text, self._code = 0, "", 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loaded = given.get(LOADS.get(tag, ""))
        if loaded and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(loaded)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        self.places.update(value for name in ("id", "name") if (value := given.get(name)))
        self.formulas += tag == "math"
        self._code += tag in ("code", "pre", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.text += data


@pytest.fixture(scope="module")
def parsed() -> dict[Path, Page]:
    return {path: Page(path) for path in [*PAGES, SITE / "404.html"]}


def test_every_page_of_docs_is_a_page_of_the_site() -> None:
    assert {path.relative_to(SITE).with_suffix("") for path in PAGES} == {
        path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")
    }


def test_pages_load_nothing_from_elsewhere(parsed: dict[Path, Page]) -> None:
    for path, page in parsed.items():
        for loaded in page.loads:
            assert not re.match(r"(\w+:)?//", loaded), (path, loaded)
            if path.name != "404.html":  # which names its files from the server's root
                assert (path.parent / unquote(urldefrag(loaded).url)).exists(), (path, loaded)
    for sheet in SITE.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import ['\"]?http", sheet.read_text(encoding="utf-8")), sheet


def test_links_between_pages_lead_to_a_place_that_is_there(parsed: dict[Path, Page]) -> None:
    for path in PAGES:
        for link in parsed[path].links:
            target, place = urldefrag(link)
            if re.match(r"\w+:", target):
                continue
            there = (path.parent / unquote(target)).resolve() if target else path
            assert there.exists(), (path, link)
            if place and there in parsed:
                assert unquote(place) in parsed[there].places, (path, link)


def test_formulas_are_formulas(parsed: dict[Path, Page]) -> None:
    for path in PAGES:
        source = (ROOT / "docs" / path.relative_to(SITE)).with_suffix(".md").read_text(encoding="utf-8")
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", source, flags=re.DOTALL)
        assert parsed[path].formulas >= prose.count("$$") // 2
        assert "$$" not in parsed[path].text
        assert not re.search(r"\\(frac|sum|phi|mathrm|lVert)", parsed[path].text), path


def test_every_public_function_has_its_arguments_and_its_formula_on_the_page(parsed: dict[Path, Page]) -> None:
    page = parsed[SITE / "api" / "functions.html"]
    assert {f"triton_attn.{name}" for name in triton_attn.__all__ if callable(getattr(triton_attn, name))} <= page.places
    assert "scale <query_i, key_j>" in page.text
    assert "float32 (float64 for float64), differentiable" in page.text.replace("\n", " ")  # a result is one row


def visit(browser: Any, path: Path, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())


@in_a_browser
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_pages_fit_their_window_and_ask_for_nothing(browser: Any, width: int) -> None:
    for path in PAGES:
        visit(browser, path, width)
        assert browser.get_log("browser") == [], path
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, path
        assert browser.execute_script(WIDER) == [], path
        asked = browser.execute_script("return performance.getEntriesByType('resource').map(part => part.name)")
        assert [name for name in asked if not name.startswith("file:")] == [], path


def found(browser: Any, words: str) -> Iterator[str]:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    box = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    browser.execute_script("arguments[0].focus()", box)
    box.send_keys(words)
    results = (By.CSS_SELECTOR, ".md-search-result__link")
    WebDriverWait(browser, 10).until(lambda opened: opened.find_elements(*results))
    yield from (each.get_attribute("href") for each in browser.find_elements(*results))


@in_a_browser
@pytest.mark.parametrize("page", ["index.html", "migrate/torch.html"])
def test_a_search_works_from_a_file(browser: Any, page: str) -> None:
    visit(browser, SITE / page, WIDTHS["desktop"])
    assert (SITE / "dilated_attention.html").as_uri() in list(found(browser, "dilated"))


def test_pages_of_mechanisms_have_the_same_parts_in_the_same_order() -> None:
    order = ["how-it-computes", "tiles", "portable", "measured"]
    for name in triton_attn.CATALOG:
        html = (SITE / f"{name}.html").read_text(encoding="utf-8")
        call, formula, first = (html.find(part) for part in ('<div class="highlight"', '<p class="formula">', "<h2"))
        assert 0 < call < formula < first, name
        titles = [title for title in re.findall(r'<h2 id="([\w-]+)"', html) if title in order]
        assert titles == sorted(titles, key=order.index), name
        assert {"how-it-computes", "portable", "measured"} <= {*titles}, name
        assert "O(" in html, name  # what it costs
