"""Seeded faults of an earlier run: kept in a file, read back with care, and shown in the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import page, results
from triton_attn import CATALOG, cli
from triton_attn import teeth as planting
from triton_attn.report import caught, gather, tables
from triton_attn.teeth import Tooth

pytest.importorskip("triton")

TOOTH = Tooth(
    "add_layer_norm", "rows", "triton_attn.kernels.add_layer_norm.forward_kernel", 7, "forgotten mask", "a -> b", "OutOfBounds: x", "", 0.1
)
ARGUED = replace(TOOTH, line=8, caught="", equivalent="never stored")
SURVIVOR = replace(TOOTH, line=9, caught="")
NAME = "add_layer_norm/rows"
WHOLE = {"command": "", "triton": "", "hash": "", "planted": 3, "caught": 1, "argued": 1, "survived": 1, "faults": []}


def test_what_is_kept_is_counted_and_told_and_other_kernels_stay(tmp_path: Path) -> None:
    path = tmp_path / "new" / "teeth.json"
    caught.keep(path, [TOOTH, ARGUED, SURVIVOR], CATALOG, "triton-attn teeth add_layer_norm")
    caught.keep(path, [replace(TOOTH, mechanism="norm_matched_add")], CATALOG, "triton-attn teeth norm_matched_add --some 1 --seed 0")
    kept = caught.read(path)
    assert list(kept) == [NAME, "norm_matched_add/rows"]
    entry = kept[NAME]
    assert (entry.planted, entry.caught, entry.argued, entry.survived) == (3, 1, 1, 1)
    assert entry.faults == (
        "forward_kernel:7 forgotten mask: a -> b: caught, OutOfBounds",
        "forward_kernel:8 forgotten mask: a -> b: changes nothing: never stored",
        "forward_kernel:9 forgotten mask: a -> b: survived",
    )
    caught.keep(path, [TOOTH], CATALOG, "again")
    assert (caught.read(path)[NAME].planted, caught.read(path)[NAME].command) == (1, "again")
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 2, "kernels": {}}',
        '{"schema": 1, "kernels": []}',
        '{"schema": 1, "kernels": {"a": {}}}',
        json.dumps({"schema": 1, "kernels": {"a": {**WHOLE, "survived": 0}}}),
        json.dumps({"schema": 1, "kernels": {"a": {**WHOLE, "caught": 3, "survived": -1}}}),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "teeth.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"teeth\.json: no kept faults: "):
        caught.read(path)


def test_the_report_shows_each_kernel_or_says_not_run() -> None:
    kept = {NAME: caught.Kept("triton-attn teeth add_layer_norm", "3.9.0", "0", 9, 7, 1, 1)}
    table = tables.caught(kept, {NAME}, CATALOG)
    by_name = {cells[0]: cells[1:] for cells in table.cells}
    assert by_name[NAME] == ("9", "7", "1", "1", "triton-attn teeth add_layer_norm, triton 3.9.0; the kernel has changed since")
    assert by_name["attention/pointers"] == ("not run", "not run", "not run", "not run", "")
    assert {table.cells[place][0] for place in table.wrong} == {NAME}
    assert len(table.cells) == sum(len(row.kernels) for row in CATALOG.values())
    assert "the kernel has changed since" in page(results(kept=kept, stale=frozenset({NAME})))
    assert "| not run | not run | not run | not run |" in page(results())


def test_a_run_of_the_report_finds_them_and_says_which_are_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caught, "KEPT", tmp_path / "teeth.json")
    gather._caught(found := results())
    assert (found.kept, found.faults) == ({}, [])
    caught.keep(caught.KEPT, [TOOTH, replace(TOOTH, mechanism="norm_matched_add")], CATALOG, "x")
    caught.KEPT.write_text(caught.KEPT.read_text().replace('"hash": "', '"hash": "0', 1))
    gather._caught(found := results())
    assert (set(found.kept), set(found.stale)) == ({NAME, "norm_matched_add/rows"}, {NAME})
    caught.KEPT.write_text("{")
    gather._caught(found := results())
    assert "teeth.json: no kept faults" in found.faults[0]


def test_the_command_keeps_what_it_finds_and_refuses_a_file_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(*args: Any, **options: Any) -> list[Tooth]:
        return [TOOTH, ARGUED]

    monkeypatch.setattr(planting, "teeth", found)
    path = tmp_path / "teeth.json"
    arguments = ["teeth", "add_layer_norm", "--some", "2", "--seed", "5", "--keep", str(path), "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    assert caught.read(path)[NAME].command == "triton-attn teeth add_layer_norm --some 2 --seed 5"
    assert len(capsys.readouterr().out.splitlines()) == 2
    path.write_text("{}")
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "no kept faults" in capsys.readouterr().err


def test_a_kernel_with_faults_left_keeps_its_entry_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def found(*args: Any, **options: Any) -> list[Tooth]:
        asked.update(options)
        options["left"][NAME] = "3 faults are left"
        return [TOOTH, replace(TOOTH, mechanism="norm_matched_add")]

    monkeypatch.setattr(planting, "teeth", found)
    path = tmp_path / "teeth.json"
    caught.keep(path, [TOOTH, ARGUED], CATALOG, "whole")
    with pytest.raises(SystemExit) as ended:
        cli.main(["teeth", "add_layer_norm", "norm_matched_add", "--keep", str(path), "--budget", "60", "--anew", "--json"])
    assert ended.value.code == 0
    assert (asked["budget"], asked["anew"], asked["evidence"]) == (60.0, True, tmp_path / "teeth.planted.jsonl")
    assert (caught.read(path)[NAME].command, caught.read(path)["norm_matched_add/rows"].planted) == ("whole", 1)
    assert f"{NAME}: 3 faults are left" in capsys.readouterr().err


def test_what_is_committed_is_of_kernels_that_exist_and_tells_each_fault() -> None:
    kept = caught.read(caught.KEPT)
    kernels = {f"{row.name}/{kernel.name}" for row in CATALOG.values() for kernel in row.kernels}
    assert kept
    assert set(kept) <= kernels
    for entry in kept.values():
        assert len(entry.faults) == entry.planted
        assert sum(fault.endswith(": survived") for fault in entry.faults) == entry.survived
        assert entry.command.startswith("triton-attn teeth ")
