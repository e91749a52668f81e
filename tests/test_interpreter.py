"""The strict interpreter: every class of fault is caught where it was seeded, and right kernels raise nothing."""

# Triton has no types: its decorators, and what they decorate, are Any.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_attn.testing.interpreter import (
    AssertionFailed,
    DuplicateStore,
    FalsePromise,
    IntegerOverflow,
    InvalidDescriptor,
    InvalidGrid,
    KernelFault,
    Misaligned,
    OutOfBounds,
    Race,
    SmallDot,
    strict_interpreter,
)

exp = tl.exp  # kernels take functions out of the language by name


@triton.jit
def copy_kernel(source, target, n, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + i + shift, mask=i < n)
    tl.store(target + i, value, mask=i < n)


@triton.jit
def element(pointer, i):
    return tl.load(pointer + i)


@triton.jit
def calling_kernel(source, target, i):
    tl.store(target, element(source, i))


@triton.jit
def reshaped_kernel(source, neighbour, OP: tl.constexpr):
    p = source + 8 + tl.arange(0, 8)
    if OP == "broadcast":
        p = tl.broadcast_to(p[:, None], [8, 2])
    elif OP == "reshape":
        p = tl.reshape(p, [4, 2])
    elif OP == "trans":
        p = tl.trans(tl.reshape(p, [4, 2]))
    elif OP == "cat":
        p = tl.cat(p, p, can_reorder=True)
    elif OP == "join":
        p = tl.join(p, p)
    elif OP == "split":
        p = tl.split(tl.reshape(p, [4, 2]))[1]
    elif OP == "where":
        p = tl.where(tl.arange(0, 8) < 4, p, p)
    elif OP == "gather":
        p = tl.gather(p, tl.arange(0, 8), 0)
    elif OP == "scalar":
        p = tl.reshape(source + 8 + tl.arange(0, 1), [])
    elif OP == "cast":
        p = p.to(tl.pointer_type(tl.int32))
    else:
        p = p.to(tl.int64).to(tl.pointer_type(tl.float32))
    tl.load(p)


@triton.jit
def described_kernel(source, target, rows, stride, BLOCK: tl.constexpr):
    described = tl.make_tensor_descriptor(source, [rows, 16], [stride, 1], [BLOCK, 16])
    block = described.load([tl.program_id(0) * BLOCK, 0])
    tl.store(target + tl.program_id(0), tl.sum(block))


@triton.jit
def descriptor_kernel(described, target, column, BLOCK: tl.constexpr):
    block = described.load([tl.program_id(0) * BLOCK, column])
    tl.store(target + tl.program_id(0), tl.sum(block))


@triton.jit
def pair_kernel(pair, target, i):
    tl.store(target, tl.load(pair[0] + i) + tl.load(pair[1] + i))


@triton.jit
def touch(x, HOW: tl.constexpr):
    if HOW == "load":
        tl.load(x)
    elif HOW == "store":
        tl.store(x, 1.0)
    else:
        tl.atomic_add(x, 1.0)


@triton.jit
def touch_kernel(x, HOW: tl.constexpr):
    touch(x, HOW)


@triton.jit
def turns_kernel(x, FIRST: tl.constexpr, THEN: tl.constexpr):
    if tl.program_id(0) == 0:
        touch(x, FIRST)
    else:
        touch(x, THEN)


@triton.jit
def shift_kernel(x, n, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i + shift, mask=(i + shift >= 0) & (i + shift < n), other=0.0)
    tl.store(x + i, value + 1, mask=i < n)


@triton.jit
def lanes_kernel(x, stride, ATOMIC: tl.constexpr):
    i = tl.arange(0, 8)
    if ATOMIC:
        tl.atomic_add(x + 2 + i * stride, 1.0)
    else:
        tl.store(x + 2 + i * stride, 1.0)


@triton.jit
def integer_kernel(x, y, out, OP: tl.constexpr):
    a = tl.load(x)
    b = tl.load(y)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "high":
        c = tl.umulhi(a, b)
    else:
        c = tl.mul(a, b, sanitize_overflow=False)
    tl.store(out, c)


@triton.jit
def random_kernel(out, seed):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.rand(seed, i))


@triton.jit
def assert_kernel(x):
    tl.device_assert(tl.load(x + tl.arange(0, 4)) > 0, "positive")


@triton.jit
def assume_kernel(n):
    tl.assume(n > 0)


@triton.jit
def wide_kernel(x, target, shift):
    wide = (x + shift).to(tl.pointer_type(tl.float64))
    tl.store(target, tl.load(wide))


@triton.jit
def multiple_kernel(x, n, WHAT: tl.constexpr):
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    if WHAT == "scalar":
        tl.multiple_of(n, 8)
    elif WHAT == "block":
        tl.multiple_of((i + n) % 8, 8)
    elif WHAT == "rows":
        tl.multiple_of(i[:, None] * 3 + n + tl.arange(0, 2)[None, :], [1, 3])
    elif WHAT == "pointer":
        tl.multiple_of(x + n, 16)
    else:
        tl.max_contiguous(tl.multiple_of(i % n, 8), 8)


@triton.jit
def dot_kernel(x, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    a = tl.load(x + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    b = tl.load(x + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :])
    c = tl.dot(a, b)
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], c)


@triton.jit
def optional_kernel(x, bias, out):
    value = exp(tl.load(x))
    if bias is not None:
        value += tl.load(bias)
    tl.store(out, value)


@triton.jit
def choosing_kernel(x, y):
    i = tl.arange(0, 8)
    tl.store(tl.where(i < 4, x, y) + i, i)


@triton.jit
def rows_kernel(source, target, stride_m, stride_n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(source + tl.program_id(0) * stride_m + i * stride_n)
    tl.store(target + tl.program_id(0) * BLOCK + i, value)


@triton.heuristics({"BLOCK": lambda given: 2 * given["n"]})
@triton.jit
def heuristic_kernel(out, n, BLOCK: tl.constexpr):
    tl.store(out, BLOCK)


@triton.autotune([triton.Config({"BLOCK": 4}), triton.Config({"BLOCK": 8}, num_warps=8)], key=["n"])
@triton.jit
def tuned_kernel(out, n, BLOCK: tl.constexpr):
    tl.store(out, BLOCK)


def numbers(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(1, n + 1).to(dtype)


def place(function: Any, part: str) -> tuple[str, str]:
    """("file:line in function", source) of the first of its lines with `part` in it."""
    lines, first = inspect.getsourcelines(function.fn)
    found = next(i for i, line in enumerate(lines) if part in line)
    return f"{Path(__file__).name}:{first + found} in {function.__name__}", lines[found].strip()


# faults


@dataclass(frozen=True)
class Seeded:
    """A launch with one fault, and what must be said about it."""

    kind: type[KernelFault]
    kernel: Any
    arguments: Callable[[], Sequence[Any]]
    part: str  # of the line at fault
    tensor: str = ""
    index: int | None = None
    program: tuple[int, int, int] = (0, 0, 0)


def fused() -> Sequence[Tensor]:
    """Queries, keys and values in one storage."""
    return numbers(24).chunk(3)


def described(rows: int) -> TensorDescriptor:
    """A descriptor that claims so many rows of a tensor that has six."""
    return TensorDescriptor(numbers(96), [rows, 16], [16, 1], [4, 16])


FAULTS = {
    "load past the end": Seeded(OutOfBounds, copy_kernel, lambda: (numbers(8), numbers(8), 8, 1, 4), "tl.load", "source", 8, (1, 0, 0)),
    "load before the start": Seeded(OutOfBounds, copy_kernel, lambda: (numbers(8), numbers(8), 8, -1, 4), "tl.load", "source", -1),
    "store past the end": Seeded(OutOfBounds, copy_kernel, lambda: (numbers(8), numbers(6), 8, 0, 4), "tl.store", "target", 6, (1, 0, 0)),
    "neighbour in a fused projection": Seeded(OutOfBounds, copy_kernel, lambda: (*fused()[:2], 8, 8, 4), "tl.load", "source", 8),
    "hole between rows": Seeded(
        OutOfBounds, copy_kernel, lambda: (numbers(16).view(4, 4)[:, :2], numbers(8), 8, 0, 4), "tl.load", "source", 2
    ),
    "hole between elements": Seeded(OutOfBounds, copy_kernel, lambda: (numbers(16)[1::2], numbers(8), 8, 0, 4), "tl.load", "source", 1),
    "hole under a wide access": Seeded(
        OutOfBounds, wide_kernel, lambda: (numbers(32, torch.int8)[::7], numbers(1, torch.float64), 0), "tl.load", "x", 0
    ),
    "element of an empty tensor": Seeded(OutOfBounds, copy_kernel, lambda: (numbers(0), numbers(4), 4, 0, 4), "tl.load", "source", 0),
    "reinterpreted tensor": Seeded(
        OutOfBounds, copy_kernel, lambda: (triton.reinterpret(numbers(4), tl.int32), numbers(8), 8, 2, 4), "tl.load", "source", 4
    ),
    "descriptor made in the kernel": Seeded(
        OutOfBounds, described_kernel, lambda: (*numbers(128).view(8, 16).split(6), 8, 16, 4), ".load(", "source", 96, (1, 0, 0)
    ),
    "descriptor argument": Seeded(
        OutOfBounds, descriptor_kernel, lambda: (described(8), numbers(2), 0, 4), ".load(", "described", 96, (1, 0, 0)
    ),
    "tensor of a tuple": Seeded(OutOfBounds, pair_kernel, lambda: ((numbers(4), numbers(2)), numbers(1), 2), "tl.load", "pair[1]", 2),
    "own neighbours loaded first": Seeded(Race, shift_kernel, lambda: (numbers(8), 8, 1, 4), "tl.store", "x", 4, (1, 0, 0)),
    "own neighbours stored first": Seeded(Race, shift_kernel, lambda: (numbers(8), 8, -1, 4), "tl.load", "x", 3, (1, 0, 0)),
    "pointers of two tensors": Seeded(Race, choosing_kernel, lambda: (numbers(4), numbers(8)), "tl.store", "x", 0, (1, 0, 0)),
    "pointers that leave both": Seeded(OutOfBounds, choosing_kernel, lambda: (numbers(4), numbers(6)), "tl.store", "y", 6),
    "two lanes of one store": Seeded(DuplicateStore, lanes_kernel, lambda: (numbers(8), 0, False), "tl.store", "x", 2),
    "device_assert": Seeded(AssertionFailed, assert_kernel, lambda: (numbers(4) - 1,), "tl.device_assert"),
    "assume": Seeded(FalsePromise, assume_kernel, lambda: (0,), "tl.assume"),
    "wider access": Seeded(Misaligned, wide_kernel, lambda: (numbers(8), numbers(1, torch.float64), 3), "tl.load", "x", 3),
    "descriptor's base": Seeded(
        Misaligned, described_kernel, lambda: (numbers(99)[1:97].view(6, 16), numbers(2), 6, 16, 4), "tl.make_tensor_descriptor", "source"
    ),
    "descriptor's stride": Seeded(
        Misaligned, described_kernel, lambda: (torch.zeros(6, 18), numbers(2), 6, 18, 4), "tl.make_tensor_descriptor", "source"
    ),
    "descriptor without rows": Seeded(InvalidDescriptor, described_kernel, lambda: (*numbers(4).split(2), 0, 16, 4), "tl.make_", "source"),
    "descriptor's column": Seeded(Misaligned, descriptor_kernel, lambda: (described(6), numbers(2), 2, 4), ".load(", "described"),
    "multiple_of a scalar": Seeded(FalsePromise, multiple_kernel, lambda: (numbers(8), 12, "scalar"), "tl.multiple_of(n, 8)"),
    "multiple_of a block": Seeded(FalsePromise, multiple_kernel, lambda: (numbers(8), 4, "block"), "tl.multiple_of((i + n) % 8, 8)"),
    "multiple_of along an axis": Seeded(FalsePromise, multiple_kernel, lambda: (numbers(8), 1, "rows"), "[1, 3]"),
    "multiple_of a pointer": Seeded(FalsePromise, multiple_kernel, lambda: (numbers(8), 2, "pointer"), "tl.multiple_of(x + n, 16)"),
    "dot": Seeded(SmallDot, dot_kernel, lambda: (torch.zeros(256, dtype=torch.float16), numbers(256), 16, 16, 8), "tl.dot"),
}


@pytest.mark.parametrize("seeded", FAULTS.values(), ids=FAULTS.keys())
def test_a_seeded_fault_is_caught_as_its_own_class_where_it_is(seeded: Seeded) -> None:
    arguments = seeded.arguments()
    with strict_interpreter(), pytest.raises(KernelFault) as raised:
        seeded.kernel[(2,)](*arguments)
    fault = raised.value
    assert type(fault) is seeded.kind
    assert (fault.kernel, fault.program) == (seeded.kernel.__name__, seeded.program)
    assert (fault.line, fault.source) == place(seeded.kernel, seeded.part)
    assert (fault.tensor, fault.index) == (seeded.tensor, seeded.index)
    for part in (fault.what, fault.kernel, str(fault.program), fault.line, fault.source):
        assert part in str(fault)


def test_a_fault_in_a_device_function_names_it_and_the_kernel() -> None:
    with strict_interpreter(), pytest.raises(OutOfBounds) as raised:
        calling_kernel[(1,)](numbers(4), numbers(1), 9)
    (inner, source), (outer, _) = place(element, "tl.load"), place(calling_kernel, "element")
    assert (raised.value.line, raised.value.source, raised.value.kernel) == (f"{inner}, from {outer}", source, "calling_kernel")
    assert (raised.value.tensor, raised.value.index) == ("source", 9)


@pytest.mark.filterwarnings("ignore:.*can_reorder")
@pytest.mark.parametrize("op", ["broadcast", "reshape", "trans", "cat", "join", "split", "where", "gather", "scalar", "cast", "integer"])
def test_a_pointer_remembers_its_tensor_through_every_operation(op: str) -> None:
    query, key, _ = fused()
    with strict_interpreter(), pytest.raises(OutOfBounds) as raised:
        reshaped_kernel[(1,)](query, key, op)
    assert raised.value.tensor == "source"


@pytest.mark.parametrize(("first", "then"), list(itertools.product(("load", "store", "atomic"), repeat=2)))
def test_two_programs_race_unless_both_load_or_both_update_atomically(first: str, then: str) -> None:
    if first == then != "store":
        with strict_interpreter():
            turns_kernel[(3,)](numbers(1), first, then)
        return
    with strict_interpreter(), pytest.raises(Race) as raised:
        turns_kernel[(3,)](numbers(1), first, then)
    assert (raised.value.tensor, raised.value.index, raised.value.program) == ("x", 0, (1, 0, 0))
    with strict_interpreter(races=False):
        turns_kernel[(3,)](numbers(1), first, then)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize(("op", "a", "b"), [("add", "high", 1), ("sub", "low", 1), ("mul", "high", 2), ("mul", "low", -1)])
def test_narrow_integers_overflow(op: str, a: str, b: int, dtype: torch.dtype) -> None:
    bound = torch.iinfo(dtype).max if a == "high" else torch.iinfo(dtype).min
    x, y, out = (torch.tensor([value], dtype=dtype) for value in (bound, b, 0))
    part = {"add": "a + b", "sub": "a - b", "mul": "a * b"}[op]
    with strict_interpreter(), pytest.raises(IntegerOverflow, match=f"int{torch.iinfo(dtype).bits} overflow: {op}") as raised:
        integer_kernel[(1,)](x, y, out, op)
    assert (raised.value.line, raised.value.source) == place(integer_kernel, part)
    with strict_interpreter(overflow=False):
        integer_kernel[(1,)](x, y, out, op)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("op", "dtype"), [("add", torch.int64), ("mul", torch.int64), ("wrap", torch.int32), ("high", torch.int32)])
def test_wide_integers_and_wrapping_on_purpose_raise_nothing(op: str, dtype: torch.dtype, sign: int) -> None:
    x, out = torch.tensor([torch.iinfo(dtype).max]), torch.zeros(1, dtype=dtype)
    with strict_interpreter():
        integer_kernel[(1,)](x.to(dtype), (sign * x).to(dtype), out, op)
    if op == "wrap":
        assert out.item() == sign


def test_the_largest_numbers_that_fit_raise_nothing() -> None:
    with strict_interpreter():
        for op, a, b, c in (("add", 2**31 - 2, 1, 2**31 - 1), ("sub", -(2**31) + 1, 1, -(2**31)), ("mul", -(2**16), 2**15, -(2**31))):
            out = torch.zeros(1, dtype=torch.int32)
            integer_kernel[(1,)](torch.tensor([a], dtype=torch.int32), torch.tensor([b], dtype=torch.int32), out, op)
            assert out.item() == c


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (2**20, 2**11), (2**31,), (1, 2, 3, 4), (-1,), lambda given: (1, given["n"])])
def test_a_grid_that_cuda_refuses_is_refused_before_anything_runs(grid: Any) -> None:
    x = torch.zeros(1)
    with strict_interpreter(), pytest.raises(InvalidGrid) as raised:
        shift_kernel[grid](x, 70_000, 1, 4)
    assert (raised.value.kernel, raised.value.program, raised.value.line) == ("shift_kernel", None, "")
    assert x.item() == 0


# no false alarms

RIGHT: dict[str, tuple[Any, Any, Callable[[], Sequence[Any]], int, Any]] = {
    # kernel, grid, arguments, which of them is the result, what it holds
    "shared reads": (rows_kernel, (2,), lambda: (numbers(4).expand(2, 4), numbers(8), 0, 1, 4), 1, [1, 2, 3, 4] * 2),
    "updates in place": (shift_kernel, (2,), lambda: (numbers(8), 8, 0, 4), 0, range(2, 10)),
    "rows apart": (rows_kernel, (2,), lambda: (numbers(16).view(2, 8)[:, ::2], numbers(8), 8, 2, 4), 1, range(1, 16, 2)),
    "fused projection": (copy_kernel, (2,), lambda: (*fused()[:2], 8, 0, 4), 1, range(1, 9)),
    "empty tensors": (copy_kernel, (2,), lambda: (numbers(0), numbers(0), 0, 0, 4), 1, []),
    "empty grid": (copy_kernel, (0, 5), lambda: (numbers(8), numbers(8), 8, 99, 4), 1, range(1, 9)),
    "absent tensor": (optional_kernel, (1,), lambda: (torch.zeros(1), None, numbers(1)), 2, [1]),
    "present tensor": (optional_kernel, (1,), lambda: (torch.zeros(1), numbers(1), numbers(1)), 2, [2]),
    "one lane stores": (touch_kernel, (1,), lambda: (numbers(1), "store"), 0, [1]),
    "everybody counts": (touch_kernel, (9,), lambda: (numbers(1), "atomic"), 0, [10]),
    "lanes count together": (lanes_kernel, (3,), lambda: (torch.zeros(3), 0, True), 0, [0, 0, 24]),
    "pointers of two tensors": (choosing_kernel, (1,), lambda: (numbers(4), numbers(8)), 1, [1, 2, 3, 4, 4, 5, 6, 7]),
    "smallest dot": (dot_kernel, (1,), lambda: (numbers(16, torch.float16), numbers(1), 1, 1, 16), 1, [1496]),
    "device function": (calling_kernel, (1,), lambda: (numbers(4), numbers(1), 3), 1, [4]),
    "descriptor made in the kernel": (described_kernel, (2,), lambda: (numbers(96).view(6, 16), numbers(2), 6, 16, 4), 1, [2080, 2576]),
    "descriptor argument": (descriptor_kernel, (2,), lambda: (described(6), numbers(2), 0, 4), 1, [2080, 2576]),
    "tuple": (pair_kernel, (1,), lambda: ((numbers(4), numbers(2)), numbers(1), 1), 1, [4]),
    "assertions": (assert_kernel, (2,), lambda: (numbers(4),), 0, range(1, 5)),
    "assumption": (assume_kernel, (2,), lambda: (1,), 0, 1),
    "scalar multiple": (multiple_kernel, (2,), lambda: (numbers(8), 16, "scalar"), 0, range(1, 9)),
    "block multiple": (multiple_kernel, (2,), lambda: (numbers(8), 16, "block"), 0, range(1, 9)),
    "multiple along an axis": (multiple_kernel, (2,), lambda: (numbers(8), 0, "rows"), 0, range(1, 9)),
    "pointer multiple": (multiple_kernel, (2,), lambda: (numbers(8), 4, "pointer"), 0, range(1, 9)),
    "wrapped offsets": (multiple_kernel, (2,), lambda: (numbers(8), 12, "wrapped"), 0, range(1, 9)),
    "random numbers": (random_kernel, (1,), lambda: (numbers(16), 0x1234_5678_9ABC), 1, 0x1234_5678_9ABC),
    "heuristics": (heuristic_kernel, (1,), lambda: (numbers(1), 4), 0, [8]),
    "first configuration": (tuned_kernel, (1,), lambda: (numbers(1), 4), 0, [4]),
    "aligned wide access": (wide_kernel, (1,), lambda: (torch.zeros(8), numbers(1, torch.float64), 2), 1, [0]),
    "grid from arguments": (
        copy_kernel,
        lambda given: (triton.cdiv(given["n"], given["BLOCK"]),),
        lambda: (numbers(8), torch.zeros(8), 8, 0, 4),
        1,
        range(1, 9),
    ),
}


@pytest.mark.parametrize(("kernel", "grid", "arguments", "which", "holds"), RIGHT.values(), ids=RIGHT.keys())
def test_a_right_kernel_raises_nothing(kernel: Any, grid: Any, arguments: Callable[[], Sequence[Any]], which: int, holds: Any) -> None:
    given = arguments()
    with strict_interpreter():
        kernel[grid](*given)
    assert torch.as_tensor(given[which]).tolist() == (list(holds) if isinstance(holds, range) else holds)
