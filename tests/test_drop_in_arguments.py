"""What torch's two calls take beside plain tensors and Python's numbers: causal biases, NumPy's numbers, masks of other dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

import triton_attn
from triton_attn import ArgumentError
from triton_attn.nn import MultiheadAttention

sdpa: Any = triton_attn.scaled_dot_product_attention
theirs: Any = F.scaled_dot_product_attention
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SHAPES = {
    "plain": ((2, 3, 5, 8), (2, 3, 7, 8)),
    "equal lengths": ((2, 3, 5, 8), (2, 3, 5, 8)),
    "2 dimensions": ((5, 8), (7, 8)),
    "5 dimensions, broadcast": ((2, 1, 3, 5, 8), (2, 2, 1, 7, 8)),
    "grouped heads": ((2, 6, 5, 8), (2, 2, 7, 8)),
}


def draw(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    query, key = SHAPES[name]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in (query, key, key)]


def results(function: Callable[..., Tensor], leaves: list[Tensor], *rest: Any, **options: Any) -> list[Tensor]:
    out = function(*leaves, *rest, **options)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


# torch's causal biases


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 1e-15], ids=["plain", "dropout of nothing"])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_is_causal(make: Callable[[int, int], CausalBias], dropout_p: float, name: str) -> None:
    leaves, grouped = draw(name, torch.float64), name == "grouped heads"
    bias = make(leaves[0].shape[-2], leaves[1].shape[-2])
    ours = results(sdpa, leaves, bias, dropout_p, enable_gqa=grouped)
    expected = results(theirs, leaves, bias._materialize(), enable_gqa=grouped)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert type(ours[0]) is Tensor


def test_a_causal_bias_compiles() -> None:
    torch._dynamo.reset()
    leaves, bias = draw("plain"), causal_lower_right(5, 7)
    compiled: Any = torch.compile(sdpa, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves, bias), theirs(*leaves, bias._materialize()))


def test_a_causal_bias_from_the_top_left_is_one_rule_at_any_lengths_as_in_torch() -> None:
    leaves = draw("plain")
    torch.testing.assert_close(sdpa(*leaves, causal_upper_left(9, 9)), theirs(*leaves, is_causal=True))


def test_other_causal_biases_are_refused() -> None:
    query, key, value = draw("plain")
    with pytest.raises(ArgumentError, match="is_causal is True beside"):
        sdpa(query, key, value, causal_upper_left(5, 7), is_causal=True)
    with pytest.raises(ArgumentError, match="attn_mask is a CausalBias of 7 queries and 7 keys; allowed: as many as the call has"):
        sdpa(query, key, value, causal_lower_right(7, 7))
    with pytest.raises(ArgumentError, match="attn_mask is what an operator made of a CausalBias"):
        sdpa(query, key, value, causal_lower_right(5, 7)[0])
    with pytest.raises(ArgumentError, match=r"^attention: mask is a CausalBias, which holds no numbers"):
        triton_attn.attention(query, key, value, mask=causal_upper_left(5, 7))
    x = torch.randn(2, 5, 16)
    with pytest.raises(ArgumentError, match=r"^MultiheadAttention: attn_mask is a CausalBias, which holds no numbers"):
        MultiheadAttention(16, 1)(x, x, x, attn_mask=causal_upper_left(2, 2))


# numbers


NUMBERS = [np.float32(0.5), np.float64(0.5), np.int64(1), True, torch.tensor(0.5), torch.tensor(1), nn.Parameter(torch.tensor(0.5), False)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: f"{type(x).__name__} {float(x)}")
def test_numbers_are_what_torch_takes_for_some(number: Any) -> None:
    leaves = draw("plain")
    for given in (None, torch.ones(5, 7).tril().bool()):
        torch.testing.assert_close(sdpa(*leaves, given, scale=number), theirs(*leaves, given, scale=number))
        torch.manual_seed(1)
        dropped = sdpa(*leaves, given, number)
        torch.manual_seed(1)
        assert torch.equal(dropped, sdpa(*leaves, given, float(number)))


@pytest.mark.parametrize(
    "number", [torch.tensor([0.5]), torch.tensor(0.5, requires_grad=True), torch.tensor(1j), np.array([0.5])], ids=repr
)
def test_other_tensors_and_arrays_are_no_numbers(number: Any) -> None:
    leaves = draw("plain")
    for option in ("scale", "dropout_p"):
        with pytest.raises(TypeError, match=f"scaled_dot_product_attention: {option} is .*; allowed: "):
            sdpa(*leaves, **{option: number})


# masks of other dtypes


@HALVES
@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_a_mask_of_any_half_precision(cast: torch.dtype, mask_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for leaves in (draw("plain", dtype), draw("plain")):
        mask = torch.randn(3, 5, 7).to(mask_dtype)
        with torch.autocast("cpu", cast):
            found, expected = (f(*leaves, mask) for f in (sdpa, theirs))
        # torch casts the mask
        torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(cast).eps)


@HALVES
@pytest.mark.parametrize("need", [True, False])
def test_a_narrower_mask_of_the_module_is_widened(need: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warnings.warn", lambda *args, **kwargs: None)  # torch's, that masks of two dtypes are deprecated
    torch_s, ours = nn.MultiheadAttention(16, 2), MultiheadAttention(16, 2)
    ours.load_state_dict(torch_s.state_dict())
    x, hidden = torch.randn(5, 3, 16), torch.arange(5).expand(3, 5) > 3
    bias, padding = torch.randn(5, 5).to(dtype), torch.randn(3, 5).to(dtype)
    found, expected = (module(x, x, x, attn_mask=bias, key_padding_mask=hidden, need_weights=need) for module in (ours, torch_s))
    torch.testing.assert_close(found, expected)
    found, expected = (ours(x, x, x, attn_mask=a, key_padding_mask=b) for a, b in ((bias, padding), (bias.float(), padding.float())))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (module(x, x, x, attn_mask=bias, need_weights=need) for module in (ours, torch_s))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0.05)
