"""The shipped tables fit the kernels as they are: complete, fresh, and of tiles that the kernels themselves name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from triton_attn import CATALOG, device, tiles
from triton_attn import offline as offline_compiler
from triton_attn.mechanism import Kernel, Launch, Mechanism
from triton_attn.offline import DTYPES
from triton_attn.testing import inputs
from triton_attn.tuning import without_gpu

LAUNCHES = [
    pytest.param(target, row, kernel, launch, id=f"{target}-{row.name}-{kernel.name}-{launch.name}")
    for target in map(device.architecture, device.LIMITS)
    for row in CATALOG.values()
    for kernel in row.kernels
    if device.capability(target) in kernel.capabilities
    for launch in kernel.launches
]


@pytest.mark.parametrize(("target", "row", "kernel", "launch"), LAUNCHES)
def test_every_call_that_a_kernel_serves_finds_a_fresh_tile(target: str, row: Mechanism, kernel: Kernel, launch: Launch) -> None:
    capability = device.capability(target)
    space = kernel.load().spaces[launch.name]
    for key in space.entries():
        if all(kernel.refuses(*inputs.meta(row, case, DTYPES[key.operands])) for case in row.probes(key.width, key.plain)):
            continue
        found = tiles.look_up(f"{row.name}/{kernel.name}/{launch.name}", space, key, device.Profile(target, capability))
        assert target in found.source, f"{key}: `make tables` chooses one"
        assert not found.stale, f"{key}: the kernel has changed since; `make tables` chooses again"
        assert found.tile in space.of(capability, key)


@pytest.mark.parametrize("path", sorted(tiles.SHIPPED.glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_table_can_be_read_and_says_where_it_is_from(path: Path) -> None:
    for entry in tiles.read(path).values():
        assert entry["evidence"].startswith(("offline", "tuned on"))


COMPILES = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def offline(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "triton_attn", "tune", "causal_conv1d", "--offline", "--target", "sm_80", *arguments]
    ended = subprocess.run(command, env=COMPILES, capture_output=True, text=True, timeout=300, check=False)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.slow
def test_offline_tuning_chooses_legal_tiles_and_compiles_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "sm_80.json"
    assert offline("--folder", str(tmp_path)) == (0, f"{path}\n")
    shipped = tiles.read(tiles.SHIPPED / "sm_80.json")
    chosen = tiles.read(path)
    assert chosen.keys() == {launch for launch in shipped if launch.startswith("causal_conv1d/")}
    for launch, entry in chosen.items():
        assert entry["hash"] == shipped[launch]["hash"]
        assert entry["tiles"].keys() == shipped[launch]["tiles"].keys()
        assert entry["compilers"] == [device.triton_version()]
    code, said = offline("--folder", str(tmp_path), "--check")
    assert (code, said.splitlines()[-1]) == (0, "2 entries compiled again: all right")
    text = path.read_text()
    path.write_text(text.replace('"hash": "', '"hash": "0', 1))
    code, said = offline("--folder", str(tmp_path), "--check")
    assert code == 1
    assert "chosen for other sources" in said
    offline("--folder", str(tmp_path))
    assert json.loads(path.read_text())["launches"] == json.loads(text)["launches"]


def test_choosing_again_compiles_only_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    asked: list[Any] = []

    def ask(run: Any, tasks: list[Any], jobs: int) -> tuple[()]:
        asked.extend(tasks)
        return ()

    monkeypatch.setattr(offline_compiler, "shared_out", ask)
    before = tiles.read(tiles.SHIPPED / "sm_80.json")
    rows = list(CATALOG.values())
    assert without_gpu.choose_tiles(rows, "sm_80", start=before).keys() == before.keys()
    assert asked == []
    stale = {**before, "attention/pointers/forward": {**before["attention/pointers/forward"], "hash": "of other sources"}}
    without_gpu.choose_tiles(rows, "sm_80", start=stale)
    assert {task[:3] for task in asked} == {("attention", "pointers", "forward")}
    # with another compiler every entry is looked at again, from the tile that this one chose
    asked.clear()
    monkeypatch.setattr(device, "triton_version", lambda: "9.9.9")
    without_gpu.choose_tiles(rows[:1], "sm_80", start=before)
    for _, kernel, launch, key, candidates, _ in asked:
        assert candidates[0] == before[f"attention/{kernel}/{launch}"]["tiles"][str(key)]
