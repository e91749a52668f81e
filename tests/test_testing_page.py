"""docs/testing.md: its kernel fails as the page says, its fix mends it, and bite finds what a weak test misses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "testing.md").read_text()
BLOCKS = dict(re.findall(r"```python (\S+)\n(.*?)```", PAGE, re.DOTALL))
SAID = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)


def run_tests(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "test_row_softmax.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("row_softmax.py", "test_row_softmax.py"):
        (tmp_path / name).write_text(BLOCKS[name])
    (tmp_path / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n")
    return tmp_path


def test_the_kernel_of_the_page_fails_with_the_message_of_the_page(folder: Path) -> None:
    output = run_tests(folder).stdout
    for line in SAID[0].strip().splitlines():
        assert line.strip() in output


def test_the_fix_of_the_page_mends_it(folder: Path) -> None:
    wrong = next(line for line in BLOCKS["row_softmax.py"].splitlines() if "tl.load" in line)
    (folder / "row_softmax.py").write_text(BLOCKS["row_softmax.py"].replace(wrong, BLOCKS["fix"].strip("\n")))
    done = run_tests(folder)
    assert done.returncode == 0, done.stdout
    wanted, printed = SAID[1].strip().rsplit(" ", 1), re.search(r"^\.?(.*) (\d\.\d\d)$", done.stdout, re.MULTILINE)
    assert printed is not None, done.stdout
    assert printed[1] == wanted[0]
    assert 0.1 < float(printed[2]) < 1  # numpy's exponential is each processor's own, so the share is too
