"""The switch of the strict interpreter: its settings, that it leaves nothing behind, what plain Triton lets pass without it."""

# Triton has no types: its decorators, and what they decorate, are Any.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import inspect
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as plain
from triton.runtime.autotuner import Autotuner

from triton_attn import CATALOG, device
from triton_attn.testing import inputs
from triton_attn.testing.interpreter import KernelFault, OutOfBounds, Race, StrictnessError, strict_interpreter
from triton_attn.tiles import Tile
from triton_attn.verify import kernel_run

exp = tl.exp  # kernels take functions out of the language by name


@triton.jit
def double(value):
    return value + value


@triton.jit
def double_kernel(source, target, BLOCK: tl.constexpr, shift=0):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, double(tl.load(source + i + shift)))


@triton.jit
def named_kernel(x):
    tl.store(x, exp(tl.load(x)))


@triton.jit
def everybody_kernel(x):
    tl.store(x, tl.load(x) + 1)


@triton.jit
def last_kernel(x):
    value = tl.load(x)
    if tl.program_id(0) + 1 == tl.num_programs(0):
        tl.store(x, value + 1)


@triton.jit
def addressed_kernel(table, out):
    pointer = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(out + tl.program_id(0), tl.load(pointer))


@triton.jit
def ticket_kernel(counter, out):
    i = tl.program_id(0) * 6 + tl.program_id(1) * 2 + tl.program_id(2)
    tl.store(out + i, tl.atomic_add(counter, 1))


@triton.jit
def rows_kernel(source, target, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(target + tl.program_id(0) * BLOCK + i, tl.load(source + tl.program_id(0) * stride + i))


@triton.jit
def masked_kernel(x, out, n):
    i = tl.arange(0, 4)
    tl.store(out + i, tl.load(x + i, mask=i < n))


@triton.jit
def overflow_kernel(x):
    tl.store(x, tl.load(x) + tl.load(x))


@triton.jit
def promise_kernel(n):
    tl.multiple_of(n, 8)
    tl.device_assert(n == 0)


@triton.jit
def small_dot_kernel(x):
    i = tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(x + i, tl.dot(tl.load(x + i), tl.load(x + i)))


@triton.jit
def empty_kernel(x):
    pass


@triton.autotune([triton.Config({"BLOCK": 4}), triton.Config({"BLOCK": 8})], key=["n"])
@triton.jit
def tuned_kernel(out, n, BLOCK: tl.constexpr):
    tl.store(out, BLOCK)


def numbers(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(1, n + 1).to(dtype)


# settings


def test_bounds_of_the_storage_allow_a_kernel_to_step_out_of_its_view_only() -> None:
    storage, out = numbers(12), numbers(4)
    view = storage[4:8]
    for bounds in ("storage", False):
        with strict_interpreter(bounds=bounds):
            double_kernel[(1,)](view, out, 4, shift=-4)
        assert out.tolist() == [2, 4, 6, 8]
    with strict_interpreter(), pytest.raises(OutOfBounds):
        double_kernel[(1,)](view, out, 4, shift=-4)
    for shift, first in ((-5, -5), (5, 8)):
        with strict_interpreter(bounds="storage"), pytest.raises(OutOfBounds) as raised:
            double_kernel[(1,)](view, out, 4, shift=shift)
        assert (raised.value.tensor, raised.value.index) == ("source", first)


def test_races_are_seen_without_bounds() -> None:
    storage = numbers(8)
    with strict_interpreter(bounds=False), pytest.raises(Race) as raised:
        double_kernel[(2,)](storage[4:], storage[:4], 4)
    assert (raised.value.tensor, raised.value.index, raised.value.program) == ("source", 0, (1, 0, 0))


def test_the_last_of_several_readers_may_not_write() -> None:
    with strict_interpreter():
        last_kernel[(1,)](numbers(1))
        with pytest.raises(Race) as raised:
            last_kernel[(3,)](numbers(1))
    assert raised.value.program == (2, 0, 0)


def test_tensors_behind_addresses_in_memory_have_to_be_named() -> None:
    tensors, out = [numbers(1), numbers(3)[2:]], torch.zeros(2)
    table = torch.tensor([x.data_ptr() for x in tensors])
    with strict_interpreter(reachable=tensors):
        addressed_kernel[(2,)](table, out)
    assert out.tolist() == [1, 3]
    with strict_interpreter(reachable=tensors[:1]), pytest.raises(OutOfBounds) as raised:
        addressed_kernel[(2,)](table, out)
    assert raised.value.program == (1, 0, 0)


@pytest.mark.parametrize(
    ("dtype", "poison"), [(torch.float32, torch.nan), (torch.bfloat16, torch.nan), (torch.int32, (2**31 - 1) // 3)], ids=str
)
def test_masked_lanes_are_poisoned_unless_told_otherwise(dtype: torch.dtype, poison: float) -> None:
    for on, seen in ((True, poison), (False, 0.0)):
        out = numbers(4, dtype)
        with strict_interpreter(poison=on):
            masked_kernel[(1,)](numbers(4, dtype), out, 3)
        assert out.tolist() == pytest.approx([1, 2, 3, seen], rel=0, abs=0, nan_ok=True)


def test_a_far_stride_costs_nothing_and_overflows_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((3, 4), (2**30, 1))  # virtual memory only
    far.copy_(numbers(12, torch.float16).view(3, 4))
    out = torch.zeros(12, dtype=torch.float16)
    start = time.perf_counter()
    with strict_interpreter():
        rows_kernel[(2,)](far, out, far.stride(0), 4)
        assert out.tolist() == [*range(1, 9), 0, 0, 0, 0]
        with pytest.raises(KernelFault, match="int32 overflow: mul gives 2147483648"):
            rows_kernel[(3,)](far, out, far.stride(0), 4)
        rows_kernel[(2,)](far[::2], out, far[::2].stride(0), 4)
        assert out[4:8].tolist() == [9, 10, 11, 12]
    assert time.perf_counter() - start < 1


def test_a_shuffled_order_visits_every_program_once() -> None:
    every = torch.arange(24, dtype=torch.int32)
    orders = []
    for order in (None, 0, 0, 1):
        out, counter = torch.full((24,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with strict_interpreter(order=order):
            ticket_kernel[(4, 3, 2)](counter, out)
        assert torch.equal(out.sort().values, every)
        orders.append(out)
    assert torch.equal(orders[0], every)
    assert torch.equal(orders[1], orders[2])
    assert not torch.equal(orders[1], every)
    assert not torch.equal(orders[1], orders[3])


def test_a_kernel_without_atomics_gives_the_same_bits_in_any_order() -> None:
    row = CATALOG["attention"]
    code = row.kernels[-1].load()
    tensors, options = inputs.draw(row, row.cases[0])
    options.setdefault("scale", None)
    found = []
    for order in (None, 1, 2):
        with strict_interpreter(order=order):
            found.append(code.forward(**tensors, **options, tile=Tile(16, 16, 4, 1)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_kernels_are_launched_with_keyword_arguments() -> None:
    out = numbers(4)
    with strict_interpreter():
        double_kernel[(1,)](BLOCK=4, target=out, source=numbers(4), num_warps=8)
        with pytest.raises(OutOfBounds) as raised:
            double_kernel[(1,)](BLOCK=4, target=out, source=numbers(3), num_warps=8)
    assert out.tolist() == [2, 4, 6, 8]
    assert (raised.value.tensor, raised.value.index) == ("source", 3)


# nesting, threads, and what is left behind


def surroundings() -> dict[str, Any]:
    """Everything that a block could have exchanged and not put back."""
    owners = [plain, tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, tl.standard]
    owners += [TritonSemantic, Autotuner, plain.InterpretedFunction, plain.InterpreterBuilder, device]
    found = {f"{owner}.{name}": inspect.getattr_static(owner, name) for owner in owners for name in dir(owner)}
    builder = plain.interpreter_builder
    return {**found, **{f"builder.{name}": value for name, value in vars(builder).items()}, "class": type(builder), "exp": exp}


def assert_unchanged(before: dict[str, Any]) -> None:
    after = surroundings()
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] is not after[name]] == []


def test_a_block_puts_everything_back() -> None:
    before = surroundings()
    with strict_interpreter():
        named_kernel[(1,)](torch.zeros(1))
        double_kernel[(1,)](numbers(4), numbers(4), 4)
        assert exp is not before["exp"]
        assert plain.GridExecutor is not before[f"{plain}.GridExecutor"]
    assert_unchanged(before)
    assert not {"memory", "program", "poison", "tf32"} & vars(plain.interpreter_builder).keys()


def test_a_block_left_by_an_exception_puts_everything_back() -> None:
    before = surroundings()
    with pytest.raises(OutOfBounds), strict_interpreter():
        double_kernel[(1,)](numbers(3), numbers(4), 4)
    assert_unchanged(before)
    with pytest.raises(OutOfBounds), strict_interpreter(), strict_interpreter(order=1):
        double_kernel[(1,)](numbers(3), numbers(4), 4)
    assert_unchanged(before)


def test_a_block_that_cannot_be_entered_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_patch_lang", lambda function: 1 // 0)
    before = surroundings()
    with pytest.raises(ZeroDivisionError), strict_interpreter():
        raise NotImplementedError
    assert_unchanged(before)


def test_a_launch_after_a_block_is_a_plain_one() -> None:
    x = torch.zeros(1)
    with strict_interpreter(), pytest.raises(Race):
        everybody_kernel[(3,)](x)
    x.zero_()
    everybody_kernel[(3,)](x)
    assert x.item() == 3
    with pytest.raises(RuntimeError, match="0 active drivers"):
        tuned_kernel[(1,)](x, 1)
    with pytest.raises(Exception, match="_semantic"):
        named_kernel[(1,)](x)


def test_an_inner_block_has_its_own_settings_and_the_outer_ones_come_back() -> None:
    x = torch.zeros(1)
    with strict_interpreter():
        with strict_interpreter(races=False):
            everybody_kernel[(3,)](x)
            with strict_interpreter(), pytest.raises(Race):
                everybody_kernel[(3,)](x)
            everybody_kernel[(3,)](x)
        with pytest.raises(Race):
            everybody_kernel[(3,)](x)


def test_a_fault_leaves_the_block_usable() -> None:
    out = numbers(4)
    with strict_interpreter():
        for _ in range(3):
            with pytest.raises(OutOfBounds):
                double_kernel[(1,)](numbers(3), out, 4)
            double_kernel[(1,)](numbers(4), out, 4)
    assert out.tolist() == [2, 4, 6, 8]


def test_threads_may_launch_inside_one_block() -> None:
    def launch(seed: int) -> bool:
        source, out, tuned = numbers(16) * seed, torch.zeros(16), torch.zeros(1)
        double_kernel[(4,)](source, out, 4)
        tuned_kernel[(1,)](tuned, 1)
        return torch.equal(out, 2 * source) and tuned.item() == 4

    with strict_interpreter(), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(launch, range(40)))
    assert len(tuned_kernel.configs) == 2


def test_a_record_counts_launches_and_names_functions() -> None:
    with strict_interpreter() as record:
        double_kernel[(2,)](numbers(8), numbers(8), 4)
        double_kernel[(2,)](numbers(8), numbers(8), 4)
    assert record.launches == 2
    assert {name.rpartition(".")[2] for name in record.functions} == {"double_kernel", "double"}


def test_a_package_whose_name_begins_like_triton_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Path(__file__).with_name("test_interpreter")  # as site-packages/triton beside site-packages/triton_attn
    monkeypatch.setattr(triton, "__file__", str(beside / "__init__.py"))
    with strict_interpreter(), pytest.raises(OutOfBounds) as raised:
        double_kernel[(1,)](numbers(3), numbers(4), 4)
    assert "in double_kernel" in raised.value.line


# where it cannot work


def test_a_compiling_triton_is_refused_with_what_to_do() -> None:
    code = "from triton_attn.testing.interpreter import StrictnessError, strict_interpreter\n"
    code += "try:\n    with strict_interpreter(): pass\nexcept StrictnessError as error: print(error)"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert "set TRITON_INTERPRET=1 before triton is imported" in said


def test_an_unset_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(StrictnessError, match="set TRITON_INTERPRET=1"), strict_interpreter():
        raise NotImplementedError


@pytest.mark.parametrize("version", ["3.60.0", "3.8.0", "4.0.0", "3.10.0+git1"])
def test_an_unknown_triton_is_refused_with_the_known_ones(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "triton_version", lambda: version)
    with pytest.raises(StrictnessError) as raised, strict_interpreter():
        raise NotImplementedError
    assert version in str(raised.value)
    assert "knows 3.6 and 3.9; install one of them" in str(raised.value)


# what plain Triton lets pass: should it learn one of these, the strict interpreter may drop it


GAPS: dict[str, tuple[Any, tuple[int, ...], tuple[Any, ...]]] = {
    "out of the view": (double_kernel, (1,), (numbers(12)[4:8], numbers(4), 4, 4)),
    "race": (everybody_kernel, (3,), (numbers(1),)),
    "overflow": (overflow_kernel, (1,), (torch.tensor([2**30], dtype=torch.int32),)),
    "false promises": (promise_kernel, (1,), (4,)),
    "small dot": (small_dot_kernel, (1,), (numbers(4),)),
    "grid": (empty_kernel, (1, 65536), (numbers(1),)),
}


@pytest.mark.parametrize(("kernel", "grid", "arguments"), GAPS.values(), ids=GAPS.keys())
def test_plain_triton_lets_it_pass(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    kernel[grid](*arguments)
    with strict_interpreter(), pytest.raises(KernelFault):
        kernel[grid](*arguments)


@pytest.mark.slow
def test_strictness_costs_no_time() -> None:
    row = CATALOG["attention"]
    run = kernel_run(row, row.kernels[-1].load(), Tile(16, 16, 4, 1))
    tensors, options = inputs.draw(row, row.cases[0])
    options.setdefault("scale", None)
    grads = [torch.ones(inputs.shape(given.axes, row.cases[0].sizes)) for given in row.outputs.values()]
    plain_seconds, strict_seconds = [], []
    for _ in range(5):
        start = time.perf_counter()
        run(tensors, options, grads)
        plain_seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        with strict_interpreter():
            run(tensors, options, grads)
        strict_seconds.append(time.perf_counter() - start)
    print(plain_seconds, strict_seconds)
    assert min(strict_seconds) <= min(plain_seconds), (plain_seconds, strict_seconds)
