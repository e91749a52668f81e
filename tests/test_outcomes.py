"""Seeded faults whose ends are kept: a run that was ended goes on, and nothing stays known of sources or calls that are others."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from triton_attn import CATALOG, teeth
from triton_attn.testing import bite, seeded, strict_interpreter
from triton_attn.testing.outcomes import Outcomes

triton = pytest.importorskip("triton")

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < length
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    tl.store(out_ptr + offset, tl.maximum(x, 0.0) * 2.0, mask=inside)
"""


def loaded(folder: Path, text: str) -> ModuleType:
    """A module of its own with a kernel."""
    path = folder / "kernel_with_ends.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


class Run:
    """A kernel, its checks by name, and how often a fault has met one."""

    def __init__(self, folder: Path, text: str = SOURCE) -> None:
        self.module, self.path = loaded(folder, text), folder / "new" / "ends.jsonl"
        self.met: list[str] = []

    def ends(self, *names: str, about: str = "kernel", **options: Any) -> Iterator[tuple[str, str]]:
        self.book = Outcomes(self.path, about=about, calls=names, **options)
        for bitten in bite([self.check(name) for name in names], outcomes=self.book):
            yield bitten.fault.key, bitten.caught.partition(":")[0]

    def check(self, name: str) -> Callable[[], None]:
        x = {"small": -torch.ones(16), "both": torch.linspace(-3, 3, 21), "none": torch.zeros(0)}[name]

        def run() -> None:
            self.met.append(name)
            out = torch.empty_like(x)
            self.module.kernel[(max(1, triton.cdiv(x.numel(), 16)),)](x, out, x.numel(), BLOCK=16)
            assert torch.equal(out, x.clamp(min=0) * 2)

        return run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    yield Run(tmp_path)
    sys.modules.pop("kernel_with_ends", None)


def test_a_run_that_is_killed_goes_on_to_the_same_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(run.ends("both"))
    run.path.unlink()
    planted, right = list[str](), seeded.planted

    def counted(fault: seeded.Fault, functions: Any) -> Any:
        planted.append(fault.place)
        if len(planted) == 7:
            raise KeyboardInterrupt
        return right(fault, functions)

    monkeypatch.setattr(seeded, "planted", counted)
    with pytest.raises(KeyboardInterrupt):
        list(run.ends("both"))
    killed_at = planted[-1]
    kept = len(run.path.read_text().splitlines())
    assert kept == 6
    assert list(run.ends("both")) == whole
    assert planted.count(killed_at) == 2  # the one that the kill took, and no other
    assert len(set(planted)) == len(planted) - 1
    before = len(planted)
    assert list(run.ends("both")) == whole
    assert len(planted) == before


def test_half_a_line_of_a_kill_is_passed_over_and_takes_no_other_with_it(run: Run) -> None:
    whole = list(run.ends("both"))
    lines = run.path.read_text().splitlines(keepends=True)
    run.path.write_text("".join(lines[:4]) + lines[4][:30])
    assert list(run.ends("both")) == whole
    assert [json.loads(line)["place"] for line in run.path.read_text().splitlines() if line.endswith("}")] == [
        json.loads(line)["place"] for line in lines
    ]
    run.met.clear()
    assert list(run.ends("both")) == whole
    assert run.met == ["both"]  # right as it is


@pytest.mark.parametrize(("old", "new", "stays"), [("2.0", "(1.0 + 1.0)", False), ("\n    inside", "\n\n    # why\n    inside", True)])
def test_changed_sources_begin_anew_and_a_comment_does_not(run: Run, tmp_path: Path, old: str, new: str, stays: bool) -> None:
    list(run.ends("both"))
    count = len(run.path.read_text().splitlines())
    changed = Run(tmp_path, SOURCE.replace(old, new))
    found = list(changed.ends("both"))
    assert (changed.met == ["both"]) == stays
    assert len(run.path.read_text().splitlines()) == count if stays else len(run.path.read_text().splitlines()) >= 2 * count
    assert found
    list(changed.ends("both", anew=True))
    assert len(changed.met) > len(found)


def test_a_new_call_meets_what_others_let_pass_and_nothing_else(run: Run) -> None:
    weak = dict(run.ends("small"))
    passed = [fault for fault, caught in weak.items() if not caught]
    assert passed
    run.met.clear()
    strong = dict(run.ends("small", "both"))
    assert run.met[:2] == ["small", "both"]
    # beside those, what would not compile
    assert set(run.met[2:]) == {"both"}
    assert len(passed) <= len(run.met[2:]) < len(weak)
    assert sum(not caught for caught in strong.values()) < len(passed)
    run.met.clear()
    # a call that is gone takes its catches with it
    assert dict(run.ends("small")) == weak
    assert len(run.met) > 1


def test_what_another_kernels_calls_caught_is_not_planted_again(run: Run, tmp_path: Path) -> None:
    strong = dict(run.ends("both"))
    run.met.clear()
    others = {"kernel": ("both",)}
    shared = dict(run.ends("small", about="other", others=others))
    caught = {fault for fault, ending in strong.items() if ending}
    assert {fault for fault, ending in shared.items() if ending == "kernel"} == caught
    # right as it is, then what they let pass, then what would not compile
    assert len(strong) - len(caught) < len(run.met) < len(strong)
    run.met.clear()
    # neither without that kernel's calls, nor of other sources
    alone = dict(run.ends("small", about="third", others={"kernel": ("none",)}))
    assert "kernel" not in alone.values()
    changed = Run(tmp_path, SOURCE.replace("2.0", "(1.0 + 1.0)"))
    assert "kernel" not in dict(changed.ends("both", about="other", others=others)).values()


def test_time_that_is_over_leaves_the_rest_and_says_how_many(run: Run) -> None:
    whole = list(run.ends("both"))
    run.path.unlink()
    begun = list(islice(run.ends("both"), 5))
    kept = len(run.path.read_text().splitlines())
    assert list(run.ends("both", until=0.0)) == begun == whole[:5]
    every = len(seeded.faults(seeded.ran(run.check("both"))))
    assert run.book.left == every - kept


def test_the_rows_calls_have_names_of_their_own_and_rows_too() -> None:
    abouts = set()
    for row in CATALOG.values():
        for kernel in row.kernels:
            abouts.add(teeth._about(row, kernel))
            names = teeth._names(row, kernel)
            asked = {str(call) for call in teeth._asked(row, kernel)}
            assert len(set(names)) == len(asked)
    assert len(abouts) == sum(len(row.kernels) for row in CATALOG.values())


def test_a_calls_name_is_the_same_in_a_process_that_has_interpreted_nothing() -> None:
    row = CATALOG["pool_tokens"]
    with strict_interpreter():
        now = teeth._names(row, row.kernels[0])
    script = "from triton_attn import CATALOG, teeth; row = CATALOG['pool_tokens']; print(teeth._names(row, row.kernels[0]))"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert run.stdout.strip() == str(now)


def test_rows_that_no_time_is_left_for_are_named(tmp_path: Path) -> None:
    left: dict[str, str] = {}
    rows = [CATALOG["add_layer_norm"], CATALOG["pool_tokens"]]
    assert list(teeth.teeth(rows, evidence=tmp_path / "x.jsonl", budget=-1.0, left=left)) == []
    assert left == {"add_layer_norm/rows": "not begun", "pool_tokens/cells": "not begun"}
