"""Seeded faults: each kind is planted and undone, a weak check is told apart from a strong one, and the kernels' own checks bite."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from triton_attn import CATALOG, teeth
from triton_attn.mechanism import Kernel, Mechanism
from triton_attn.testing import bite, seeded
from triton_attn.testing.equivalents import EQUIVALENT

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


def test_faults_are_undone() -> None:
    for _ in bite(weak):
        strong()


def test_a_fault_keeps_the_line_it_stands_on() -> None:
    boundary = next(fault for fault in seeded.faults(seeded.ran(strong)) if fault.kind == "wrong boundary")
    assert boundary.before == "offset < length"
    with open(__file__) as source:
        assert "offset < length" in source.read().splitlines()[boundary.line - 1]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "kernel"), KERNELS)
def test_every_fault_is_caught_or_argued(row: Mechanism, kernel: Kernel) -> None:
    survivors = [
        (planted.fault.line, planted.fault.key)
        for planted in bite(lambda: teeth.check(row, kernel), equivalent=EQUIVALENT)
        if planted.survived
    ]
    assert survivors == []
