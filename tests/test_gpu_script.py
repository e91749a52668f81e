"""The script for GPUs, rehearsed without one: its steps run in the interpreter, on a machine that says it is an H200."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.testing

from benchmarks import evidence, gpu_checks, on_gpu
from benchmarks.evidence import Check
from triton_attn import CATALOG, device, dispatch, tiles
from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import inputs
from triton_attn.tuning.ledger import read_trials
from triton_attn.tuning.tune import shortened

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mechanism:
    """One small row and key, tables in a folder of their own."""
    row = CATALOG["attention"]
    small = Case("causal", {**row.cases[0].sizes, "m": 3, "n": 3}, {"causal": True})
    keys = tuple(tiles.Key(operands, 32, plain) for operands in ("16bit", "tf32") for plain in (True, False))
    monkeypatch.setattr(gpu_checks, "WHERE", CPU)
    monkeypatch.setattr(on_gpu, "WHERE", CPU)
    monkeypatch.setattr(gpu_checks, "LONGER", {"m": 6, "n": 6})
    monkeypatch.setattr(gpu_checks, "REPEATS", 2)
    monkeypatch.setattr(on_gpu, "TUNED", "float16")  # the interpreter computes bfloat16 wrongly
    monkeypatch.setattr(gpu_checks, "captured", lambda call: [call()])
    monkeypatch.setattr(gpu_checks, "on_a_stream", lambda call: [call()])
    monkeypatch.setattr(gpu_checks, "of_sizes", functools.partial(gpu_checks.of_sizes, heads=3, length=600, far=100))
    monkeypatch.setattr(gpu_checks, "SANITIZER", "no-such-tool")
    monkeypatch.setattr(tiles, "every_key", lambda: iter(keys))
    only = replace(row, cases=(small,), probes=lambda width, plain: (small,), workloads={"cuda": (small,)})
    for module in (gpu_checks, on_gpu):
        monkeypatch.setattr(module, "CATALOG", {"attention": only})
    monkeypatch.setattr(device, "profile", lambda index: device.Profile("NVIDIA H200", (9, 0), multiprocessors=1))
    monkeypatch.setattr(tiles.Space, "of", lambda self, capability, key: (tiles.Tile(16, 16, 4, 1),))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(gpu_checks, "DTYPES", dict.fromkeys(tiles.OPERANDS, (torch.float32,)))
    monkeypatch.setattr(gpu_checks, "JUDGED", (torch.float16, torch.float32))
    return only


@pytest.mark.slow
def test_correctness_judges_every_kernel_launch_and_key_and_a_second_start_nothing_again(
    small: Mechanism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "correctness.jsonl"
    outcome = on_gpu.run(gpu_checks.correctness(), path, 1e9)
    rows = [row for row in outcome.rows if "not run" not in row]
    assert [row["not run"] for row in outcome.rows if row not in rows] == ["not on PATH"] * 2
    assert {row["kernel"] for row in rows if "kernel" in row} == {"descriptors", "pointers"}
    assert {launch for row in rows if row.get("tile") for launch in row["tile"]} == {"forward", "split", "backward_query", "backward_key"}
    assert not [row["fault"] for row in rows if row["fault"]]
    checks = [row["check"] for row in rows if "check" in row]
    assert checks == ["repeats", "CUDA graph", "stream"] * 2 + ["3 heads", "600 tokens", "beyond 2^31 elements"]
    names = [row["name"] for row in outcome.rows]
    assert len(names) == len(set(names))
    assert (outcome.left, outcome.ended) == (0, 0)
    monkeypatch.setattr(gpu_checks, "judged", lambda *args, **options: pytest.fail("judged again"))
    assert on_gpu.run(gpu_checks.correctness(), path, 1e9).rows == outcome.rows


def test_the_tiles_of_the_shipped_tables_come_before_those_that_only_a_tuner_tries(small: Mechanism) -> None:
    entry = {"hash": "", "evidence": "offline", "tiles": {"16bit d32": tiles.Tile(64, 32, 4, 2)}}
    tiles.write(tiles.SHIPPED / "sm_90.json", {"attention/pointers/forward": entry}, {})
    key = "attention/pointers/forward 16bit d32"
    shipped, others = ([check.name for check in gpu_checks.of_tiles(shipped=way)] for way in (True, False))
    assert shipped == [f"{key} 64x32 w4 s2, probe 0"]
    assert f"{key} 16x16 w4 s1, probe 0" in others
    assert not set(shipped) & set(others)


def test_runs_that_differ_are_wrong(small: Mechanism) -> None:
    def other(call: gpu_checks.Again) -> Iterator[Any]:
        yield call()
        yield [tensor + 1 for tensor in call()]

    row = CATALOG["attention"]
    found = gpu_checks.behaves(row, row.kernels[-1], row.cases[0], "repeats", other)
    assert found["fault"] == "1 runs gave other bits"
    assert gpu_checks.behaves(row, row.kernels[-1], row.cases[0], "repeats", gpu_checks.repeated)["fault"] == ""


def test_tuning_writes_a_table_that_calls_would_use(small: Mechanism, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, **options: (call(), (0.9, 1.0, 1.1))[1])
    monkeypatch.setattr(device, "USER_TABLE", str(tmp_path / "out"))
    none = on_gpu.tune(0.0, tmp_path / "out")
    assert (none.left, none.ended) == (5, 4)
    whole = on_gpu.tune(1e9, tmp_path / "out")
    assert (whole.left, whole.ended) == (0, 0)
    table = tiles.read(tmp_path / "out" / "nvidia_h200.json")
    assert {launch.rpartition("/")[2] for launch in table} == {"forward", "split", "backward_query", "backward_key"}
    space = CATALOG["attention"].kernels[-1].load().spaces["forward"]
    key = tiles.Key("16bit", 32, lengths=(16, 16), causal=True)
    found = tiles.look_up("attention/pointers/forward", space, key, device.profile(0))
    assert found.tile == tiles.Tile(16, 16, 4, 1)
    assert "tuned on NVIDIA H200" in found.source
    assert not found.stale
    assert len(read_trials(tmp_path / "out" / "nvidia_h200.trials.jsonl")) == 5


def test_correctness_can_draw_and_launch_every_mechanism() -> None:
    """Every case, lengthened or shortened, is one that the row can draw."""
    for row in CATALOG.values():
        probes = [probe for space in _spaces(row) for key in space.entries() for probe in row.probes(key.width, key.plain)]
        cases = [*map(functools.partial(gpu_checks.longer, row), row.cases), *(shortened(row, case) for case in row.workloads["cuda"])]
        for case in (*cases, *(shortened(row, probe) for probe in probes)):
            tensors, options = inputs.meta(row, case, torch.float16)
            assert all(size > 0 for tensor in tensors.values() if tensor is not None for size in tensor.shape), (row.name, case)
            assert not set(options) - set(row.options)


def _spaces(row: Mechanism) -> list[tiles.Space]:
    return [space for kernel in row.kernels for space in kernel.load().spaces.values()]


def test_the_shell_script_says_what_is_missing(tmp_path: Path) -> None:
    """Without a GPU, and without the packages, it ends with one line and code 2."""
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    environment.pop("PYTHONPATH", None)
    if not torch.cuda.is_available():
        said = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert (said.returncode, said.stderr) == (2, "no CUDA device\n")
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    said = subprocess.run(script, env={**environment, "PYTHON": str(bare)}, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 2
    assert said.stderr.startswith("missing: torch>=2.11 triton>=3.6" if "torch>=" in said.stderr else "missing: torch triton einops")


PYTHON = """#!/bin/sh
case $1 in -|-c) exit 0;; esac
echo ran $1 $2 $4
echo $2 >> {folder}/starts
sed -i '1{{w {folder}/code
d}}' {folder}/codes 2> /dev/null
exit $(cat {folder}/code 2> /dev/null || echo 0)
"""


NOTHING: Mapping[str, str] = {}


def shell(
    tmp_path: Path, *steps: str, codes: Sequence[int] = (), environment: Mapping[str, str] = NOTHING
) -> subprocess.CompletedProcess[str]:
    """The script with a Python that misses nothing, has a GPU, says what it was to run, and ends with one code after the other."""
    python = tmp_path / "python"
    python.write_text(PYTHON.format(folder=tmp_path))
    python.chmod(0o755)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    given = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), **environment}
    given = {name: value for name, value in given.items() if value}
    line = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *steps]
    return subprocess.run(line, env=given, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ([], "correctness tune peers"),
        (["all"], "correctness tune peers"),
        (["peers", "tune"], "peers tune"),
        (["tune", "all"], "tune correctness tune peers"),
    ],
)
def test_the_shell_script_runs_the_steps_given_or_all(tmp_path: Path, given: list[str], steps: str) -> None:
    said = shell(tmp_path, *given)
    assert (said.returncode, said.stderr) == (0, "")
    told = [line for step in steps.split() for line in (f"== {step}", f"ran benchmarks/on_gpu.py {step} {tmp_path / 'out'}")]
    assert said.stdout.splitlines() == told
    assert (tmp_path / "out" / "gpu.log").read_text().splitlines() == told


@pytest.mark.parametrize("given", ["", "other", "a/b"])
def test_without_a_folder_results_go_to_out_where_the_script_was_called(tmp_path: Path, given: str) -> None:
    assert shell(tmp_path, "tune", environment={"OUT": given}).returncode == 0
    assert (tmp_path / (given or "out") / "gpu.log").is_file()


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [
        ([0, 0, 0], "correctness tune peers", 0),
        ([1, 0, 4], "correctness tune peers", 1),
        ([0, 4, 0], "correctness tune peers", 4),
        ([3, 3, 1, 0, 0], "correctness correctness correctness tune peers", 1),
        ([0, 3, 0, 0], "correctness tune tune peers", 0),
    ],
    ids=["all right", "wrong", "something left", "the GPU was lost twice", "the GPU was lost while tuning"],
)
def test_a_step_that_lost_the_gpu_is_started_again_and_what_is_wrong_counts_most(
    tmp_path: Path, codes: list[int], starts: str, code: int
) -> None:
    assert shell(tmp_path, codes=codes).returncode == code
    assert (tmp_path / "starts").read_text().split() == starts.split()


def test_a_gpu_that_is_lost_at_every_start_is_left_alone_when_the_time_is_over(tmp_path: Path) -> None:
    assert shell(tmp_path, "tune", codes=[3] * 1000, environment={"PART": "1"}).returncode == 4


@pytest.mark.parametrize(
    ("steps", "environment", "complaint"),
    [
        (["tune", "everything"], {}, "step is 'everything'; allowed: correctness, tune, peers, all\n"),
        (["tune"], {"PART": "1m"}, "PART is '1m'; allowed: whole seconds\n"),
    ],
)
def test_the_shell_script_refuses_what_it_does_not_know_before_it_runs_anything(
    tmp_path: Path, steps: list[str], environment: dict[str, str], complaint: str
) -> None:
    said = shell(tmp_path, *steps, environment=environment)
    assert (said.returncode, said.stdout, said.stderr) == (2, "", complaint)
    assert not (tmp_path / "out").exists()


SANITIZER = """#!/bin/sh
echo "$@" >> {log}
echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING" >> {log}
case $2 in racecheck) echo '========= Race reported'; echo chatter; exit 9;; esac
"""


def test_compute_sanitizer_watches_a_few_calls_where_it_is_on_path(
    small: Mechanism, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log, tool = tmp_path / "log", tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(log=log))
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_checks, "SANITIZER", tool.name)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [check.run() for check in gpu_checks.of_the_sanitizer()] == [
        {"check": "compute-sanitizer memcheck", "fault": ""},
        {"check": "compute-sanitizer racecheck", "fault": "========= Race reported"},
    ]
    asked = log.read_text()
    assert "caching off: 1" in asked
    assert f"{sys.executable} {on_gpu.__file__} small --out" in asked
    tool.write_text("#!/bin/sh\nsleep 20\n")
    assert gpu_checks.sanitized(str(tool), "memcheck", seconds=0.2)["not run"] == "did not end within 0 s"
    assert gpu_checks.sanitized(None, "memcheck") == {"check": "compute-sanitizer memcheck", "not run": "not on PATH"}


def test_the_few_calls_are_of_every_kernel(small: Mechanism, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "small", "--out", str(tmp_path)])
    assert on_gpu.main() == 0
    written = json.loads((tmp_path / "nvidia_h200-small.json").read_text())
    assert [(row["kernel"], row["fault"]) for row in written["rows"]] == [("descriptors", ""), ("pointers", "")]
    assert {"torch", "triton", "ptxas", "driver", "gpus"} <= written["machine"].keys()
    assert written["left"] == 0


def test_every_kernel_of_the_catalogue_runs_on_the_rehearsed_gpu(small: Mechanism) -> None:
    assert {kernel for kernel, _, _ in gpu_checks.launches(CATALOG["attention"])} == set(CATALOG["attention"].kernels)
    assert not dispatch.capability_refusal(CATALOG["attention"].kernels[0], (9, 0))


# finished checks


def checks(ran: list[str], *names: str, of: str = "1", fault: str = "") -> Iterator[Check]:
    def run(name: str) -> dict[str, Any]:
        ran.append(name)
        return {"fault": fault if name == "b" else ""}

    yield from (Check(name, of, functools.partial(run, name)) for name in names)


def test_a_check_is_finished_for_its_sources_compiler_and_device_alone(tmp_path: Path) -> None:
    path, ran = tmp_path / "new" / "x.jsonl", list[str]()
    finish = functools.partial(evidence.finish, path=path, seconds=1e9)
    first = finish(checks(ran, "a", "b", fault="wrong"), made="H200")
    assert (ran, first.wrong, first.ended) == (["a", "b"], 1, 1)
    again = finish(checks(ran, "a", "b", "c"), made="H200")
    assert (ran, again.rows[:2], again.ended) == (["a", "b", "c"], first.rows, 1)
    assert finish(checks(ran, "a", of="2"), made="H200").ended == 0
    assert finish(checks(ran, "a"), made="H100").ended == 0
    assert ran[3:] == ["a", "a"]


def test_past_its_time_no_check_begins_and_a_later_start_goes_on(tmp_path: Path) -> None:
    ran = list[str]()
    none = evidence.finish(checks(ran, "a", "b"), tmp_path / "x.jsonl", made="", seconds=-1.0)
    assert (ran, none.rows, none.left, none.ended) == ([], [], 2, 4)
    assert evidence.finish(checks(ran, "a", "b"), tmp_path / "x.jsonl", made="", seconds=1e9).ended == 0


def test_after_a_fault_that_took_the_gpu_the_rest_waits_for_a_new_process(tmp_path: Path) -> None:
    ran, path = list[str](), tmp_path / "x.jsonl"
    lost = evidence.finish(checks(ran, "a", "b", "c", fault="illegal access"), path, made="", seconds=1e9, alive=lambda: False)
    assert (ran, lost.left, lost.ended) == (["a", "b"], 1, 3)
    rest = evidence.finish(checks(ran, "a", "b", "c"), path, made="", seconds=1e9)
    assert (ran, [row["fault"] for row in rest.rows], rest.ended) == (["a", "b", "c"], ["", "illegal access", ""], 1)


KILLED = """
import os, signal, sys
from pathlib import Path
from benchmarks.evidence import Check, finish

def die():
    os.kill(os.getpid(), signal.SIGKILL)

finish([Check("a", "", dict), Check("b", "", die), Check("c", "", dict)], Path(sys.argv[1]), made="", seconds=1e9)
"""


def test_a_killed_run_loses_the_check_under_way_and_one_that_kills_each_run_is_wrong(tmp_path: Path) -> None:
    path, line = tmp_path / "x.jsonl", [sys.executable, "-c", KILLED, str(tmp_path / "x.jsonl")]
    for start in range(evidence.MOST_STARTS):
        with path.open("a") as file:
            file.write('{"check": "torn')  # as a kill in the middle of a line leaves it
        assert subprocess.run(line, cwd=ROOT, timeout=60, check=False).returncode == -signal.SIGKILL
        rows, begun = evidence.read(path)
        assert ([name[0] for name in rows], begun["b", "", ""], begun["a", "", ""]) == (["a"], start + 1, 1)
    assert subprocess.run(line, cwd=ROOT, timeout=60, check=False).returncode == 0
    rows, _ = evidence.read(path)
    assert {name[0]: row.get("fault") for name, row in rows.items()} == {"a": None, "b": "began 3 times and never ended", "c": None}


def test_somebody_who_stops_a_run_makes_no_check_wrong(tmp_path: Path) -> None:
    def stop() -> dict[str, Any]:
        raise KeyboardInterrupt

    for _ in range(evidence.MOST_STARTS + 1):
        with pytest.raises(KeyboardInterrupt):
            evidence.finish([Check("a", "", stop)], tmp_path / "x.jsonl", made="", seconds=1e9)
