"""Two reports side by side: what counts as a change, and what is noise."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import COMPILED, TIMING, VERDICT, results
from triton_attn import cli
from triton_attn.report import comparison, folder


def report(tmp_path: Path, name: str, **changed: Any) -> Path:
    return folder.write(results(**changed), tmp_path / name).with_name(folder.DATA)


def changes(tmp_path: Path, **changed: Any) -> list[tuple[str, str, str]]:
    before, after = report(tmp_path, "before"), report(tmp_path, "after", **changed)
    found = comparison.changes(comparison.read(before), comparison.read(after))
    return [(change.how, change.before, change.after) for change in found]


def test_two_equal_reports_differ_in_nothing(tmp_path: Path) -> None:
    assert changes(tmp_path) == []


@pytest.mark.parametrize(
    ("ratio", "noise", "how"),
    [(1.44, 0.0, None), (1.56, 0.0, None), (1.3, 0.0, "slower"), (1.7, 0.0, "faster"), (1.3, 0.2, None), (1.0, 0.2, "slower")],
)
def test_a_timing_has_changed_if_its_ratio_moved_beyond_the_noise_of_both_runs(
    tmp_path: Path, ratio: float, noise: float, how: str | None
) -> None:
    found = changes(tmp_path, timings=[dataclasses.replace(TIMING, ratio=ratio, noise=noise)])
    assert found == ([(how, "1.50×", f"{ratio:.2f}×")] if how else [])


def test_a_machine_twice_as_slow_has_changed_nothing(tmp_path: Path) -> None:
    slow = dataclasses.replace(TIMING, milliseconds=2 * TIMING.milliseconds, peer_milliseconds=2 * TIMING.peer_milliseconds)
    assert changes(tmp_path, timings=[slow]) == []


@pytest.mark.parametrize(
    ("share", "fault", "how"),
    [(0.3, "", None), (0.5, "", "wronger"), (0.1, "", "righter"), (3.0, "3 times", "wronger"), (math.inf, "inf", "wronger")],
)
def test_a_check_has_changed_if_its_share_of_the_bound_moved(tmp_path: Path, share: float, fault: str, how: str | None) -> None:
    found = changes(tmp_path, verdicts=[dataclasses.replace(VERDICT, share=share, fault=fault)])
    assert [change[0] for change in found] == ([how] if how else [])


def test_a_kernel_that_no_longer_fits_is_worse_and_one_that_is_gone_is_not_compared(tmp_path: Path) -> None:
    assert changes(tmp_path, compiled=[dataclasses.replace(COMPILED, fault="spills 8 bytes")]) == [
        ("no longer fits", "fits", "spills 8 bytes")
    ]
    assert changes(tmp_path, compiled=[dataclasses.replace(COMPILED, key="16bit d128", fault="spills")]) == []


def test_the_command_ends_with_1_if_something_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = report(tmp_path, "before")
    slower = report(tmp_path, "slower", timings=[dataclasses.replace(TIMING, ratio=0.5)])

    def ended(*arguments: Path, json: bool = False) -> tuple[object, str]:
        with pytest.raises(SystemExit) as exited:
            cli.main(["report", "--compare", *map(str, arguments), *(["--json"] if json else [])])
        said = capsys.readouterr()
        return exited.value.code, said.out + said.err

    assert ended(before, before)[0] == 0
    code, said = ended(before, slower)
    assert code == 1
    assert "slower, 1.50× before, 0.50× now" in said
    assert ended(slower, before)[0] == 0
    assert len(json.loads(ended(before, slower, json=True)[1])["worse"]) == 1
    (tmp_path / "torn.json").write_text(before.read_text()[:100])
    for bad in (tmp_path / "torn.json", tmp_path / "absent.json"):
        code, said = ended(before, bad)
        assert (code, bad.name in said) == (2, True)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"verify": 3}', '{"verify": [], "compile": [], "bench": [{}], "explain": []}', "[" * 100_000]
)
def test_what_is_no_report_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: not a report\.json"):
        comparison.read(path)
