"""The tuner, rehearsed without a GPU: kernels run in the interpreter, on a machine that says it is an H200 and has a clock of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_attn
from triton_attn import CATALOG, ArgumentError, device, operators, tiles, use_backend, verify
from triton_attn.command_line import BadArgument
from triton_attn.mechanism import Case
from triton_attn.tiles import Tile
from triton_attn.tuning import command
from triton_attn.tuning import tune as tuner
from triton_attn.tuning.ledger import Ledger, read_trials
from triton_attn.tuning.tune import Task, Trial

pytest.importorskip("triton")

H200 = device.Profile("NVIDIA H200", (9, 0), multiprocessors=1)
CPU = torch.device("cpu")
SMALL = Case("small", {"b": 1, "h": 1, "g": 1, "m": 10, "n": 10, "d": 16, "e": 16}, {"causal": True})
CANDIDATES = (Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 32, 4, 1))
ROW = replace(CATALOG["attention"], workloads={"cuda": (SMALL,), "cpu": (SMALL,)})


class FakeClock:
    """Runs each call and says the next of some times; counts how often it was asked."""

    def __init__(self, *times: float) -> None:
        self.times, self.asked = times, 0

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
        for call in calls:
            call()
        self.asked += 1
        return self.times[(self.asked - 1) % len(self.times)], 0.01


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(device, "profile", lambda index: H200)
    monkeypatch.setattr(tiles.Space, "of", lambda self, capability, key: CANDIDATES)
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(device, "USER_TABLE", str(tmp_path / "user"))
    tiles.use_tables(None)
    yield
    tiles.use_tables(None)


def plan(**sizes: int) -> list[Task]:
    case = Case("small", {**SMALL.sizes, **sizes}, SMALL.options)
    return tuner.plan([ROW], lambda row: [case], ["float16"], H200)


def run(folder: Path, clock: FakeClock, *, tasks: int = 2, **options: Any) -> list[tuple[Task, list[Trial]]]:
    ledger, found = Ledger(folder, H200), []
    for task, trials in tuner.tune(plan()[:tasks], CPU, profile=H200, clock=clock, known=ledger.known, tried=ledger.keep, **options):
        ledger.note(task, trials)
        found.append((task, trials))
    return found


def test_every_launch_of_every_kernel_that_serves_the_call_is_a_task_once() -> None:
    names = [task.name for task in plan()]
    launches = ("forward", "backward_query", "backward_key", "split")
    assert names == ["attention/descriptors/forward", *(f"attention/pointers/{launch}" for launch in launches)]
    assert {str(task.key) for task in plan()} == {"16bit d32 16x16 causal"}
    both = tuner.plan([ROW], lambda row: [SMALL, replace(SMALL, name="again")], ["float16", "bfloat16"], H200)
    assert [task.name for task in both] == names


def test_the_fastest_tile_wins_and_calls_of_such_lengths_get_it(tmp_path: Path) -> None:
    found = run(tmp_path / "user", FakeClock(3.0, 1.0, 2.0), tasks=5)
    assert all(tuner.winner(trials).tile == str(CANDIDATES[1]) for _, trials in found)  # type: ignore[union-attr]
    for task, trials in found:
        assert [trial.milliseconds for trial in trials] == [3.0, 1.0, 2.0]
        assert all(trial.share is not None and trial.share < 1 and not trial.fault for trial in trials)
        looked = tiles.look_up(task.name, task.space, task.key, H200)
        assert (looked.tile, looked.stale) == (CANDIDATES[1], False)
        assert looked.source.startswith("user table nvidia_h200.json (tuned on NVIDIA H200, triton")
    table = json.loads((tmp_path / "user" / "nvidia_h200.json").read_text())
    assert table["launches"]["attention/pointers/forward"]["milliseconds"] == {"16bit d32 16x16 causal": 1.0}
    assert {"torch", "triton", "ptxas", "gpus"} <= table["made"].keys()


def test_a_tile_that_is_wrong_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.kernel_run

    def wrong(row: Any, code: Any, tile: Any = None) -> Any:
        good = right(row, code, tile)

        def run(*args: Any) -> Any:
            outputs, gradients = good(*args)
            return ([outputs[0] * 1.5, *outputs[1:]], gradients) if CANDIDATES[1] in tile.values() else (outputs, gradients)

        return run

    monkeypatch.setattr(verify, "kernel_run", wrong)
    clock = FakeClock(3.0, 2.0)
    for _, trials in run(tmp_path, clock):
        assert "times its bound" in trials[1].fault
        assert trials[1].milliseconds is None
        assert tuner.winner(trials).tile == str(CANDIDATES[2])  # type: ignore[union-attr]
    assert clock.asked == 2 * 2


def test_a_tile_that_cannot_be_launched_is_a_fault_and_the_others_go_on(tmp_path: Path) -> None:
    def clock(calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
        raise RuntimeError("out of resource: shared memory\nRequired: 1")

    found = list(tuner.tune(plan()[:1], CPU, profile=H200, clock=clock))
    (trials,) = (trials for _, trials in found)
    assert [trial.fault for trial in trials] == ["RuntimeError: out of resource: shared memory"] * 3
    assert Ledger(tmp_path, H200).note(found[0][0], trials) is None
    assert not (tmp_path / "nvidia_h200.json").exists()


def test_a_second_run_times_nothing_again_but_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, FakeClock(3.0, 1.0, 2.0))
    again = FakeClock(1.0)
    run(tmp_path, again)
    assert again.asked == 0
    monkeypatch.setattr(tiles, "source_hash", lambda modules: "of another kernel")
    run(tmp_path, again)
    assert again.asked == 3 * 2
    assert Ledger(tmp_path, H200, anew=True).trials == []


def test_half_a_line_of_a_killed_run_is_passed_over(tmp_path: Path) -> None:
    run(tmp_path, FakeClock(3.0, 1.0, 2.0))
    path = tmp_path / "nvidia_h200.trials.jsonl"
    whole = read_trials(path)
    path.write_bytes(path.read_bytes()[:-20] + b"\xff\n[]\n")
    assert read_trials(path) == whole[:-1]
    path.write_bytes(path.read_bytes()[:-20])
    run(tmp_path, FakeClock(3.0, 1.0, 2.0))
    assert [trial.tile for trial in read_trials(path)] == [trial.tile for trial in whole]


def test_a_gpu_that_is_lost_ends_the_run_and_is_no_fault_of_the_tiles_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(tuner, "answers", lambda where: False)
        assert command.run([ROW], CPU, tmp_path, dtypes=("float16",), clock=lost) == 1
        assert "illegal memory access was encountered: the GPU answers no more" in capsys.readouterr().out
    assert [trial.tile for trial in read_trials(tmp_path / "nvidia_h200.trials.jsonl")] == [str(CANDIDATES[0])]
    again = FakeClock(2.0, 1.0)
    run(tmp_path, again, tasks=1)
    assert again.asked == 2
    assert tuner.answers(CPU)


KILLED = """
import os, signal, sys
import torch
from tests.test_tuning import CANDIDATES, CPU, FakeClock, H200, run
from triton_attn import device, tiles
from pathlib import Path

class Dying(FakeClock):
    def __call__(self, calls):
        if self.asked == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(calls)

tiles.Space.of = lambda self, capability, key: CANDIDATES
run(Path(sys.argv[1]), Dying(3.0, 1.0, 2.0), tasks=3)
"""


def test_a_run_killed_in_the_middle_of_a_key_goes_on_with_the_next_tile_of_that_key(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command_line = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), "7"]
    assert subprocess.run(command_line, env=environment, timeout=300, check=False).returncode == -signal.SIGKILL
    table = tiles.read(tmp_path / "nvidia_h200.json")
    assert list(table) == ["attention/descriptors/forward", "attention/pointers/forward"]
    clock = FakeClock(3.0, 1.0, 2.0)
    run(tmp_path, clock, tasks=3)
    assert clock.asked == 2
    assert len(tiles.read(tmp_path / "nvidia_h200.json")) == 3


def test_past_its_budget_no_new_key_begins(tmp_path: Path) -> None:
    assert run(tmp_path, FakeClock(1.0), seconds=0.0) == []


def test_the_command_tells_winners_and_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"dtypes": ("float16",), "clock": FakeClock(3.0, 1.0, 2.0)}
    assert command.run([ROW], CPU, tmp_path, sizes=["n=12", "m=12"], **options) == 0
    said = capsys.readouterr().out
    assert "16x16 w4 s1" in said
    assert "3.00×" in said
    assert "m=12 n=12" in said
    assert "5 keys tuned: all right" in said
    assert command.run([ROW], CPU, tmp_path / "other", budget=0.0, **options) == 0
    assert "5 keys had no time" in capsys.readouterr().err
    with pytest.raises(BadArgument, match="size is 'x=3'"):
        command.run([ROW], CPU, tmp_path, sizes=["x=3"], **options)


def test_the_command_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadArgument, match="TRITON_INTERPRET=1 is set"):
        command.tune()
    monkeypatch.setattr(device, "interpreting", lambda: False)
    if not torch.cuda.is_available():
        with pytest.raises(BadArgument, match="no GPU is here"):
            command.tune()
    with pytest.raises(BadArgument, match="--check is given without --offline"):
        command.tune(check=True)
    with pytest.raises(BadArgument, match="budget is -1"):
        command.tune(budget=-1.0)


# at first use


def call(length: int = 10, **options: Any) -> None:
    drawn = [torch.randn(1, 1, length, 16, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    with use_backend("triton"):
        out = triton_attn.attention(*drawn, causal=True, **options)
    out.sum().backward()


def test_inside_autotune_a_first_call_is_tuned_forward_and_backward_and_a_second_is_not(tmp_path: Path) -> None:
    clock = FakeClock(3.0, 1.0, 2.0)
    with triton_attn.autotune(tmp_path / "here", clock=clock):
        call()
        first = clock.asked
        call()
        call(14)  # of the same bucket
        assert first > 0
        assert clock.asked == first
        call(20, key_padding_mask=torch.zeros(1, 20, dtype=torch.bool))
        assert clock.asked > first
    after = clock.asked
    call(40)
    assert clock.asked == after
    table = tiles.read(tmp_path / "here" / "nvidia_h200.json")
    assert set(table["attention/pointers/backward_key"]["tiles"]) == {"16bit d32 16x16 causal", "16bit d32 32x32 causal masked"}
    space = CATALOG["attention"].kernels[-1].load().spaces["forward"]
    key = tiles.Key.parse("16bit d32 16x16 causal")
    assert tiles.look_up("attention/pointers/forward", space, key, H200).tile == CANDIDATES[1]


def test_nothing_is_tuned_outside_of_autotune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "try_tile", lambda *args, **options: pytest.fail("tried"))
    assert operators.before_kernel is None
    call()
    with pytest.raises(RuntimeError, match="from inside"), triton_attn.autotune():
        raise RuntimeError("from inside")
    assert operators.before_kernel is None
    call()


def test_a_call_that_is_captured_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "try_tile", lambda *args, **options: pytest.fail("tried"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with triton_attn.autotune():
        assert operators.before_kernel is not None
        tensors = {name: Captured() for name in ROW.inputs}
        operators.before_kernel(ROW, tensors, {})


class Captured:
    is_cuda = True


def test_autotune_without_a_folder_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "user_tables", lambda: None)
    with pytest.raises(ArgumentError, match="folder is None; allowed: a path"), triton_attn.autotune():
        pass


@pytest.mark.parametrize("row", CATALOG.values(), ids=lambda row: row.name)
def test_the_workloads_of_every_mechanism_can_be_planned_and_judged_short(row: Any) -> None:
    tasks = tuner.plan([row], lambda row: row.workloads["cuda"], ["bfloat16", "float32"], H200)
    served = [kernel for kernel in row.kernels if H200.capability in kernel.capabilities]
    assert bool(tasks) == bool(served)
    assert len({(task.name, str(task.key)) for task in tasks}) == len(tasks)
    for case in row.workloads["cuda"]:
        short = tuner.shortened(row, case)
        assert all(
            size <= max(256, *(case.sizes[axis] for axis in "dhb" if axis in case.sizes)) or size == 300 for size in short.sizes.values()
        )


# ranks

RANK = """
import sys
from pathlib import Path
import torch
from triton_attn import broadcast_tables, device, tiles
from triton_attn.tiles import Tile

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
device.USER_TABLE = str(folder / f"user{rank}")
tile = Tile(64, 64, 4, 2) if rank == 0 else Tile(128, 64, 4, 2)
entry = {"hash": "", "evidence": "tuned", "tiles": {"16bit d64": tile}}
tiles.write(folder / f"user{rank}" / "sm_90.json", {"attention/pointers/forward": entry}, {})
torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
from triton_attn.kernels.attention import SPACES
def found():
    return tiles.look_up("attention/pointers/forward", SPACES["forward"], tiles.Key("16bit", 64), device.Profile("x", (9, 0))).tile
own = found()
broadcast_tables()
first = found()
broadcast_tables(torch.distributed.new_group([0, 1], backend="gloo"), source=1)
print(own, first, found(), sep=",")
torch.distributed.destroy_process_group()
"""


def test_after_a_broadcast_all_ranks_have_the_same_tiles(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", RANK, str(rank), str(tmp_path)] for rank in range(2)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ranks = [subprocess.Popen(line, stdout=subprocess.PIPE, env=environment, text=True) for line in commands]
    said = [rank.communicate(timeout=300)[0].strip() for rank in ranks]
    assert said == ["64x64 w4 s2,64x64 w4 s2,128x64 w4 s2", "128x64 w4 s2,64x64 w4 s2,128x64 w4 s2"]


def test_one_table_in_the_place_of_a_folder_is_refused_where_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.json").write_text("{}")
    monkeypatch.setattr(device, "USER_TABLE", str(tmp_path / "one.json"))
    with pytest.raises(ArgumentError, match="TRITON_ATTN_TILES is a file; allowed: a folder"), triton_attn.autotune():
        pass
    with pytest.raises(BadArgument, match="which is a file; allowed: a folder"):
        command._place(None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ArgumentError, match=r"TRITON_ATTN_TILES is the file .*one\.json"):
        triton_attn.broadcast_tables(folder=tmp_path)


def test_a_broadcast_without_a_group_says_what_comes_first() -> None:
    with pytest.raises(ArgumentError, match=r"init_process_group"):
        triton_attn.broadcast_tables()
