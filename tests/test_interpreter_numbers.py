"""Numbers of the strict interpreter: bfloat16 bit for bit as in PyTorch, tf32, and reductions and scans by any function."""

# Triton has no types: its decorators, and what they decorate, are Any.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from triton_attn.testing.interpreter import strict_interpreter

BF16 = torch.bfloat16
N = 512

# kernels


@triton.jit
def arithmetic_kernel(x, y, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + i + COUNT, a - b)
    tl.store(out + i + COUNT * 2, a * b)
    tl.store(out + i + COUNT * 3, a / b)
    tl.store(out + i + COUNT * 4, a * 1.1)
    tl.store(out + i + COUNT * 5, tl.abs(a))
    tl.store(out + i + COUNT * 6, tl.where(a > b, a, b))


@triton.jit
def extreme_kernel(x, y, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, tl.minimum(a, b))
    tl.store(out + i + COUNT, tl.maximum(a, b))
    tl.store(out + i + COUNT * 2, -a)


@triton.jit
def fused_kernel(x, y, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(x + i)))


@triton.jit
def compare_kernel(x, y, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, (a < b).to(out.dtype.element_ty))
    tl.store(out + i + COUNT, (a <= b).to(out.dtype.element_ty))
    tl.store(out + i + COUNT * 2, (a > b).to(out.dtype.element_ty))
    tl.store(out + i + COUNT * 3, (a >= b).to(out.dtype.element_ty))
    tl.store(out + i + COUNT * 4, (a == b).to(out.dtype.element_ty))
    tl.store(out + i + COUNT * 5, (a != b).to(out.dtype.element_ty))


@triton.jit
def cast_kernel(source, target, COUNT: tl.constexpr, ROUNDING: tl.constexpr = None):
    i = tl.arange(0, COUNT)
    tl.store(target + i, tl.load(source + i).to(target.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def dot_kernel(x, y, z, out, PRECISION: tl.constexpr):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    if PRECISION is None:
        c = tl.dot(tl.load(x + i), tl.load(y + i), tl.load(z + i))
    else:
        c = tl.dot(tl.load(x + i), tl.load(y + i), tl.load(z + i), input_precision=PRECISION)
    tl.store(out + i, c.to(out.dtype.element_ty))


@triton.jit
def fold_kernel(x, out, OP: tl.constexpr, AXIS: tl.constexpr, COUNT: tl.constexpr):
    value = tl.load(x + tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :])
    if OP == "sum":
        found = tl.sum(value, AXIS)
    elif OP == "max":
        found = tl.max(value, AXIS)
    elif OP == "min":
        found = tl.min(value, AXIS)
    elif OP == "argmax":
        found = tl.argmax(value, AXIS)
    else:
        found = tl.reshape(tl.cumsum(value, AXIS, reverse=OP == "reverse"), [COUNT])
    if COUNT == 1:
        tl.store(out, found)
    else:
        tl.store(out + tl.arange(0, COUNT), found)


@triton.jit
def add_kernel(x, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.atomic_add(out + i % 2, tl.load(x + i), mask=i < COUNT - 2)


@triton.jit
def recurrence(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def larger(value1, index1, value2, index2):
    first = (value1 > value2) | ((value1 == value2) & (index1 < index2))
    return tl.where(first, value1, value2), tl.where(first, index1, index2)


@triton.jit
def scan_kernel(x, y, out, out2, AXIS: tl.constexpr, REVERSE: tl.constexpr, SHAPE: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a = tl.reshape(tl.load(x + i), SHAPE)
    b = tl.reshape(tl.load(y + i), SHAPE)
    a, b = tl.associative_scan((a, b), AXIS, recurrence, reverse=REVERSE)
    tl.store(out + i, tl.reshape(a, [COUNT]))
    tl.store(out2 + i, tl.reshape(b, [COUNT]))


@triton.jit
def reduce_kernel(x, y, out, AXIS: tl.constexpr, KEEP: tl.constexpr, SHAPE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr):
    i = tl.arange(0, COUNT)
    a = tl.reshape(tl.load(x + i), SHAPE)
    b = tl.reshape(tl.load(y + i), SHAPE)
    _, found = tl.reduce((a, b), AXIS, recurrence, keep_dims=KEEP)
    if KEEP:
        tl.store(out + i, tl.reshape(b - found, [COUNT]))
    elif REST == 0:
        tl.store(out, found)
    else:
        tl.store(out + tl.arange(0, REST), tl.reshape(found, [REST]))


@triton.jit
def largest_kernel(x, value, index, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    found, at = tl.reduce((tl.load(x + i), i), 0, larger)
    tl.store(value, found)
    tl.store(index, at)


# bfloat16, bit for bit


def drawn(special: Any, dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    """N numbers: first those with these bits, then any."""
    kind = f"int{dtype.itemsize * 8}"
    first = np.array(special, f"u{kind}")
    rest = st.binary(min_size=(N - first.size) * dtype.itemsize, max_size=(N - first.size) * dtype.itemsize)
    return rest.map(lambda raw: torch.from_numpy(np.concatenate((first, np.frombuffer(raw, first.dtype))).view(kind)).view(dtype))


SIGNS = (0, 0x8000)
# zeros, subnormals, one and its neighbour, the largest, infinities, NaN with its lowest and highest bit
SPECIAL = [sign | bits for sign in SIGNS for bits in (0, 1, 0x7F, 0x80, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0)]
# the same as float32, with nothing, less than half, half and more than half of a bfloat16's last place below
TIES = [high << 16 | low for high in SPECIAL for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
LEFT, RIGHT = drawn([a for a in SPECIAL for _ in SPECIAL], BF16), drawn([b for _ in SPECIAL for b in SPECIAL], BF16)
SINGLE = drawn(TIES, torch.float32)
HALF = drawn([sign | bits for sign in SIGNS for bits in (0, 1, 0x3FF, 0x400, 0x3C00, 0x3C04, 0x7BFF, 0x7C00, 0x7E00)], torch.float16)
DOUBLE = drawn(torch.tensor(TIES).int().view(torch.float32).double().numpy().view(np.uint64), torch.float64)


def integers(dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    bound = torch.iinfo(dtype).max
    special = [value % (2 * bound + 2) for value in (0, 1, -1, 257, 258, 259, 2**24 + 1, bound, -bound - 1)]
    return drawn(special, dtype)


def assert_same(found: Tensor, truth: Tensor) -> None:
    """Equal bits, and NaN in the same places."""
    assert found.dtype == truth.dtype
    nan = truth.isnan()
    assert torch.equal(found.isnan(), nan)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[truth.itemsize]
    assert torch.equal(found[~nan].view(bits), truth[~nan].view(bits)), (found, truth)


@given(x=LEFT, y=RIGHT)
def test_arithmetic_is_rounded_once(x: Tensor, y: Tensor) -> None:
    out = torch.zeros(7, N, dtype=BF16)
    with strict_interpreter():
        arithmetic_kernel[(1,)](x, y, out, N)
    constant = torch.tensor(1.1, dtype=BF16)
    assert_same(out, torch.stack((x + y, x - y, x * y, x / y, x * constant, x.abs(), torch.where(x > y, x, y))))


@given(x=LEFT, y=RIGHT)
def test_extremes_and_signs_are_exact(x: Tensor, y: Tensor) -> None:
    x, y, out = x.nan_to_num(), y.nan_to_num(), torch.zeros(3, N, dtype=BF16)  # what becomes of NaN depends on the version
    with strict_interpreter():
        extreme_kernel[(1,)](x, y, out, N)
    assert_same(out + 0, torch.stack((x.minimum(y), x.maximum(y), -x)) + 0)  # and so does the sign of zero


@given(x=LEFT, y=RIGHT)
def test_a_fused_product_and_sum_is_rounded_from_float32(x: Tensor, y: Tensor) -> None:
    x, y = (torch.where((t.abs() > 1e-10) & (t.abs() < 1e8), t, 1.0) for t in (x, y))  # the product neither overflows nor vanishes
    out = torch.zeros(N, dtype=BF16)
    with strict_interpreter():
        fused_kernel[(1,)](x, y, out, N)
    assert_same(out, (x.double() * y.double() + x.double()).float().to(BF16))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, BF16], ids=str)
@given(x=LEFT, y=RIGHT)
def test_comparisons_give_truth_values_of_any_type(dtype: torch.dtype, x: Tensor, y: Tensor) -> None:
    out = torch.zeros(6, N, dtype=dtype)
    with strict_interpreter():
        compare_kernel[(1,)](x, y, out, N)
    assert torch.equal(out, torch.stack((x < y, x <= y, x > y, x >= y, x == y, x != y)).to(dtype))


CASTS = {
    "float32 to bfloat16": (SINGLE, BF16),
    "float64 to bfloat16": (DOUBLE, BF16),
    "float16 to bfloat16": (HALF, BF16),
    "int32 to bfloat16": (integers(torch.int32), BF16),
    "int64 to bfloat16": (integers(torch.int64), BF16),
    "int8 to bfloat16": (integers(torch.int8), BF16),
    "bfloat16 to float32": (LEFT, torch.float32),
    "bfloat16 to float64": (LEFT, torch.float64),
    "bfloat16 to float16": (LEFT, torch.float16),
    "bfloat16 to bool": (LEFT, torch.bool),
    "bfloat16 to bfloat16": (LEFT, BF16),
}


@pytest.mark.parametrize(("source", "dtype"), CASTS.values(), ids=CASTS.keys())
@given(data=st.data())
def test_casts_round_to_the_nearest_even(source: st.SearchStrategy[Tensor], dtype: torch.dtype, data: st.DataObject) -> None:
    x, out = data.draw(source), torch.zeros(N, dtype=dtype)
    with strict_interpreter():
        cast_kernel[(1,)](x, out, N)
    assert_same(out, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
@given(x=LEFT)
def test_casts_to_integers_drop_the_fraction(dtype: torch.dtype, x: Tensor) -> None:
    x, out = x.nan_to_num().clamp(-32000, 32000), torch.zeros(N, dtype=dtype)
    with strict_interpreter():
        cast_kernel[(1,)](x, out, N)
    assert torch.equal(out, x.to(dtype))


@given(x=SINGLE)
def test_a_cast_told_to_truncate_truncates(x: Tensor) -> None:
    x, out = torch.where(x.isfinite(), x, 1.0), torch.zeros(N, dtype=BF16)
    with strict_interpreter():
        cast_kernel[(1,)](x, out, N, "rtz")
    assert torch.equal(out.view(torch.int16), (x.view(torch.int32) >> 16).to(torch.int16))


def whole(shape: tuple[int, ...], most: int) -> st.SearchStrategy[Tensor]:
    """Whole numbers up to `most`, whose sums and products float32 holds exactly."""
    raw = st.binary(min_size=math.prod(shape), max_size=math.prod(shape))
    return raw.map(lambda given: torch.tensor(np.fmod(np.frombuffer(given, np.int8).astype(np.int16), most), dtype=BF16).view(shape))


@given(x=whole((16, 16), 17), y=whole((16, 16), 17), z=whole((16, 16), 17))
def test_products_add_up_in_float32(x: Tensor, y: Tensor, z: Tensor) -> None:
    truth = x.float() @ y.float() + z.float()  # exact
    for dtype in (torch.float32, BF16):
        out = torch.zeros(16, 16, dtype=dtype)
        with strict_interpreter():
            dot_kernel[(1,)](x, y, z.float(), out, None)
        assert_same(out, truth.to(dtype))


SUMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": torch.sum,
    "max": torch.amax,
    "min": torch.amin,
    "argmax": lambda x, axis: torch.from_numpy(x.float().numpy().argmax(axis)),
    "cumsum": torch.cumsum,
    "reverse": lambda x, axis: x.flip(axis).cumsum(axis).flip(axis),
}


@pytest.mark.parametrize("op", SUMS)
@pytest.mark.parametrize("axis", [0, 1])
@given(x=whole((8, 16), 128))
def test_reductions_and_sums_are_rounded_once(op: str, axis: int, x: Tensor) -> None:
    truth = SUMS[op](x, axis)
    out = torch.zeros(truth.numel(), dtype=torch.int32 if "arg" in op else BF16)
    with strict_interpreter():
        fold_kernel[(1,)](x, out, op, axis, truth.numel())
    assert_same(out, truth.flatten().to(out.dtype))


@pytest.mark.parametrize(("op", "truth"), [("sum", torch.sum), ("max", torch.max), ("min", torch.min)])
def test_reductions_over_every_axis_give_one_number(op: str, truth: Callable[[Tensor], Tensor]) -> None:
    x, out = torch.randint(-255, 255, (8, 16)).to(BF16), torch.zeros(1, dtype=BF16)
    with strict_interpreter():
        fold_kernel[(1,)](x, out, op, None, 1)
    assert_same(out, truth(x).view(1))


def test_atomic_sums_round_after_each_lane() -> None:
    x, out = torch.ones(1024, dtype=BF16), torch.tensor([0.0, 0.5], dtype=BF16)
    with strict_interpreter():
        add_kernel[(3,)](x, out, 1024)
    assert out.tolist() == [256, 256]  # 256 + 1 is a tie, and 256 is even
    out = torch.zeros(2, dtype=BF16)
    with strict_interpreter():
        add_kernel[(1,)](torch.arange(16).to(BF16), out, 16)
    assert out.tolist() == [0 + 2 + 4 + 6 + 8 + 10 + 12, 1 + 3 + 5 + 7 + 9 + 11 + 13]  # the last two lanes are masked


# tf32


def truncated(x: Tensor) -> NDArray[Any]:
    """Ten bits of mantissa."""
    return (x.view(torch.int32) & -(2**13)).view(torch.float32).numpy()


def product(precision: str | None, x: Tensor, y: Tensor, *, tf32: bool = True) -> Tensor:
    out = torch.zeros(16, 16)
    with strict_interpreter(tf32=tf32):
        dot_kernel[(1,)](x, y, torch.zeros(16, 16), out, precision)
    return out


def test_tf32_drops_the_last_bits_of_the_operands() -> None:
    x, y = torch.randn(16, 16), torch.randn(16, 16)
    exact, short = torch.from_numpy(x.numpy() @ y.numpy()), torch.from_numpy(truncated(x) @ truncated(y))
    assert 1e-4 < (exact - short).abs().max() < 1e-1
    for precision in ("tf32", None):
        assert torch.equal(product(precision, x, y), short)
        assert torch.equal(product(precision, x, y, tf32=False), exact)
    for precision in ("ieee", "tf32x3"):
        assert torch.equal(product(precision, x, y), exact)


# any function


def folded(x: NDArray[Any], y: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Running products and linear recurrences along an axis, one element after the other."""
    a, b = np.moveaxis(x, axis, 0).copy(), np.moveaxis(y, axis, 0).copy()
    for i in range(1, len(a)):
        for at in np.ndindex(a.shape[1:]):
            here, before = (i, *at), (i - 1, *at)
            b[here] = b[before] * a[here] + b[here]
            a[here] = a[before] * a[here]
    return np.moveaxis(a, 0, axis), np.moveaxis(b, 0, axis)


SHAPES = [((16,), 0), ((8, 16), 0), ((8, 16), 1), ((2, 4, 8), 1), ((4, 1), 0), ((1, 4), 0)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_a_scan_is_the_loop(shape: tuple[int, ...], axis: int, reverse: bool) -> None:
    x, y = torch.randn(shape), torch.randn(shape)
    products, sums = torch.zeros(shape), torch.zeros(shape)
    with strict_interpreter():
        scan_kernel[(1,)](x, y, products, sums, axis, reverse, shape, math.prod(shape))
    turned = [t.flip(axis).numpy() if reverse else t.numpy() for t in (x, y)]
    truth = [np.flip(t, axis) if reverse else t for t in folded(turned[0], turned[1], axis)]
    assert np.array_equal(products.numpy(), truth[0])
    assert np.array_equal(sums.numpy(), truth[1])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [*SHAPES, ((8, 16), None), ((2, 4, 8), None), ((16,), None)], ids=str)
def test_a_reduction_is_the_last_step_of_the_loop(shape: tuple[int, ...], axis: int | None, keep: bool) -> None:
    x, y = torch.randn(shape), torch.randn(shape)
    a, b = (x.numpy(), y.numpy()) if axis is not None else (x.numpy().reshape(-1), y.numpy().reshape(-1))
    last = folded(a, b, axis or 0)[1].take(-1, axis or 0)
    wanted = y.numpy() - (last if axis is None else np.expand_dims(last, axis)) if keep else last
    out = torch.zeros(wanted.size)
    with strict_interpreter():
        reduce_kernel[(1,)](x, y, out, axis, keep, shape, math.prod(shape), last.size if last.ndim else 0)
    assert np.array_equal(out.numpy(), wanted.reshape(-1))


def test_a_reduction_of_pairs_may_mix_types() -> None:
    for dtype in (torch.float32, torch.float16, BF16):
        x = torch.tensor([3, 7, 7, 1], dtype=dtype)
        value, index = torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=torch.int32)
        with strict_interpreter():
            largest_kernel[(1,)](x, value, index, 4)
        assert (value.item(), index.item()) == (7, 1)


def test_a_scan_of_64_by_64_takes_less_than_a_tenth_of_a_second() -> None:
    x, out = torch.randn(64, 64), torch.zeros(64, 64)
    seconds = []
    with strict_interpreter():
        for _ in range(3):
            start = time.perf_counter()
            scan_kernel[(1,)](x, x, out, out.clone(), 0, False, (64, 64), 4096)
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1


# plain Triton is wrong: should it learn one of these, what replaces it here may go


def test_plain_triton_computes_on_the_bits_of_bfloat16() -> None:
    ones, two, number, block = torch.ones(N, dtype=BF16), torch.zeros(N, dtype=BF16), torch.zeros(1, dtype=BF16), torch.zeros(16, 16)

    def right() -> list[bool]:
        fused_kernel[(1,)](ones, ones, two, N)
        fold_kernel[(1,)](ones, number, "sum", None, 1)
        dot_kernel[(1,)](ones, ones, torch.zeros(16, 16), block, None)
        return [two[0].item() == 2, number.item() == 128, block[0, 0].item() == 16]

    assert right() == [False, False, False]
    with strict_interpreter():
        assert right() == [True, True, True]


def test_plain_triton_truncates_to_bfloat16() -> None:
    x, out = torch.full((N,), 1 + 2**-8 + 2**-10), torch.zeros(N, dtype=BF16)
    cast_kernel[(1,)](x, out, N)
    assert (out == 1).all()


def test_plain_triton_has_no_atomic_sums_of_bfloat16() -> None:
    with pytest.raises(Exception, match="Unsupported"):
        add_kernel[(1,)](torch.ones(N, dtype=BF16), torch.zeros(2, dtype=BF16), N)


def test_plain_triton_computes_tf32_in_full_float32() -> None:
    x, y, out = torch.randn(16, 16), torch.randn(16, 16), torch.zeros(16, 16)
    dot_kernel[(1,)](x, y, torch.zeros(16, 16), out, "tf32")
    assert torch.equal(out, torch.from_numpy(x.numpy() @ y.numpy()))
