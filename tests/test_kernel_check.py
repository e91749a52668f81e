"""check_kernel: right kernels pass, wrong ones fail with a small call, and bad input is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from triton_attn import device
from triton_attn.testing import CheckError, KernelFault, StrictnessError, check_kernel
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


def same(x: torch.Tensor) -> torch.Tensor:
    return x


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


def test_measured_sensitivity_sees_what_cancels_inside() -> None:
    """(x + 1000) - 1000 loses what x - 0 keeps: the definition itself forgives that much error."""
    x = torch.randn(50, dtype=torch.float64)

    def cancelling(x: torch.Tensor) -> list[torch.Tensor]:
        return [(x + 1000.0) - 1000.0]

    (plain,) = sensitivity(lambda x: [x * 1.0], {"x": x}, [x])
    (lossy,) = sensitivity(cancelling, {"x": x}, cancelling(x))
    assert (plain < 10).all()
    assert (lossy > 400).all()
