"""Ranking candidates without a GPU: compiled once, ordered by prediction, set beside the hand order and beside what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.test_tuning import CANDIDATES, CPU, H200, ROW, SMALL, FakeClock
from triton_attn import device, offline, tiles
from triton_attn.command_line import BadArgument
from triton_attn.offline import Part
from triton_attn.report import tile_tables
from triton_attn.tiles import Tile, Usage
from triton_attn.tuning import command, ranking, tune
from triton_attn.tuning.ranking import HAND, Built, Correlation
from triton_attn.tuning.tune import Task, Trial

pytest.importorskip("triton")

SPILLING = Tile(64, 64, 4, 3)
FOUR = (SPILLING, *CANDIDATES)
compiled: list[str] = []


def compile_quickly(packed: Any) -> Built:
    """What a compiler might say: one tile spills, the others differ in their registers."""
    built: Built = packed[-1]
    tile = Tile.parse(built.tile)
    compiled.append(built.tile)
    usage = Usage(32 + tile.block_m + tile.block_n, 8 if tile == SPILLING else 0, 1024 * tile.block_n, tile.num_warps, 8, 0)
    return replace(built, parts=(Part(640 // tile.block_m, usage),))


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled.clear()
    monkeypatch.setattr(ranking, "_compile", compile_quickly)
    monkeypatch.setattr(tiles.Space, "of", lambda self, capability, key: FOUR)
    monkeypatch.setattr(device, "USER_TABLE", str(tmp_path / "user"))


def tasks(count: int = 2) -> list[Task]:
    return tune.plan([ROW], lambda row: [SMALL], ["bfloat16"], H200)[:count]


def ranked(folder: Path, **options: Any) -> list[tuple[Task, list[ranking.Ranked]]]:
    return list(ranking.rank(options.pop("tasks", tasks()), "sm_90", folder, **options))


def test_every_candidate_is_ranked_and_one_that_spills_comes_last_though_first_in_the_hand_order(tmp_path: Path) -> None:
    for task, rows in ranked(tmp_path):
        assert sorted(row.tile for row in rows) == sorted(map(str, FOUR))
        assert [row.place for row in rows] == [1, 2, 3, 4]
        times = [row.milliseconds for row in rows[:-1]]
        assert times == sorted(times)  # type: ignore[type-var]
        assert (rows[-1].tile, rows[-1].listed, rows[-1].milliseconds, rows[-1].fault) == (str(SPILLING), 1, None, "spills 8 bytes")
        assert (task.name, str(task.key)) == (rows[0].launch, rows[0].key)


def test_what_was_compiled_is_not_compiled_again_but_for_other_sources_sizes_compilers_or_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ranked(tmp_path)
    assert len(compiled) == 2 * 4
    assert ranked(tmp_path) == before
    assert len(compiled) == 8
    larger = replace(SMALL, sizes={**SMALL.sizes, "b": 2})
    ranked(tmp_path, tasks=tune.plan([ROW], lambda row: [larger], ["bfloat16"], H200)[:1])
    assert len(compiled) == 12
    ranked(tmp_path, anew=True)
    assert len(compiled) == 20
    monkeypatch.setattr(tiles, "source_hash", lambda modules: "of another kernel")
    ranked(tmp_path)
    assert len(compiled) == 28
    monkeypatch.setattr(device, "triton_version", lambda: "9.9.9")
    ranked(tmp_path)
    assert len(compiled) == 36


def test_a_killed_run_goes_on_where_it_was_and_half_a_line_is_passed_over(tmp_path: Path) -> None:
    whole = ranked(tmp_path)
    path = tmp_path / "sm_90.compiled.jsonl"
    lines = path.read_text().splitlines()
    path.write_bytes("\n".join(lines[:5]).encode() + b"\n" + lines[5].encode()[:-20] + b"\xff\n[]\n{}\n3\n")
    compiled.clear()
    assert ranked(tmp_path) == whole
    assert len(compiled) == 3
    assert len(ranking.read_built(path)) == 8


def test_past_its_budget_no_key_begins(tmp_path: Path) -> None:
    assert ranked(tmp_path, seconds=-1.0) == []
    assert compiled == []


def test_a_tile_that_does_not_compile_comes_last_with_the_compilers_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def broken(*args: Any) -> list[Part]:
        raise RuntimeError("ptxas says no\nand more")

    monkeypatch.setattr(offline, "parts", broken)
    monkeypatch.setattr(tiles.Space, "of", lambda self, capability, key: CANDIDATES)
    ((task, rows),) = ranked(tmp_path, tasks=tasks(1))
    assert {row.fault for row in rows} == {"does not compile: RuntimeError: ptxas says no"}
    assert list(ranking.correlations(task, rows)) == [Correlation(task.name, str(task.key), "sm_90", HAND, 0, None)]


def trial(task: Task, tile: str, milliseconds: float | None, **changed: Any) -> Trial:
    made = Trial(task.name, str(task.key), tile, "", "bfloat16", "NVIDIA H200", "3.9.0", task.hash, milliseconds, target="sm_90")
    return replace(made, **changed)


def test_the_predicted_order_is_set_beside_measured_times_of_devices_of_the_same_capability(tmp_path: Path) -> None:
    ((task, rows),) = ranked(tmp_path, tasks=tasks(1))
    right = [row for row in rows if not row.fault]
    backwards = [trial(task, row.tile, 1.0 / row.place, device="NVIDIA H100") for row in right]
    others = [
        trial(task, right[0].tile, 9.0, target="sm_80", device="NVIDIA A100"),
        trial(task, right[0].tile, 9.0, hash="of another kernel", device="old"),
        trial(task, str(SPILLING), None, fault="spills"),
    ]
    same = [trial(task, row.tile, float(row.place)) for row in right]
    found = list(ranking.correlations(task, rows, [*same, *backwards, *others]))
    assert [(each.beside, each.tiles) for each in found[1:]] == [("NVIDIA H200", 3), ("NVIDIA H100", 3)]
    assert [each.spearman for each in found[1:]] == [pytest.approx(1.0), pytest.approx(-1.0)]
    assert (found[0].beside, found[0].tiles) == (HAND, 3)


def test_trials_that_a_gpu_left_in_the_folder_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tasks(1)[0]
    measured = [trial(task, str(tile), time) for tile, time in zip(CANDIDATES, (1.0, 2.0, 3.0), strict=True)]
    (tmp_path / "nvidia_h200.trials.jsonl").write_text("".join(f"{json.dumps(asdict(each))}\n" for each in measured))
    assert ranking.measured_in(tmp_path) == measured
    assert command.show_ranks([ROW], ["sm_90"], tmp_path, [], ["bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "hand order" in said
    assert "NVIDIA H200" in said
    assert "5 keys ranked by a model that no GPU has confirmed: all right" in said
    assert "spills 8 bytes" in said


def test_as_json_every_candidate_and_correlation_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.show_ranks([ROW], ["sm_80", "sm_90"], tmp_path, ["n=12", "m=12"], ["bfloat16"], as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["target"] for line in lines} == {"sm_80", "sm_90"}
    assert sum("place" in line for line in lines) == (4 + 5) * 4
    assert sum("spearman" in line for line in lines) == 4 + 5
    assert all("m=12 n=12" in line["sizes"] for line in lines if "sizes" in line)


def test_the_command_says_when_no_tile_may_run_and_what_had_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.show_ranks([ROW], ["sm_90"], tmp_path, [], ["bfloat16"], budget=-1.0) == 0
    assert "sm_90: 5 keys had no time" in capsys.readouterr().err
    monkeypatch.setattr(tiles.Space, "of", lambda self, capability, key: (SPILLING,))
    assert command.show_ranks([ROW], ["sm_90"], tmp_path, [], ["bfloat16"]) == 1
    assert "no tile may run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": True}, "--rank is given without --offline"),
        ({"rank": True, "offline": True, "check": True}, "--rank is given with --check"),
        ({"rank": True, "offline": True, "target": "sm_86"}, "target is 'sm_86'; allowed: sm_80, sm_90"),
        ({"rank": True, "offline": True, "dtype": ["int8"]}, "dtype is 'int8'; allowed: bfloat16"),
        ({"rank": True, "offline": True, "names": ["attention"], "size": ["x=3"]}, "size is 'x=3'"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str) -> None:
    monkeypatch.setattr(device, "interpreting", lambda: False)
    with pytest.raises(BadArgument, match=said):
        command.tune(**options)


# on a GPU


def test_a_trial_on_a_gpu_holds_the_prediction_and_the_end_of_tuning_tells_how_far_it_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiles.Space, "of", lambda self, capability, key: CANDIDATES)
    monkeypatch.setattr(device, "profile", lambda index: H200)
    guesses = {tile: float(place) for place, tile in enumerate(CANDIDATES, 1)}
    monkeypatch.setattr(tune, "_predicted", lambda task, tile, call, profile: guesses[tile])
    assert command.run([ROW], CPU, tmp_path, dtypes=("float16",), clock=FakeClock(3.0, 2.0, 1.0)) == 0
    said = capsys.readouterr().out
    assert command.PREDICTED in said
    assert said.count("-1.00") == 5
    trials = ranking.measured_in(tmp_path)
    assert {(each.tile, each.predicted, each.target) for each in trials} == {(str(tile), guesses[tile], "sm_90") for tile in CANDIDATES}
    assert [each.spearman for each in ranking.of_trials(trials)] == [pytest.approx(-1.0)] * 5


def test_a_prediction_on_a_gpu_is_made_of_the_grid_and_the_kernels_of_the_call_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = Usage(64, 0, 1024, 4, 8, 0)

    class Recorded:
        def __enter__(self) -> list[offline.Launched]:
            return [offline.Launched("kernel", 40)]

        def __exit__(self, *error: object) -> None:
            pass

    task = tasks(1)[0]
    assert tune._predicted(task, CANDIDATES[0], lambda: None, H200) is None  # the interpreter compiles nothing
    monkeypatch.setattr(offline, "recording", Recorded)
    monkeypatch.setattr(offline, "usage", lambda kernel: usage)
    found = tune._predicted(task, CANDIDATES[0], lambda: None, replace(H200, multiprocessors=132))
    expected = ranking.ordered(task, [Built(task.name, "", "", str(CANDIDATES[0]), "sm_90", "", "", (Part(40, usage),))], "sm_90")
    assert found == pytest.approx(expected[0].milliseconds)
    assert tune._predicted(task, CANDIDATES[0], lambda: None, replace(H200, capability=(8, 6))) is None


def test_tables_say_dash_where_nothing_was_compiled_and_too_few_where_nothing_can_be_compared() -> None:
    row = ranking.Ranked("a/b/c", "16bit d64", "m=1", "sm_90", "64x64 w4 s3", 1, 1, None, "may not run", None, None, None, 0, "spills")
    table = tile_tables.ranked([row])
    assert table.cells[0][2:7] == ("-", "-", "-", "0", "-")
    assert table.wrong == {0}
    cells = tile_tables.correlations([Correlation("a/b/c", "k", "sm_90", HAND, n, rho) for n, rho in ((2, None), (9, 0.5))]).cells
    assert [cell[-1] for cell in cells] == ["too few", "+0.50"]


@pytest.mark.slow
def test_the_compiler_itself_ranks_a_norm_and_the_second_time_compiles_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "triton_attn", "tune", "norm_matched_add", "--offline", "--rank", "--target", "sm_90"]
    line += ["--folder", str(tmp_path), "--json"]
    first, second = (
        subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=True).stdout for _ in range(2)
    )
    assert first == second
    rows = [json.loads(each) for each in first.splitlines()]
    assert all(row["registers"] > 0 and row["milliseconds"] > 0 and not row["fault"] for row in rows if "place" in row)
    assert len(ranking.read_built(tmp_path / "sm_90.compiled.jsonl")) == sum("place" in row for row in rows)
