"""Seeded faults: each kind is planted and undone, a weak check is told apart from a strong one, and the kernels' own checks bite."""

from __future__ import annotations

import ast
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from triton_attn import CATALOG, teeth
from triton_attn.mechanism import Kernel, Mechanism
from triton_attn.testing import bite, seeded
from triton_attn.testing.equivalents import ARGUMENTS, Argument, equivalent

KERNELS = [pytest.param(row, kernel, id=f"{row.name}-{kernel.name}") for row in CATALOG.values() for kernel in row.kernels]


@triton.jit  # type: ignore[untyped-decorator]
def scale_kernel(x_ptr, out_ptr, length, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < length
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    tl.store(out_ptr + offset, tl.maximum(x, 0.0) * factor, mask=inside)


def scaled(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    scale_kernel[(triton.cdiv(x.numel(), 16),)](x, out, x.numel(), 2.0, BLOCK=16)
    return out


def strong() -> None:
    x = torch.linspace(-3, 3, 21)
    torch.testing.assert_close(scaled(x), x.clamp(min=0) * 2)


def weak() -> None:
    assert scaled(torch.linspace(-3, 3, 32)).shape == (32,)


def test_a_strong_check_catches_every_fault_that_changes_something() -> None:
    same = {
        "scale_kernel: tl.load(x_ptr + offset, mask=inside, other=0.0) -> tl.load(x_ptr + offset, mask=inside, other=1)": "never stored"
    }
    bites = list(bite(strong, equivalent=same))
    assert [planted.fault.key for planted in bites if planted.survived] == []
    assert {planted.fault.kind for planted in bites} >= {"wrong boundary", "forgotten mask", "forgotten factor", "dropped maximum"}
    assert sum(bool(planted.equivalent) for planted in bites) == 1


def test_a_weak_check_lets_faults_pass() -> None:
    survivors = {planted.fault.kind for planted in bite(weak) if planted.survived}
    assert survivors >= {"forgotten factor", "dropped maximum"}


@triton.jit
def count_kernel(out_ptr, length):  # type: ignore[no-untyped-def]
    done = tl.load(out_ptr)
    while done < length:
        done += 1
    tl.store(out_ptr, done)


def counted() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    count_kernel[(1,)](out, 5)
    assert out.item() == 5


def test_a_fault_that_makes_a_loop_endless_is_caught_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeded, "AT_LEAST", 0.5)
    ends = {planted.fault.key: planted.caught for planted in bite(counted)}
    assert ends["count_kernel: done += 1 -> nothing"].startswith("TimeoutError")


@pytest.mark.parametrize("check", [[], lambda: None], ids=["none", "without a kernel"])
def test_no_check_or_no_kernel_is_not_all_caught(check: Any) -> None:
    with pytest.raises(ValueError, match="check"):
        list(bite(check))


def test_faults_are_undone() -> None:
    for _ in bite(weak):
        strong()


def test_a_fault_keeps_the_line_it_stands_on() -> None:
    boundary = next(fault for fault in seeded.faults(seeded.ran(strong)) if fault.kind == "wrong boundary")
    assert boundary.before == "offset < length"
    with open(__file__) as source:
        assert "offset < length" in source.read().splitlines()[boundary.line - 1]


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda argument: argument.reason[:40])
def test_argued_faults_are_those_of_kernels_that_exist(argument: Argument) -> None:
    assert set(argument.rows) <= CATALOG.keys()
    for fault in argument.faults:
        name, _, change = fault.partition(": ")
        before = change.partition(" -> ")[0].removeprefix("if ")
        assert any(before in source for source in _SOURCES[name]), fault


def _functions() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in (Path(teeth.__file__).parent / "kernels").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append(ast.unparse(node))
    return found


_SOURCES = _functions()


def test_a_handful_of_faults_is_caught_another_every_day() -> None:
    """TRITON_ATTN_TEETH repeats a day's."""
    seed = int(os.environ.get("TRITON_ATTN_TEETH") or date.today().toordinal())
    row = CATALOG["attention"]
    bites = list(bite(teeth.checks(row, row.kernels[-1]), equivalent=equivalent(row.name), some=4, seed=seed))
    assert len(bites) == 4
    survivors = [(planted.fault.line, planted.fault.key) for planted in bites if planted.survived]
    assert survivors == [], f"again with TRITON_ATTN_TEETH={seed}"


@pytest.mark.slow
@pytest.mark.parametrize(("row", "kernel"), KERNELS)
def test_every_fault_is_caught_or_argued(row: Mechanism, kernel: Kernel) -> None:
    survivors = [
        (planted.fault.line, planted.fault.key)
        for planted in bite(teeth.checks(row, kernel), equivalent=equivalent(row.name))
        if planted.survived
    ]
    assert survivors == []
