"""check_kernel: right kernels pass, wrong ones fail with a small call, and bad input is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import find
from hypothesis.strategies import SearchStrategy

from triton_attn import device
from triton_attn.testing import CheckError, KernelFault, StrictnessError, check_kernel, strategies
from triton_attn.testing.sensitivity import sensitivity


@triton.jit  # type: ignore[untyped-decorator]
def rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, out_ptr, strides, columns, eps, FAULT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * strides[0] + column * strides[1], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column * strides[2], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, 0) / columns
    if FAULT == 1:
        mean = tl.sum(x * x, 0) / BLOCK
    out = x * tl.rsqrt(mean + eps) * w
    if FAULT == 2:
        out = (x * tl.rsqrt(mean + eps)).to(tl.bfloat16) * w
    tl.store(out_ptr + row * columns + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def launched(x: torch.Tensor, weight: torch.Tensor, fault: int = 0) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    (rows, columns), strides = x.shape, (*x.stride(), weight.stride(0))
    rms_norm_kernel[(rows,)](x, weight, out, strides, columns, 1e-6, FAULT=fault, BLOCK=triton.next_power_of_2(columns))
    return out


def definition(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight).to(x.dtype)


class Norm(torch.autograd.Function):
    """The kernel forward, the definition backward, with a fault on request."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, gradient_fault: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fault = gradient_fault
        return launched(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            dx, dw = torch.autograd.grad(definition(x, weight), (x, weight), grad)
        return dx, dw * 1.1 if ctx.fault else dw, None


INPUTS = {"x": "rows columns", "weight": "columns"}
FORWARD: dict[str, Any] = {"gradients": False, "examples": 15}


def test_a_right_kernel_passes_and_says_how_near_it_came() -> None:
    seen = check_kernel(launched, definition, INPUTS, **FORWARD)
    assert seen.calls >= 15
    assert seen.launches == seen.calls
    assert 0 < seen.worst["0"] < 1
    assert "15 calls" in str(seen)


@pytest.mark.parametrize("fault", [1, 2], ids=["mean over the padded block", "a step in bfloat16"])
def test_a_wrong_kernel_fails_with_a_small_call(fault: int) -> None:
    with pytest.raises(AssertionError, match=r"(?s)Call\(sizes=\{'columns': \d+, 'rows': \d+\}.*times its bound") as failure:
        check_kernel(lambda x, weight: launched(x, weight, fault), definition, INPUTS, dtypes=[torch.float32], **FORWARD)
    assert re.search(r"'columns': [1-4], 'rows': [12]\}", str(failure.value))


def test_gradients_are_compared() -> None:
    arguments: dict[str, Any] = {"inputs": INPUTS, "examples": 8, "dtypes": [torch.float32]}
    normed: Callable[..., Any] = Norm.apply
    seen = check_kernel(lambda x, weight: normed(x, weight, False), definition, **arguments)
    assert seen.worst.keys() == {"0", "grad x", "grad weight"}
    with pytest.raises(AssertionError, match="grad weight"):
        check_kernel(lambda x, weight: normed(x, weight, True), definition, **arguments)


def test_a_kernel_that_takes_no_strides_is_found_out() -> None:
    def careless(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return launched(x.as_strided(x.shape, (x.shape[1], 1)), weight)

    with pytest.raises((AssertionError, KernelFault)):
        check_kernel(careless, definition, INPUTS, **FORWARD)
    check_kernel(careless, definition, INPUTS, layouts=["contiguous"], **FORWARD)


def test_a_changed_input_is_found_out() -> None:
    def changing(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = launched(x, weight)
        x.zero_()
        return out

    with pytest.raises(AssertionError, match="changed its input x"):
        check_kernel(changing, definition, INPUTS, layouts=["contiguous"], **FORWARD)


def test_sizes_options_and_other_inputs_are_the_caller_s() -> None:
    seen_sizes = set()

    def picked(x: torch.Tensor, index: torch.Tensor, fault: int) -> torch.Tensor:
        seen_sizes.add(tuple(x.shape))
        return launched(x, torch.ones(x.shape[1]).to(x.dtype), fault)[index]

    check_kernel(
        picked,
        lambda x, index, fault: definition(x, torch.ones(x.shape[1]).to(x.dtype))[index],
        {"x": "rows columns", "index": lambda sizes, generator: torch.randint(sizes["rows"], (3,), generator=generator)},
        sizes={"rows": [2, 3], "columns": 16},
        options={"fault": [0]},
        where=lambda sizes: sizes["rows"] == 3,
        **FORWARD,
    )
    assert seen_sizes == {(3, 16)}


@triton.jit  # type: ignore[untyped-decorator]
def row_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, columns, HOW: tl.constexpr, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=float("-inf"))
    if HOW == "argmax":
        tl.store(out_ptr + row, tl.argmax(x, 0))
    elif HOW == "positive":
        tl.store(out_ptr + row * columns + column, x, mask=inside & (x > 0))
    elif HOW == "copy":
        tl.store(out_ptr + row * columns + column, x, mask=inside)
    else:
        top = 0.0
        if HOW == "softmax":
            top = tl.max(x, 0)
        p = tl.exp(x - top)
        tl.store(out_ptr + row * columns + column, p / tl.sum(p, 0), mask=inside)


def by_rows(how: str, dtype: torch.dtype | None = None, skipped: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """A launcher of `row_kernel`, which may leave out the last rows."""

    def call(x: torch.Tensor) -> torch.Tensor:
        (rows, columns), x = x.shape, x.contiguous()
        out = torch.empty(rows if how == "argmax" else (rows, columns), dtype=dtype or x.dtype)
        row_kernel[(max(1, rows - skipped),)](x, out, columns, HOW=how, BLOCK=triton.next_power_of_2(columns))
        return out

    return call


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(x_ptr, out_ptr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.dot(x, x, input_precision=PRECISION))


def product(precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(16, 16)
        product_kernel[(1,)](x.contiguous(), out, PRECISION=precision)
        return out

    return call


def same(x: torch.Tensor) -> torch.Tensor:
    return x


ROWS = {"x": "rows columns"}
SINGLE: dict[str, Any] = {**FORWARD, "dtypes": [torch.float32]}


def test_integers_are_compared_exactly() -> None:
    check_kernel(by_rows("argmax", torch.int64), lambda x: x.argmax(1), ROWS, **FORWARD)
    with pytest.raises(AssertionError, match=r"0\[0\] is \d+, the truth"):
        check_kernel(by_rows("argmax", torch.int64), lambda x: x.argmin(1), ROWS, **FORWARD)


def test_a_result_narrower_than_the_reference_s_is_wrong() -> None:
    check_kernel(by_rows("copy", torch.float32), same, ROWS, **FORWARD)
    with pytest.raises(AssertionError, match="reference gives"):
        check_kernel(by_rows("copy", torch.bfloat16), same, ROWS, **SINGLE)


@pytest.mark.parametrize(("launch", "reference"), [(by_rows("copy", skipped=1), same), (by_rows("positive"), lambda x: x.relu())])
def test_what_nobody_wrote_is_nan(launch: Callable[..., Any], reference: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match=r"0\[.*is nan, the truth"):
        check_kernel(launch, reference, ROWS, **SINGLE)


def test_a_softmax_that_forgot_its_maximum_is_found_out() -> None:
    check_kernel(by_rows("softmax"), lambda x: x.softmax(1), ROWS, **SINGLE)
    with pytest.raises(AssertionError, match="is nan, the truth"):
        check_kernel(by_rows("no maximum"), lambda x: x.softmax(1), ROWS, **{**SINGLE, "examples": 50})


def test_two_faults_are_one_failure() -> None:
    def faulty(x: torch.Tensor) -> torch.Tensor:
        return by_rows("copy", skipped=1)(x) * (2 if x.shape[1] < 9 else 1)

    with pytest.raises(AssertionError):
        check_kernel(faulty, same, ROWS, **{**SINGLE, "examples": 50})


def test_products_in_tf32_are_named_and_allowed_for() -> None:
    square: dict[str, Any] = {**SINGLE, "sizes": {"n": 16, "m": 16}}
    with pytest.raises(AssertionError, match="products='tf32'"):
        check_kernel(product("tf32"), lambda x: x @ x, {"x": "n m"}, **square)
    check_kernel(product("tf32"), lambda x: x @ x, {"x": "n m"}, products="tf32", **square)
    check_kernel(product("ieee"), lambda x: x @ x, {"x": "n m"}, **square)


def test_launches_of_one_program_are_told() -> None:
    alone = check_kernel(by_rows("copy"), same, ROWS, sizes={"rows": 1}, **SINGLE)
    assert alone.programs == 1
    assert "every launch was one program" in str(alone)
    assert "one program" not in str(check_kernel(by_rows("copy"), same, ROWS, **SINGLE))


@pytest.mark.parametrize(
    ("drawn", "every"),
    [
        (strategies.dtypes(), {torch.float32, torch.float16, torch.bfloat16}),
        (strategies.dtypes((torch.float16, torch.float64, torch.float32)), {torch.float16, torch.float64, torch.float32}),
    ],
    ids=["by default", "of the caller's"],
)
def test_dtypes_are_drawn_and_shrink_to_float32(drawn: SearchStrategy[torch.dtype], every: set[torch.dtype]) -> None:
    assert {find(drawn, lambda dtype, wanted=wanted: dtype == wanted) for wanted in every} == every  # type: ignore[misc]
    assert find(drawn, lambda dtype: True) == torch.float32
    assert find(strategies.dtypes((torch.bfloat16, torch.float16)), lambda dtype: True) == torch.bfloat16


def test_a_kernel_that_is_wrong_in_every_dtype_is_shown_in_float32() -> None:
    with pytest.raises(AssertionError, match=r"dtype=torch\.float32"):
        check_kernel(by_rows("copy"), lambda x: 2 * x, ROWS, **{**FORWARD, "dtypes": [torch.float16, torch.float32]})


REFUSED: list[tuple[str, Callable[..., Any], Callable[..., Any], Any, dict[str, Any], str]] = [
    ("a kernel without a grid", rms_norm_kernel, definition, INPUTS, {}, "pass the Python function that launches it"),
    ("no function", 3, definition, INPUTS, {}, "cannot be called"),  # type: ignore[list-item]
    ("no kernel inside", same, same, {"x": "n"}, {}, "launched no Triton kernel"),
    ("another signature", launched, same, INPUTS, {}, "reference same cannot take x, weight"),
    ("axes that do not parse", launched, definition, {"x": "rows, columns", "weight": "columns"}, {}, r"inputs\['x'\]"),
    ("no inputs", lambda: None, lambda: None, {}, {}, "inputs is empty"),
    ("an unknown gradient", launched, definition, INPUTS, {"gradients": ["y"]}, "gradients names y"),
    ("no derivative", launched, definition, INPUTS, {"gradients": True}, "pass gradients=False"),
    ("no tensor returned", lambda x: 3, same, {"x": "n"}, {}, "returns int"),
    ("a tensor and nothing", lambda x: (x, None), same, {"x": "n"}, {}, "returns NoneType"),
    ("a builtin", by_rows("copy"), torch.exp, ROWS, {}, "tells no signature; wrap it"),
    ("a list of inputs", same, same, ["x"], {}, "inputs is"),
    ("an input that gives nothing", same, same, {"x": lambda sizes, generator: None}, {}, "gives NoneType"),
    ("an unknown layout", same, same, {"x": "n"}, {"layouts": ["diagonal"]}, "layouts has diagonal; allowed: contiguous"),
    ("integers as a working dtype", same, same, {"x": "n"}, {"dtypes": [torch.int8]}, "dtypes has torch.int8; allowed"),
    ("products that there are not", same, same, {"x": "n"}, {"products": "tf33"}, "products is 'tf33'"),
    ("sizes that there are not", same, same, {"x": "n"}, {"where": lambda sizes: False}, "where is never true"),
]


@pytest.mark.parametrize(("function", "reference", "inputs", "more", "said"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_checked_is_refused(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: Any, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckError, match=said):
        check_kernel(function, reference, inputs, **{**FORWARD, **more})


def test_without_the_interpreter_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreting", lambda: False)
    with pytest.raises(StrictnessError, match="TRITON_INTERPRET=1"):
        check_kernel(launched, definition, INPUTS, **FORWARD)


def test_a_gpu_is_not_interpreted() -> None:
    with pytest.raises(StrictnessError, match="unset it"):
        check_kernel(launched, definition, INPUTS, device="cuda", **FORWARD)


def test_measured_sensitivity_sees_what_cancels_inside() -> None:
    """(x + 1000) - 1000 loses what x - 0 keeps: the definition itself forgives that much error."""
    x = torch.randn(50, dtype=torch.float64)

    def cancelling(x: torch.Tensor) -> list[torch.Tensor]:
        return [(x + 1000.0) - 1000.0]

    (plain,) = sensitivity(lambda x: [x * 1.0], {"x": x}, [x])
    (lossy,) = sensitivity(cancelling, {"x": x}, cancelling(x))
    assert (plain < 10).all()
    assert (lossy > 400).all()


def test_measured_sensitivity_sees_what_gelu_cancels() -> None:
    x = torch.full((1,), -4.0, dtype=torch.float64)
    (size,) = sensitivity(lambda x: [torch.nn.functional.gelu(x)], {"x": x}, [torch.nn.functional.gelu(x)])
    assert size.item() > 1.0  # x / 2 times the roundoff of 1 + erf(x), where gelu itself is 1e-4
