"""The report's page in a real browser: `make test-browser`. Skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import COMPILED, HOSTILE, TIMING, VERDICT, hostile_results, results
from triton_attn.report import Results, folder

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make test-browser installs it")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and its driver are not installed")
WIDTHS = {"phone": 390, "desktop": 1280}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = selenium.Chrome(options=options, service=Service(DRIVER))
    yield opened
    opened.quit()


def visit(browser: Any, given: Results, tmp_path: Path, width: int = 1280, **media: str) -> None:
    page = folder.write(given, tmp_path)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def many() -> Results:
    """Rows in no order, and some of every kind of cell."""
    from dataclasses import replace

    shares = [0.5, 0.02, 1.0, 0.3]
    verdicts = [replace(VERDICT, case=f"case {i}", share=share) for i, share in enumerate(shares)]
    compiled = [replace(COMPILED, key=f"16bit d{d}", fault=fault) for d, fault in ((64, ""), (128, "spills 8 bytes"))]
    timings = [replace(TIMING, case=f"length {n}", milliseconds=n / 100, peer_milliseconds=n / 50) for n in (256, 1024, 512)]
    return results(verdicts=verdicts, compiled=compiled, timings=timings)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_the_page_fits_its_window_and_says_nothing_on_the_console(browser: Any, tmp_path: Path, width: int) -> None:
    visit(browser, many(), tmp_path, width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.querySelectorAll('figure svg').length") == 3
    sizes = browser.execute_script("return [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)")
    assert min(sizes) > 50


def column(browser: Any, table: Any, place: int) -> list[str]:
    script = "return [...arguments[0].tBodies[0].rows].map(row => row.cells[arguments[1]].textContent)"
    return browser.execute_script(script, table, place)  # type: ignore[no-any-return]


def test_tables_sort_by_click_and_by_keyboard_and_parts_fold(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    visit(browser, many(), tmp_path)
    fold = browser.find_element(By.XPATH, "//details[starts-with(summary, 'Every check')]")
    assert not fold.get_property("open")
    fold.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert fold.get_property("open")
    table = fold.find_element(By.TAG_NAME, "table")
    titles = table.find_elements(By.TAG_NAME, "th")
    place = next(i for i, title in enumerate(titles) if title.text.startswith("worst share"))
    assert column(browser, table, place) == ["50 %", "2.0 %", "100 %", "30 %"]
    titles[place].find_element(By.TAG_NAME, "button").click()
    assert column(browser, table, place) == ["2.0 %", "30 %", "50 %", "100 %"]
    assert titles[place].get_attribute("aria-sort") == "ascending"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert column(browser, table, place) == ["100 %", "50 %", "30 %", "2.0 %"]
    assert titles[place].get_attribute("aria-sort") == "descending"


def test_hostile_text_in_every_field_is_text(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    visit(browser, hostile_results(), tmp_path)
    assert browser.get_log("browser") == []
    assert browser.find_elements(By.CSS_SELECTOR, "main img, main script, main a, main iframe, main h1 + h1") == []
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1
    assert "onerror" in browser.find_element(By.TAG_NAME, "main").text
    assert HOSTILE.split("|")[0] in browser.find_element(By.TAG_NAME, "main").get_property("textContent")


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_page_follows_the_colours_that_the_reader_prefers(browser: Any, tmp_path: Path, scheme: str, dark: bool) -> None:
    visit(browser, many(), tmp_path, prefers_color_scheme=scheme)
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(colour.split("(")[1].split(",")[0]) < 100) == dark


def test_the_page_prints_in_black_on_white_and_within_the_paper(browser: Any, tmp_path: Path) -> None:
    paper = 700  # A4's width less its margins
    visit(browser, many(), tmp_path, paper, prefers_color_scheme="dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.execute_script("return getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert browser.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"
        browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
        widest = "return Math.max(...[...document.querySelectorAll('table')].map(table => table.getBoundingClientRect().right))"
        assert browser.execute_script(widest) <= paper
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_nothing_but_the_file_is_asked_for(browser: Any, tmp_path: Path) -> None:
    visit(browser, many(), tmp_path)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
