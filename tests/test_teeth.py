"""Seeded faults: each kind is planted and undone, a weak check is told apart from a strong one, and the kernels' own checks bite."""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Callable
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
from triton_attn.testing.exchanges import exchanges
from triton_attn.testing.interpreter import strict_interpreter

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


EXCHANGES = {
    "tl.load(p, inside)": ["tl.load(p)"],
    "tl.load(p, inside, 1.0)": ["tl.load(p)", "tl.load(p, inside, 0)"],
    "tl.load(p, inside, 0.0, cache_modifier='.cg')": ["tl.load(p, cache_modifier='.cg')", "tl.load(p, inside, 1, cache_modifier='.cg')"],
    "tl.load(p, inside, 0.0, (0,))": ["tl.load(p, None, None, (0,))", "tl.load(p, inside, 1, (0,))"],
    "tl.load(p, inside, other=0.0)": ["tl.load(p)", "tl.load(p, inside, other=1)"],
    "tl.load(p, mask=inside, other=0.0)": ["tl.load(p)", "tl.load(p, mask=inside, other=1)"],
    "tl.load(p)": [],
    "tl.store(p, x, inside)": ["tl.store(p, x)"],
    "tl.store(p, x)": [],
    "tl.atomic_add(p, x, inside)": ["tl.atomic_add(p, x)"],
    "tl.atomic_max(p, x, mask=inside, sem='relaxed')": ["tl.atomic_max(p, x, sem='relaxed')"],
    "tl.atomic_xchg(p, x, inside, 'relaxed')": ["tl.atomic_xchg(p, x, None, 'relaxed')"],
    "tl.atomic_cas(p, x, y)": [],
    "tl.dot(a, b, acc=c, input_precision='ieee')": ["tl.dot(a, b, input_precision='ieee')"],
    "tl.dot(a, b, c)": ["tl.dot(a, b)"],
    "range(first, last)": ["range(first + 1, last)", "range(first, last - 1)"],
    "tl.range(0, n, num_stages=2)": ["tl.range(0 + 1, n, num_stages=2)", "tl.range(0, n - 1, num_stages=2)"],
    "tl.static_range(0, n, step=4)": ["tl.static_range(0 + 4, n, step=4)", "tl.static_range(0, n - 4, step=4)"],
    "range(0, n, 4)": ["range(4, n, 4)", "range(0, n - 4, 4)"],
    "range(n)": [],
}


@pytest.mark.parametrize(("call", "others"), EXCHANGES.items(), ids=EXCHANGES.keys())
def test_a_call_is_exchanged_for_those_that_are_often_mistaken_for_it(call: str, others: list[str]) -> None:
    around = ast.parse("def kernel(): pass").body[0]
    assert isinstance(around, ast.FunctionDef)
    assert [ast.unparse(exchanged) for _, exchanged in exchanges(ast.parse(call, mode="eval").body, around)] == others


@triton.jit  # type: ignore[untyped-decorator]
def summed_kernel(x_ptr, total_ptr, length, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    product = tl.zeros((16, 16), tl.float32)
    for chunk in range(0, chunks):
        offset = chunk * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offset, offset < length, 0.0)
        ones = tl.full((16, 16), 1.0, tl.float32)
        product = tl.dot(tl.broadcast_to(x[None, :], (16, 16)), ones, acc=product, input_precision="ieee")
    lane = tl.arange(0, 16)
    tl.atomic_add(total_ptr + lane, tl.sum(product, 0) / 16, lane < 4)


def summed() -> None:
    x, total = torch.linspace(1, 3, 37), torch.zeros(4)
    summed_kernel[(1,)](x, total, 37, 3, BLOCK=16)
    torch.testing.assert_close(total, x.sum().expand(4))


def test_masks_by_position_accumulators_by_name_and_ends_of_loops_are_planted() -> None:
    bites = list(bite(summed))
    assert [planted.fault.key for planted in bites if planted.survived] == []
    caught = {planted.fault.kind for planted in bites if planted.fault.before.startswith(("tl.load", "tl.atomic", "tl.dot", "range"))}
    assert caught == {"forgotten mask", "wrong filler", "forgotten accumulator", "swapped bounds", "forgotten statement"}


# kernels of a function, which are reached through its variables


@triton.jit
def rectified(x):  # type: ignore[no-untyped-def]
    return tl.maximum(x, 0.0)


def made(activation: Any, function: Any = tl.abs) -> Any:
    """A kernel that runs what it is given, and a function beside it."""
    scale = tl.constexpr(2.0)

    @triton.jit
    def weighted(x, factor):  # type: ignore[no-untyped-def]
        return activation(x) * factor * scale

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offset, offset < length)
        tl.store(out_ptr + offset, weighted(x, 3.0) + function(x), offset < length)

    return kernel


KEPT = functools.cache(made)


@pytest.mark.parametrize("make", [KEPT, made], ids=["one kernel", "a kernel for each call"])
def test_functions_that_a_kernel_reaches_through_variables_around_it_are_found(make: Callable[..., Any]) -> None:
    def check() -> None:
        x = torch.linspace(-3, 3, 21)
        out = torch.empty_like(x)
        make(rectified)[(2,)](x, out, 21, BLOCK=16)
        torch.testing.assert_close(out, x.clamp(min=0) * 6 + x.abs())

    bites = list(bite(check))
    assert [planted.fault.key for planted in bites if planted.survived] == []
    assert {planted.fault.function.rpartition(".")[2] for planted in bites} == {"kernel", "weighted", "rectified"}
    with strict_interpreter():
        check()


def numbering() -> Any:
    @triton.jit
    def numbered(out_ptr):  # type: ignore[no-untyped-def]
        tl.store(out_ptr, 1 + 0)

    return numbered


def numbering_otherwise() -> Any:
    @triton.jit
    def numbered(out_ptr):  # type: ignore[no-untyped-def]
        tl.store(out_ptr, 2 - 0)

    return numbered


def test_functions_of_one_name_are_told_apart_by_the_function_around_them() -> None:
    def check() -> None:
        for kernel in (numbering(), numbering_otherwise()):
            kernel[(1,)](torch.zeros(1))

    assert {fault.before for fault in seeded.faults(seeded.ran(check))} >= {"1 + 0", "2 - 0"}


def test_a_variable_around_a_kernel_has_the_value_of_the_launch() -> None:
    out, shift = torch.zeros(1), tl.constexpr(1)

    @triton.jit
    def kernel(out_ptr):  # type: ignore[no-untyped-def]
        tl.store(out_ptr, shift)

    for value in (1, 2):
        shift = tl.constexpr(value)
        with strict_interpreter():
            kernel[(1,)](out)
        assert out.item() == value


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
