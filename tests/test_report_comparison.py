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
from triton_attn.report.caught import Kept


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
    assert changes(tmp_path, compiled=[dataclasses.replace(COMPILED, key="16bit d128")]) == []


def test_what_is_wrong_and_was_not_there_before_is_worse(tmp_path: Path) -> None:
    assert changes(tmp_path, compiled=[dataclasses.replace(COMPILED, key="16bit d128", fault="spills")]) == [
        ("no longer fits", "not run", "spills")
    ]
    stopped = dataclasses.replace(VERDICT, implementation="stopped", share=math.inf, fault="RuntimeError: boom")
    assert changes(tmp_path, verdicts=[VERDICT, stopped]) == [("wronger", "not run", "RuntimeError: boom")]


LINE = "forward_kernel:7 forgotten mask: a: b -> c"


def kept(*faults: tuple[str, str], source: str = "0") -> dict[str, Kept]:
    """(fault, its end) of one kernel."""
    caught, argued, survived = (sum(end.startswith(how) for _, end in faults) for how in ("caught", "changes", "survived"))
    told = tuple(f"{fault}: {end}" for fault, end in faults)
    return {"attention/pointers": Kept("triton-attn teeth", "3.9.0", source, len(faults), caught, argued, survived, told)}


@pytest.mark.parametrize(
    ("before", "after", "how"),
    [
        ("caught, OutOfBounds", "survived", "no longer caught"),
        ("changes nothing: never stored", "survived", "no longer caught"),
        ("survived", "caught, Race", "caught again"),
        ("survived", "survived", None),
        ("caught, OutOfBounds", "caught, Race", None),
        ("caught, OutOfBounds", "changes nothing: never stored", None),
    ],
)
@pytest.mark.parametrize("moved", [False, True], ids=["the same sources", "sources whose lines have moved"])
def test_a_seeded_fault_that_the_cases_no_longer_catch_is_worse(
    tmp_path: Path, before: str, after: str, how: str | None, moved: bool
) -> None:
    line = LINE.replace(":7", ":11") if moved else LINE
    first = report(tmp_path, "before", kept=kept((LINE, before)))
    second = report(tmp_path, "after", kept=kept((line, after), source="1" if moved else "0"))
    found = comparison.changes(comparison.read(first), comparison.read(second))
    told = LINE.replace(":7", "") if moved else LINE
    ends = (before.partition(",")[0].partition(":")[0], after.partition(",")[0].partition(":")[0])
    assert found == ([comparison.Change(f"attention/pointers {told}", *ends, how)] if how else [])
    assert [change.worse for change in found] == ([how == "no longer caught"] if how else [])


def test_a_fault_at_another_line_of_the_same_sources_is_another_and_equal_ones_are_told_apart(tmp_path: Path) -> None:
    def found(before: dict[str, Kept], after: dict[str, Kept]) -> list[str]:
        reports = [report(tmp_path, name, kept=each) for name, each in (("before", before), ("after", after))]
        return [change.how for change in comparison.changes(*map(comparison.read, reports))]

    other = LINE.replace(":7", ":9")
    assert found(kept((LINE, "caught, X")), kept((other, "survived"))) == []
    both = kept((LINE, "caught, X"), (other, "survived"))
    assert found(both, kept((LINE, "caught, X"), (other, "survived"), source="1")) == []
    assert found(both, kept((LINE, "survived"), (other, "survived"), source="1")) == ["no longer caught"]
    assert found(both, {}) == []


def test_a_report_without_faults_is_one_of_an_older_release(tmp_path: Path) -> None:
    path = report(tmp_path, "before", kept=kept((LINE, "survived")), stale=frozenset({"attention/pointers"}))
    record = json.loads(path.read_text())
    assert record["caught"]["attention/pointers"]["stale"] is True
    assert comparison.read(path).kept == kept((LINE, "survived"))
    del record["caught"]
    path.write_text(json.dumps(record))
    assert comparison.read(path).kept == {}


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
    "text",
    [
        "",
        "[]",
        "{}",
        '{"verify": 3}',
        '{"verify": [], "compile": [], "bench": [], "explain": [], "caught": {"a": {}}}',
        '{"verify": [], "compile": [], "bench": [{}], "explain": []}',
        "[" * 100_000,
    ],
)
def test_what_is_no_report_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: not a report\.json"):
        comparison.read(path)
