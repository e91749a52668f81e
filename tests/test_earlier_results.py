"""What the report shows of earlier runs: timings at full sizes, and candidates that were compiled."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import CALL, COMPILED, FIRST, RANKED, TIMING, page, results
from tests.test_tuning import CANDIDATES, H200, ROW, SMALL
from triton_attn import device, tiles
from triton_attn.mechanism import Case
from triton_attn.offline import Part
from triton_attn.report import candidates, earlier, folder, gather, markdown, tile_tables
from triton_attn.report.candidates import Candidates
from triton_attn.report.earlier import Earlier
from triton_attn.report.tables import Table
from triton_attn.tiles import Usage
from triton_attn.tuning import ranking, tune
from triton_attn.tuning.ranking import Built

pytest.importorskip("triton")


# timings


def test_a_timing_takes_the_place_of_the_last_one_of_the_same_call_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.jsonl"
    other = dataclasses.replace(TIMING, peer="another")
    for row in (TIMING, other, dataclasses.replace(TIMING, milliseconds=9.0)):
        earlier.keep(row, path)
    assert earlier.read(path) == [dataclasses.replace(TIMING, milliseconds=9.0), other]
    assert not list(path.parent.glob("*.partial"))
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match=r"bench\.jsonl: no timings"):
        earlier.read(path)
    earlier.keep(TIMING, path)
    assert earlier.read(path) == [TIMING]


def test_the_last_bench_of_this_machine_counts_before_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier, "BENCH", tmp_path / "bench.jsonl")
    monkeypatch.setattr(earlier, "COMMITTED", tmp_path / "cpu.jsonl")
    assert earlier.find() == Earlier()
    earlier.keep(TIMING, earlier.COMMITTED)
    assert earlier.find() == Earlier("benchmarks/results/cpu.jsonl, on another machine", [TIMING])
    earlier.keep(dataclasses.replace(TIMING, peer="mine"))
    found = earlier.find()
    assert found.said.startswith("the last `make bench` here, 20")
    assert [row.peer for row in found.timings] == ["mine"]


def test_what_is_committed_can_be_read() -> None:
    assert {row.where for row in earlier.read(earlier.COMMITTED)} == {"cpu"}


def test_the_page_shows_them_apart_from_its_own() -> None:
    said = page(results(earlier=Earlier("the last one", [dataclasses.replace(TIMING, case="a long one")])))
    assert "of the last one:" in said
    assert said.index("a long one") > said.index("### At full sizes")
    assert "not run: `make bench`" in page(results())


# candidates


def built(task: tune.Task, tile: tiles.Tile, registers: int) -> Built:
    made = ranking._empty(task, tile, "sm_90", task.hash)
    return dataclasses.replace(made, parts=(Part(640 // tile.block_m, Usage(registers, 0, 1024 * tile.block_n, 4, 8, 0)),))


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tune.Task:
    """One task, whose candidates lie compiled in a folder; a compiler that says the same of them."""
    monkeypatch.setattr(tiles.Space, "of", lambda self, capability, key: CANDIDATES)
    task = tune.plan([ROW], lambda row: [SMALL], ["bfloat16"], H200)[1]
    monkeypatch.setattr(ranking, "_compile", lambda packed: built(task, tiles.Tile.parse(packed[-1].tile), 64))
    keep(tmp_path, [built(task, tile, 64) for tile in CANDIDATES])
    entry = {"hash": task.hash, "evidence": "offline", "tiles": {str(task.key.anywhere): CANDIDATES[1]}}
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(device, "USER_TABLE", str(tmp_path / "user"))
    tiles.write(tmp_path / "shipped" / "sm_90.json", {task.name: entry}, {})
    return task


def keep(folder: Path, lines: list[Built]) -> None:
    (folder / "sm_90.compiled.jsonl").write_text("".join(json.dumps(dataclasses.asdict(line)) + "\n" for line in lines))


def test_candidates_are_found_with_the_tile_that_a_call_gets(forward: tune.Task, tmp_path: Path) -> None:
    (found,), wrong = candidates.find([ROW], ["sm_90", "sm_86"], tmp_path)
    assert wrong == []
    assert sorted(row.tile for row in found.ranked) == sorted(map(str, CANDIDATES))
    assert (found.gets, found.source) == (str(CANDIDATES[1]), "shipped table sm_90.json (offline)")
    assert found.over_the_best(found.ranked[0].tile) == 1.0
    (cells,) = tile_tables.candidates([found]).cells
    assert cells[0] == "attention/pointers/forward"
    assert cells[5] == found.place(found.gets) != "-"
    assert cells[-2:] == ("3", "3")


def test_candidates_of_other_sources_or_not_all_of_them_are_not_shown(forward: tune.Task, tmp_path: Path) -> None:
    whole = [built(forward, tile, 64) for tile in CANDIDATES]
    for lines in (
        whole[:-1],
        [dataclasses.replace(line, hash="old") for line in whole],
        [dataclasses.replace(whole[0], triton="1.0"), *whole[1:]],
    ):
        keep(tmp_path, lines)
        assert candidates.find([ROW], ["sm_90"], tmp_path) == ([], [])
    assert candidates.find([ROW], ["sm_90"], tmp_path / "nowhere") == ([], [])


def test_a_candidate_that_compiles_to_something_else_is_wrong(forward: tune.Task, tmp_path: Path) -> None:
    keep(tmp_path, [built(forward, tile, 65) for tile in CANDIDATES])
    _, (wrong,) = candidates.find([ROW], ["sm_90"], tmp_path)
    assert wrong.endswith(f"{CANDIDATES[1]}: compiled to something else than is kept")


def shown(*times: float | None) -> Candidates:
    rows = [
        dataclasses.replace(RANKED, tile=str(tile), place=place, milliseconds=time, fault="" if time else "spills 8 bytes")
        for place, (tile, time) in enumerate(zip(CANDIDATES, times, strict=True), 1)
    ]
    return Candidates(tuple(rows), str(CANDIDATES[1]), "shipped table", "16x16 w1 s1")


def test_the_page_shows_candidates_as_a_picture_and_a_table_each(tmp_path: Path) -> None:
    written = folder.write(results(candidates=[shown(1.0, 2.5, None)]), tmp_path)
    text = (tmp_path / folder.MARKDOWN).read_text()
    assert "2.50×" in text
    assert "3 candidates</summary>" in text
    assert "spills 8 bytes" in text
    assert "candidates.svg" in text
    assert written.read_text().count("<svg") == 3
    assert json.loads((tmp_path / folder.DATA).read_text())["candidates"][0]["gets"] == str(CANDIDATES[1])
    none = folder.write(results(candidates=[shown(None, None, None)]), tmp_path)
    assert none.read_text().count("<svg") == 2
    assert "not run with these sources and this compiler" in page(results())


def test_a_run_of_the_report_takes_both_and_says_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: tune.Task
) -> None:
    monkeypatch.setattr(gather, "_part", lambda *args: [])
    monkeypatch.setattr(candidates, "KEPT", tmp_path)
    monkeypatch.setattr(earlier, "BENCH", tmp_path / "bench.jsonl")
    earlier.keep(TIMING)
    earlier.keep(dataclasses.replace(TIMING, mechanism="of another release"))

    def gathered(**machine: Any) -> Any:
        given = {"triton": "3.9.0", "interpreter": False, "gpus": [], **machine}
        return gather.gather({"attention": ROW}, given, targets=["sm_90"], device="cpu", seconds=1.0)

    found = gathered()
    assert [row.mechanism for row in found.earlier.timings] == ["attention"]
    assert gathered(interpreter=True).candidates == []
    earlier.BENCH.write_text("{")
    assert "bench.jsonl: no timings" in gathered().faults[-1]


# tables that fold, and what nobody has tuned


@pytest.mark.parametrize(("rows", "opened"), [(3, None), (markdown.SHORT + 1, True), (markdown.LONG + 1, False)])
def test_a_long_table_folds_and_a_very_long_one_is_folded(rows: int, opened: bool | None) -> None:
    text = str(markdown.folded(Table(("a",), [("x",)] * rows), "Rows <b>"))
    assert text.startswith("|" if opened is None else f"<details{' open' if opened else ''}><summary>Rows &lt;b&gt;: {rows} rows</summary>")


def test_launches_without_a_tuned_tile_are_told_with_the_tile_they_get() -> None:
    tuned, guessed = (
        "tile 64x64 w4 s2, user table h200.json (tuned on NVIDIA H200, triton 3.9)",
        "tile 16x16 w4 s1, first of its tile space",
    )
    call = dataclasses.replace(CALL, where="sm_90", tiles={"forward": tuned, "split": guessed})
    table = tile_tables.uncovered([call])
    assert table.cells == [(FIRST, "sm_90", "b=1 h=8", "float32", "split", "16x16 w4 s1", "first of its tile space")]
    assert "Launches of these workloads without a tuned tile" in page(
        results(explained=[dataclasses.replace(call, tiles={f"{i}": guessed for i in range(20)})])
    )
    assert "first of its tile space" in page(results(explained=[call]))


def test_resources_are_the_most_of_a_mechanisms_launches_on_a_target() -> None:
    assert COMPILED.usage is not None
    hungry = dataclasses.replace(
        COMPILED, usage=dataclasses.replace(COMPILED.usage, registers=250, spilled=8), blocks=1, fault="spills 8 bytes"
    )
    broken = dataclasses.replace(COMPILED, target="sm_80", usage=None, blocks=0, fault="does not compile")
    table = tile_tables.resources([COMPILED, hungry, broken])
    assert table.cells == [(FIRST, "sm_90", "1 of 2", "250", "8", "16384", "1"), (FIRST, "sm_80", "0 of 1", "-", "-", "-", "-")]
    assert table.wrong == {0, 1}


def test_a_case_that_is_not_of_the_workloads_is_no_task(forward: tune.Task, tmp_path: Path) -> None:
    other = dataclasses.replace(ROW, workloads={"cuda": (Case("other", {**SMALL.sizes, "m": 40, "n": 40}, {}),), "cpu": ()})
    assert candidates.find([other], ["sm_90"], tmp_path) == ([], [])
