"""The script for GPUs, rehearsed without one: its steps run in the interpreter, on a machine that says it is an H200."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.testing

from benchmarks import on_gpu
from triton_attn import CATALOG, device, dispatch, tiles
from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import inputs
from triton_attn.tuning.ledger import read_trials
from triton_attn.tuning.tune import shortened

ROOT = Path(__file__).parent.parent


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """One small row and key, tables in a folder of their own; what the steps note."""
    row = CATALOG["attention"]
    small = Case("causal", {**row.cases[0].sizes, "m": 3, "n": 3}, {"causal": True})
    keys = tuple(tiles.Key(operands, 32, plain) for operands in ("16bit", "tf32") for plain in (True, False))
    monkeypatch.setattr(on_gpu, "WHERE", torch.device("cpu"))
    monkeypatch.setattr(on_gpu, "LONGER", {"m": 6, "n": 6})
    monkeypatch.setattr(on_gpu, "REPEATS", 2)
    monkeypatch.setattr(on_gpu, "TUNED", "float16")  # the interpreter computes bfloat16 wrongly
    monkeypatch.setattr(on_gpu, "captured", lambda call: [call()])
    monkeypatch.setattr(on_gpu, "on_a_stream", lambda call: [call()])
    monkeypatch.setattr(on_gpu, "large", functools.partial(on_gpu.large, heads=3, length=600, far=100))
    monkeypatch.setattr(tiles, "every_key", lambda: iter(keys))
    only = replace(row, cases=(small,), probes=lambda width, plain: (small,), workloads={"cuda": (small,)})
    monkeypatch.setattr(on_gpu, "CATALOG", {"attention": only})
    monkeypatch.setattr(device, "profile", lambda index: device.Profile("NVIDIA H200", (9, 0), multiprocessors=1))
    monkeypatch.setattr(tiles.Space, "of", lambda self, capability, key: (tiles.Tile(16, 16, 4, 1),))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    monkeypatch.setattr(on_gpu, "DTYPES", dict.fromkeys(tiles.OPERANDS, (torch.float32,)))
    monkeypatch.setattr(on_gpu, "JUDGED", (torch.float16, torch.float32))
    return []


def test_correctness_judges_every_kernel_launch_and_key(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "SANITIZER", "no-such-tool")
    on_gpu.correctness(rows.append)
    assert rows.pop() == {"check": "no-such-tool", "not run": "not on PATH"}
    assert {row["kernel"] for row in rows if "kernel" in row} == {"descriptors", "pointers"}
    assert {launch for row in rows if row.get("tile") for launch in row["tile"]} == {"forward", "split", "backward_query", "backward_key"}
    assert not [row["fault"] for row in rows if row["fault"]]
    checks = [row["check"] for row in rows if "check" in row]
    assert checks == ["repeats", "CUDA graph", "stream"] * 2 + ["3 heads", "600 tokens", "beyond 2^31 elements"]


def test_runs_that_differ_are_wrong(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def other(call: on_gpu.Again) -> list[Any]:
        return [call(), [tensor + 1 for tensor in call()]]

    monkeypatch.setattr(on_gpu, "repeated", other)
    row = CATALOG["attention"]
    on_gpu._behaves(rows.append, row, row.kernels[-1], row.cases[0])
    assert [row["fault"] for row in rows] == ["1 runs gave other bits", "", ""]


def test_tuning_writes_a_table_that_calls_would_use(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, **options: (call(), (0.9, 1.0, 1.1))[1])
    on_gpu.tune(rows.append, 1e9, tmp_path / "out")
    table = tiles.read(tmp_path / "nvidia_h200.json")
    assert {launch.rpartition("/")[2] for launch in table} == {"forward", "split", "backward_query", "backward_key"}
    row = CATALOG["attention"]
    space = row.kernels[-1].load().spaces["forward"]
    key = tiles.Key("16bit", 32, lengths=(16, 16), causal=True)
    found = tiles.look_up("attention/pointers/forward", space, key, device.profile(0))
    assert found.tile == tiles.Tile(16, 16, 4, 1)
    assert "tuned on NVIDIA H200" in found.source
    assert not found.stale
    assert len(read_trials(tmp_path / "out" / "nvidia_h200.trials.jsonl")) == 5


def test_correctness_can_draw_and_launch_every_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case, lengthened or shortened, is one that the row can draw."""
    for row in CATALOG.values():
        probes = [probe for space in _spaces(row) for key in space.entries() for probe in row.probes(key.width, key.plain)]
        cases = [*map(functools.partial(on_gpu.longer, row), row.cases), *(shortened(row, case) for case in row.workloads["cuda"])]
        for case in (*cases, *(shortened(row, probe) for probe in probes)):
            tensors, options = inputs.meta(row, case, torch.float16)
            assert all(size > 0 for tensor in tensors.values() if tensor is not None for size in tensor.shape), (row.name, case)
            assert not set(options) - set(row.options)


def _spaces(row: Mechanism) -> list[tiles.Space]:
    return [space for kernel in row.kernels for space in kernel.load().spaces.values()]


def test_the_shell_script_says_what_is_missing(tmp_path: Path) -> None:
    """Without a GPU, and without the packages, it ends with one line and code 2."""
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    environment = {**os.environ, "PYTHON": sys.executable}
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
    said = subprocess.run(script(tmp_path, *given), capture_output=True, text=True, timeout=60, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.split("\n")[:-1] == [line for step in steps.split() for line in (f"== {step}", f"ran benchmarks/on_gpu.py {step}")]


def test_the_shell_script_refuses_another_step_before_it_runs_anything(tmp_path: Path) -> None:
    said = subprocess.run(script(tmp_path, "tune", "everything"), capture_output=True, text=True, timeout=60, check=False)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr == "step is 'everything'; allowed: correctness, tune, peers, all\n"


def script(tmp_path: Path, *steps: str) -> list[str]:
    """The script with a Python that misses nothing, has a GPU, and says what it was to run."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase $1 in -|-c) exit 0;; esac\necho ran "$@"\n')
    python.chmod(0o755)
    return ["env", "-u", "OUT", f"PYTHON={python}", "bash", str(ROOT / "benchmarks" / "gpu.sh"), *steps]


SANITIZER = """#!/bin/sh
echo "$@" >> {log}
echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING" >> {log}
case $2 in racecheck) echo '========= Race reported'; echo chatter; exit 9;; esac
"""


def test_compute_sanitizer_watches_a_few_calls_where_it_is_on_path(
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log, tool = tmp_path / "log", tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(log=log))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    on_gpu.sanitized(rows.append)
    assert rows == [
        {"check": "compute-sanitizer memcheck", "fault": ""},
        {"check": "compute-sanitizer racecheck", "fault": "========= Race reported"},
    ]
    asked = log.read_text()
    assert "caching off: 1" in asked
    assert f"{sys.executable} {on_gpu.__file__} small --out" in asked
    tool.write_text("#!/bin/sh\nsleep 20\n")
    on_gpu.sanitized(rows.append, seconds=0.2)
    assert rows[-1]["not run"] == "did not end within 0 s"
    monkeypatch.setattr(on_gpu, "SANITIZER", "no-such-tool")
    on_gpu.sanitized(rows.append)
    assert rows[-1] == {"check": "no-such-tool", "not run": "not on PATH"}


def test_the_few_calls_are_of_every_kernel(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "small", "--out", str(tmp_path)])
    assert on_gpu.main() == 0
    written = json.loads((tmp_path / "nvidia_h200-small.json").read_text())["rows"]
    assert [(row["kernel"], row["fault"]) for row in written] == [("descriptors", ""), ("pointers", "")]


def test_results_are_json_with_versions(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(on_gpu, "correctness", lambda note: note({"row": "attention", "fault": ""}))
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "correctness", "--out", str(tmp_path)])
    assert on_gpu.main() == 0
    written = json.loads((tmp_path / "nvidia_h200-correctness.json").read_text())
    assert written["rows"] == [{"row": "attention", "fault": ""}]
    assert {"torch", "triton", "ptxas", "driver", "gpus"} <= written["machine"].keys()


def test_every_kernel_of_the_catalogue_runs_on_the_rehearsed_gpu(rows: list[dict[str, Any]]) -> None:
    assert {kernel for kernel, _, _ in on_gpu.launches(CATALOG["attention"])} == set(CATALOG["attention"].kernels)
    assert not dispatch.capability_refusal(CATALOG["attention"].kernels[0], (9, 0))
