"""The language as compiled code has it, where plain interpretation differs: arguments, loops, float8, sums, masked-off integers."""

# Triton has no types: its decorators, and what they decorate, are Any.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.libdevice import rsqrt

from triton_attn.testing.interpreter import IntegerOverflow, Misaligned, OutOfBounds, Race, StrictnessError, strict_interpreter


@triton.jit
def scaled_kernel(x, out, factor):
    i = tl.arange(0, 4)
    tl.store(out + i, tl.load(x + i) * factor)


@triton.jit
def scaled_by_pair_kernel(x, out, factors):
    i = tl.arange(0, 4)
    tl.store(out + i, tl.load(x + i) * factors[0].to(tl.float32) * factors[1])


@triton.jit
def exponential_kernel(x, out, factor):
    i = tl.arange(0, 4)
    tl.store(out + i, tl.exp(tl.load(x + i) * factor))


@triton.jit
def sum_of_arguments_kernel(out, a, b):
    tl.store(out, a + b)


@triton.jit
def divided_kernel(out, n):
    for i in range(0, n):
        tl.store(out + i, (i - 3) // 2)


@triton.jit
def wrapped_index_kernel(x, out, n):
    for i in range(n):
        tl.store(out + i, tl.load(x + (i - 1) % n))


@triton.jit
def far_loop_kernel(x, n, WIDE: tl.constexpr, OURS: tl.constexpr, STRIDE: tl.constexpr):
    if OURS:
        for i in tl.range(0, n, num_stages=1):
            row = i.to(tl.int64) if WIDE else i
            tl.store(x + (row * STRIDE) // STRIDE, 1.0)
    else:
        for i in range(0, n):
            row = i.to(tl.int64) if WIDE else i  # type: ignore[attr-defined]
            tl.store(x + (row * STRIDE) // STRIDE, 1.0)


@triton.jit
def cast_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def added_kernel(x, out):
    tl.store(out, tl.load(x) + tl.load(x))


@triton.jit
def summed_kernel(x, out, HOW: tl.constexpr):
    i = tl.arange(0, 4)
    if HOW == "sum":
        tl.store(out, tl.sum(tl.load(x + i)))
    else:
        tl.store(out + i, tl.cumsum(tl.load(x + i)))


@triton.jit
def rows_kernel(table, index, out, n, stride, N: tl.constexpr, D: tl.constexpr):
    i, d = tl.arange(0, N), tl.arange(0, D)
    there = i < n
    row = tl.load(index + i, mask=there)
    values = tl.load(table + row[:, None] * stride + d[None, :], mask=there[:, None])
    tl.store(out + i[:, None] * D + d[None, :], values, mask=there[:, None])


@triton.jit
def chosen_kernel(index, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    row = tl.load(index + i, mask=i < n)
    tl.store(out + i, tl.where(i < n, row * 1000000, -1))


@triton.jit
def unmasked_kernel(index, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(index + i) * 2000000000)


@triton.jit
def gathered_kernel(x, index, out):
    i = tl.arange(0, 4)
    tl.store(out + i, tl.gather(tl.load(x + i), tl.load(index + i), 0))


def launched(kernel, *arguments, grid: int = 1, **constants) -> None:
    with strict_interpreter():
        kernel[(grid,)](*arguments, **constants)


# arguments


@pytest.mark.parametrize(
    ("dtype", "value", "factor", "expected"),
    [(torch.float16, 300.0, 300.0, 90000.0), (torch.bfloat16, 1.0, 0.3, 0.3), (torch.float64, 1.0, 0.1, 0.1)],
)
def test_a_float_argument_is_a_float32_scalar(dtype: torch.dtype, value: float, factor: float, expected: float) -> None:
    out = torch.empty(4, dtype=torch.float64)
    launched(scaled_kernel, torch.full((4,), value, dtype=dtype), out, factor)
    torch.testing.assert_close(out, torch.full((4,), expected, dtype=torch.float32).double(), rtol=0, atol=0)


def test_float_arguments_have_the_methods_of_tensors_in_tuples_too() -> None:
    out = torch.empty(4)
    launched(scaled_by_pair_kernel, torch.ones(4, dtype=torch.float16), out, (0.3, 2.0))
    assert torch.equal(out, torch.full((4,), 0.3) * 2)


def test_what_a_float_argument_widens_can_be_raised() -> None:
    out = torch.empty(4)
    launched(exponential_kernel, torch.ones(4, dtype=torch.float16), out, 0.5)
    torch.testing.assert_close(out, torch.full((4,), 0.5).exp())


def test_integer_arguments_from_two_to_the_31_on_have_64_bits() -> None:
    out = torch.empty(1, dtype=torch.int64)
    launched(sum_of_arguments_kernel, out, 2**31 + 5, 2**31 + 7)
    assert out.item() == 2**32 + 12


def test_a_keyword_that_is_neither_argument_nor_launch_option_is_refused() -> None:
    x = torch.ones(4)
    with pytest.raises(KeyError, match="factr"):
        launched(scaled_kernel, x, x.clone(), 1.0, factr=2.0)
    launched(scaled_kernel, x, x.clone(), 1.0, num_warps=2)


# loops


def test_the_variable_of_a_loop_divides_as_in_compiled_code() -> None:
    out = torch.empty(4, dtype=torch.int32)
    launched(divided_kernel, out, 4)
    assert out.tolist() == [-1, -1, 0, 0]


def test_an_index_that_wraps_in_python_alone_is_out_of_bounds() -> None:
    with pytest.raises(OutOfBounds):
        launched(wrapped_index_kernel, torch.ones(4), torch.empty(4), 4)


@pytest.mark.parametrize("ours", [False, True], ids=["range", "tl.range"])
def test_the_variable_of_a_loop_overflows_unless_it_is_widened(ours: bool) -> None:
    launched(far_loop_kernel, torch.empty(10), 10, True, ours, 2**28)
    with pytest.raises(IntegerOverflow):
        launched(far_loop_kernel, torch.empty(10), 10, False, ours, 2**28)


def test_plain_interpretation_finds_its_own_functions_again() -> None:
    out = torch.empty(4, dtype=torch.int32)
    launched(divided_kernel, out, 4)
    divided_kernel[(1,)](out, 4)  # Python divides downwards
    assert out.tolist() == [-2, -1, -1, 0]


# float8


@pytest.mark.parametrize("target", [torch.float8_e5m2, torch.float8_e4m3fn])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_to_float8_are_torchs_within_its_range_and_saturate_beyond(source: torch.dtype, target: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500) * 3.0 ** torch.randint(-12, 4, (500,)), torch.tensor([0.0, -0.0, 1.9873, 7.57, 65536.0, torch.inf])])
    x = torch.cat([x, x.new_full((512 - len(x),), torch.nan)]).to(source)
    out = torch.empty(512, dtype=target)
    launched(cast_kernel, x, out, N=512)
    most = torch.finfo(target).max
    expected = x.float().clamp(-most, most).to(target)
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(512)
    launched(cast_kernel, out, back, N=512)
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


def test_arithmetic_in_float8_is_refused_as_the_compiler_does() -> None:
    x = torch.ones(1).to(torch.float8_e5m2)
    with pytest.raises(TypeError, match="cast to float32"):
        launched(added_kernel, x, x.clone())


# integers


@pytest.mark.parametrize("how", ["sum", "cumsum"])
def test_a_sum_that_overflows_is_a_fault(how: str) -> None:
    launched(summed_kernel, torch.full((4,), 2**28, dtype=torch.int32), torch.empty(4, dtype=torch.int32), how)
    with pytest.raises(IntegerOverflow):
        launched(summed_kernel, torch.full((4,), 2**30, dtype=torch.int32), torch.empty(4, dtype=torch.int32), how)


def test_indices_of_masked_off_lanes_may_overflow() -> None:
    table, out = torch.randn(8, 16), torch.zeros(4, 16)
    launched(rows_kernel, table, torch.tensor([5, 0, 7], dtype=torch.int32), out, 3, 16, N=4, D=16)
    assert torch.equal(out[:3], table[[5, 0, 7]])


def test_what_is_chosen_beside_a_masked_off_lane_may_overflow_only_there() -> None:
    index, out = torch.tensor([3, 4, 5, 6], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    launched(chosen_kernel, index[:2], out, 2, N=4)
    assert out.tolist() == [3000000, 4000000, -1, -1]
    with pytest.raises(IntegerOverflow, match="sanitize_overflow=False"):
        launched(unmasked_kernel, index, out, N=4)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_gathering_what_is_not_there_is_a_fault(wrong: int) -> None:
    with pytest.raises(OutOfBounds, match=f"tl.gather of {wrong}"):
        launched(gathered_kernel, torch.ones(4), torch.tensor([0, 1, wrong, 3], dtype=torch.int32), torch.empty(4))


# libdevice


@triton.jit
def libdevice_kernel(x, out, HOW: tl.constexpr):
    i = tl.arange(0, 4)
    value = tl.load(x + i)
    if HOW == "by module":
        tl.store(out + i, libdevice.tanh(value) + libdevice.pow(value, 2.0))
    elif HOW == "by name":
        tl.store(out + i, rsqrt(value))
    elif HOW == "scalar":
        tl.store(out + i, value * rsqrt(tl.load(x)))
    else:
        tl.store(out + i, libdevice.j0(value))


@pytest.mark.parametrize(
    ("how", "expected"),
    [("by module", lambda x: x.tanh() + x**2), ("by name", torch.rsqrt), ("scalar", lambda x: x * x[0].rsqrt())],
)
def test_libdevice_is_interpreted(how: str, expected: Callable[[Tensor], Tensor]) -> None:
    x, out = torch.rand(4) + 0.5, torch.empty(4)
    launched(libdevice_kernel, x, out, how)
    torch.testing.assert_close(out, expected(x))


def test_what_libdevice_has_beyond_is_refused_by_name_and_half_precision_as_by_the_compiler() -> None:
    with pytest.raises(StrictnessError, match=r"libdevice\.j0 is not interpreted"):
        launched(libdevice_kernel, torch.ones(4), torch.empty(4), "unknown")
    with pytest.raises(TypeError, match="takes float32 and float64"):
        launched(libdevice_kernel, torch.ones(4).half(), torch.empty(4), "by name")


# scalars


@triton.jit
def scalar_kernel(x, out, wanted):
    there = wanted != 0
    tl.store(out, tl.load(x, mask=there, other=0.0))
    tl.store(out + 1 + tl.arange(0, 4), tl.load(x + tl.arange(0, 4), mask=there & (tl.arange(0, 4) < 3), other=1.0))


def test_a_masked_off_scalar_is_what_was_given_for_it_and_a_condition_spreads() -> None:
    out = torch.empty(5)
    launched(scalar_kernel, torch.full((4,), 7.0), out, 0)
    assert out.tolist() == [0, 1, 1, 1, 1]
    launched(scalar_kernel, torch.full((4,), 7.0), out, 1)
    assert out.tolist() == [7, 7, 7, 7, 1]


@triton.jit
def hash_kernel(out):
    i = tl.arange(0, 4).to(tl.uint32)
    tl.store(out + tl.arange(0, 4), (i * 2654435761) >> 16)


def test_what_is_unsigned_wraps_by_definition() -> None:
    out = torch.empty(4, dtype=torch.int32)
    launched(hash_kernel, out)
    assert out.tolist() == [(i * 2654435761) % 2**32 >> 16 for i in range(4)]


# autotuning, and kernels that were compiled


def pruned(configs, named_args, **kwargs):
    return [config for config in configs if config.kwargs["BLOCK"] <= named_args["n"]]


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 4})], key=["n"], prune_configs_by={"early_config_prune": pruned})
@triton.jit
def unmasked_copy_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))


def test_an_autotuned_kernel_runs_with_the_first_configuration_that_its_pruning_leaves() -> None:
    x, out = torch.randn(4), torch.empty(4)
    launched(unmasked_copy_kernel, x, out, 4)
    assert torch.equal(x, out)


LATE = """
import os
os.environ["TRITON_INTERPRET"] = "0"
import torch, triton
import triton.language as tl

@triton.jit
def kernel(x):
    tl.store(x, 1.0)

os.environ["TRITON_INTERPRET"] = "1"
from triton_attn.testing import strict_interpreter
with strict_interpreter():
    kernel[(1,)](torch.zeros(1))
"""


def test_a_kernel_that_was_compiled_before_the_interpreter_came_on_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    file.write_text(LATE)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment)
    assert found.returncode == 1
    assert f"{StrictnessError.__name__}: kernel was compiled, not interpreted" in found.stderr


# waiting


def polling():
    @triton.jit
    def polled_kernel(flag, x, out):
        if tl.program_id(0) == 0:
            tl.store(x, 1.0)
            tl.atomic_xchg(flag, 1)
        else:
            tl.atomic_poll(flag, 1)

    return polled_kernel


@pytest.mark.skipif(not hasattr(tl, "atomic_poll"), reason="this Triton has no tl.atomic_poll")
def test_waiting_for_a_flag_is_no_race() -> None:
    flag, x = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    launched(polling(), flag, x, Tensor(1), grid=2)
    assert flag.item() == 1
    with pytest.raises(Race):
        launched(added_in_place_kernel, x, grid=2)


@triton.jit
def added_in_place_kernel(x):
    tl.store(x, tl.load(x) + 1)


# atomic updates by descriptors


@triton.jit
def reduced_kernel(x, out, rows, step, shift, HOW: tl.constexpr):
    described = tl.make_tensor_descriptor(out, [rows, 16], [16, 1], [4, 16])
    block = tl.load(x + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :])
    at = tl.program_id(0) * step
    if HOW == "add":
        described.atomic_add([at, shift], block)
    elif HOW == "min":
        described.atomic_min([at, shift], block)
    elif HOW == "max":
        described.atomic_max([at, shift], block)
    else:
        described.atomic_xor([at, shift], block)


HOW: dict[str, Callable[..., Tensor]] = {"add": torch.add, "min": torch.minimum, "max": torch.maximum, "xor": torch.bitwise_xor}
# what the language lets pass
REDUCED = [("add", torch.float32), *itertools.product(("add", "min", "max"), (torch.float16, torch.bfloat16))]
REDUCED += itertools.product(HOW, (torch.int32, torch.uint32))


@pytest.mark.parametrize(("how", "dtype"), REDUCED)
def test_descriptors_update_atomically_what_lies_in_them(how: str, dtype: torch.dtype) -> None:
    x, out = (torch.randint(0 if dtype == torch.uint32 else -9, 9, (rows, 16)).to(dtype) for rows in (4, 5))
    wide = torch.int64 if dtype == torch.uint32 else dtype
    expected = out.to(wide)
    for first in (0, 2):
        expected[first : first + 4] = HOW[how](expected[first : first + 4], x[: 5 - first].to(wide))
    launched(reduced_kernel, x, out, 5, 2, 0, how, grid=2)  # rows in common: no race
    assert torch.equal(out.to(wide), expected)


def test_an_update_by_a_descriptor_is_checked_as_any_other() -> None:
    x, out = torch.ones(4, 16), torch.zeros(5, 16)
    with pytest.raises(OutOfBounds) as raised:
        launched(reduced_kernel, x, out, 6, 2, 0, "add", grid=2)
    assert (raised.value.tensor, raised.value.index) == ("out", 80)
    with pytest.raises(Misaligned):
        launched(reduced_kernel, x, out, 5, 2, 2, "add")
    with pytest.raises(Race):
        launched(mixed_kernel, x, out, grid=2)


@triton.jit
def mixed_kernel(x, out):
    described = tl.make_tensor_descriptor(out, [5, 16], [16, 1], [4, 16])
    if tl.program_id(0) == 0:
        described.atomic_add([0, 0], described.load([0, 0]))
    else:
        tl.store(out, 1.0)


def test_plain_triton_has_no_atomic_updates_by_descriptors() -> None:
    with pytest.raises(Exception, match="create_descriptor_reduce"):
        reduced_kernel[(1,)](torch.ones(4, 16), torch.zeros(5, 16), 5, 2, 0, "add")
