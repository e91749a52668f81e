"""The script for GPUs, rehearsed without one: its steps run in the interpreter, on a machine that says it is an H200."""

from __future__ import annotations

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
from triton_attn.mechanism import Case

ROOT = Path(__file__).parent.parent


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """One small row and key, tables in a folder of their own; what the steps note."""
    row = CATALOG["attention"]
    small = Case("causal", {**row.cases[0].sizes, "m": 3, "n": 3}, {"causal": True})
    tile = tiles.Tile(16, 16, 4, 1)
    monkeypatch.setattr(on_gpu, "WHERE", torch.device("cpu"))
    monkeypatch.setattr(on_gpu, "WIDTHS", (16,))
    monkeypatch.setattr(on_gpu, "TIMED_WIDTHS", (32,))
    monkeypatch.setattr(on_gpu, "LONG", 2)
    monkeypatch.setattr(on_gpu, "UNEVEN", {"m": 20, "n": 20})
    keys = tuple(tiles.Key(operands, 32, plain) for operands in ("16bit", "tf32") for plain in (True, False))
    monkeypatch.setattr(tiles, "every_key", lambda: iter(keys))
    monkeypatch.setattr(on_gpu, "TUNED", torch.float16)
    monkeypatch.setattr(on_gpu, "CATALOG", {"attention": replace(row, cases=(small,), probes=lambda width, plain: (small,))})
    monkeypatch.setattr(device, "profile", lambda index: device.Profile("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(tiles.Space, "of", lambda self, capability, key: (tile,))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    monkeypatch.setattr(on_gpu, "DTYPES", dict.fromkeys(tiles.OPERANDS, (torch.float32,)))
    monkeypatch.setattr(on_gpu, "JUDGED", (torch.float16, torch.float32))
    return []


def test_correctness_judges_every_kernel_launch_and_key(rows: list[dict[str, Any]]) -> None:
    on_gpu.correctness(rows.append)
    assert {row["kernel"] for row in rows} == {"descriptors", "pointers"}
    assert {launch for row in rows if row["tile"] for launch in row["tile"]} == {"forward", "split", "backward_query", "backward_key"}
    assert not [row["fault"] for row in rows if row["fault"]]


def test_tuning_writes_a_table_that_calls_would_use(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, **options: (call(), 1.0)[1])
    on_gpu.tune(rows.append, seconds=1e9)
    table = tiles.read(tmp_path / "nvidia_h200.json")
    assert {launch.rpartition("/")[2] for launch in table} == {"forward", "split", "backward_query", "backward_key"}
    row = CATALOG["attention"]
    space = row.kernels[-1].load().spaces["forward"]
    found = tiles.look_up("attention/pointers/forward", space, tiles.Key("16bit", 32), device.profile(0))
    assert found.tile == tiles.Tile(16, 16, 4, 1)
    assert "tuned on NVIDIA H200" in found.source
    assert not found.stale


def test_tuning_never_times_a_tile_that_is_wrong(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(on_gpu, "_judge", lambda *args, **options: False)
    on_gpu.tune(rows.append, seconds=1e9)
    assert not list(tmp_path.iterdir())


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
