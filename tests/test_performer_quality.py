"""The quality script measures what it says: more features err less, and orthogonal ones err less where scores are small."""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "performer_quality.py"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    spec = importlib.util.spec_from_file_location("performer_quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_error_falls_like_one_over_the_root_of_the_features(quality: ModuleType) -> None:
    errors = quality.measure([0.25], [64, 1024], draws=4, tokens=64)
    few, many = (statistics.fmean(errors[0.25, "orthogonal", count]) for count in (64, 1024))
    assert 2.5 < few / many < 6.5  # sixteen times the features: 4


def test_orthogonal_features_err_less_than_independent_ones(quality: ModuleType) -> None:
    errors = quality.measure([0.25], [256], draws=8, tokens=64)
    orthogonal, independent = (statistics.fmean(errors[0.25, kind, 256]) for kind in ("orthogonal", "independent"))
    assert orthogonal < 0.95 * independent


def test_it_prints_a_row_for_each_and_draws(quality: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "quality.png"
    assert quality.main(["--spreads", "0.5", "--features", "8", "16", "--draws", "2", "--tokens", "12", "--draw", str(drawn)]) == 0
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["| 0.5", "8"], ["| 0.5", "16"]]
    assert drawn.read_bytes().startswith(b"\x89PNG")
