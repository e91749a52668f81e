"""One step at a time: what the scan gives, mamba_ssm's shapes, states chosen by index, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import ArgumentError, selective_scan, selective_state_update, use_backend

BACKENDS = pytest.mark.parametrize("backend", ["triton", "portable", "reference"])
b, d, length, n = 2, 4, 5, 3


def given(groups: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A call of the scan."""
    return {
        "u": torch.randn(b, d, length).to(dtype),
        "delta": torch.randn(b, d, length).to(dtype),
        "A": -torch.rand(d, n) - 0.1,
        "B": torch.randn(b, groups, n, length).to(dtype),
        "C": torch.randn(b, groups, n, length).to(dtype),
        "D": torch.randn(d),
        "z": torch.randn(b, d, length).to(dtype),
        "delta_bias": torch.randn(d),
        "delta_softplus": True,
    }


def at(call: dict[str, Any], t: int) -> dict[str, Any]:
    """Its t-th step as an update's arguments, by position in mamba_ssm's order."""
    now = {name: call[name][..., t] for name in ("u", "delta", "B", "C", "z")}
    return {
        "x": now["u"],
        "dt": now["delta"],
        "A": call["A"],
        "B": now["B"],
        "C": now["C"],
        "D": call["D"],
        "z": now["z"],
        "dt_bias": call["delta_bias"],
        "dt_softplus": True,
    }


@BACKENDS
@pytest.mark.parametrize("groups", [1, 2])
def test_steps_are_the_scan(backend: str, groups: int) -> None:
    call = given(groups)
    state = torch.zeros(b, d, n)
    where = state.data_ptr()
    with use_backend(backend), torch.no_grad():
        outs = [selective_state_update(state, *at(call, t).values()) for t in range(length)]
        expected, last = selective_scan(**call, return_last_state=True)
    torch.testing.assert_close(torch.stack(outs, 2), expected)
    torch.testing.assert_close(state, last)
    assert state.data_ptr() == where


@BACKENDS
def test_gradients_run_through_steps_as_through_the_scan(backend: str) -> None:
    call = given()
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    leaves = [call[name].requires_grad_() for name in names]
    with use_backend(backend):
        state = torch.zeros(b, d, n)
        outs = torch.stack([selective_state_update(state, **at(call, t)) for t in range(length)], 2)
        found = torch.autograd.grad(outs.square().sum() + state.sum(), leaves)
        out, last = selective_scan(**call, return_last_state=True)
        expected = torch.autograd.grad(out.square().sum() + last.sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_heads_are_channels_that_share_a_group() -> None:
    heads, width = 4, 3
    x, dt, z = torch.randn(3, b, heads, width)
    A, D, bias = -torch.rand(heads, width, n), torch.randn(heads, width), torch.randn(heads, width)
    B, C = torch.randn(2, b, 2, n)
    state = torch.randn(b, heads, width, n)
    size = F.softplus(dt + bias)
    wide_b, wide_c = (each.repeat_interleave(2, 1)[:, :, None] for each in (B, C))
    after = (size[..., None] * A).exp() * state + (size * x)[..., None] * wide_b
    expected = ((after * wide_c).sum(-1) + D * x) * F.silu(z)
    torch.testing.assert_close(selective_state_update(state, x, dt, A, B, C, D, z, bias, True), expected)
    torch.testing.assert_close(state, after)


def test_indices_choose_the_rows_of_a_larger_state() -> None:
    call, states, chosen = at(given(), 0), torch.randn(5, d, n), torch.tensor([3, 1], dtype=torch.int32)
    before, part = states.clone(), states[chosen.long()].clone()
    out = selective_state_update(states, **call, state_batch_indices=chosen)
    torch.testing.assert_close(out, selective_state_update(part, **call))
    torch.testing.assert_close(states[[3, 1]], part)
    assert torch.equal(states[[0, 2, 4]], before[[0, 2, 4]])


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_states_of_16_bit_calls_are_held_in_either_dtype(held: torch.dtype) -> None:
    call = at(given(dtype=torch.bfloat16), 0)
    state = torch.randn(b, d, n).to(held)
    wide = state.double()
    out = selective_state_update(state, **call)
    exact: dict[str, Any] = {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}
    assert (out.dtype, state.dtype) == (torch.bfloat16, held)
    torch.testing.assert_close(out.double(), selective_state_update(wide, **exact), rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(state.double(), wide, rtol=2**-7, atol=2**-7)


def test_one_step_compiles_whole() -> None:
    call, state = at(given(), 0), torch.randn(b, d, n)
    expected_state = state.clone()
    expected = selective_state_update(expected_state, **call)
    with torch.no_grad():
        found = torch.compile(selective_state_update, fullgraph=True, backend="eager")(state, **call)
    torch.testing.assert_close((found, state), (expected, expected_state))


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "a state of two axes": (lambda: {"state": torch.zeros(b, n)}, "state", "(B, D, N)"),
    "x with a time": (lambda: {"x": torch.zeros(b, d, 1)}, "x", "(2, 4)"),
    "dt of another dtype": (lambda: {"dt": torch.zeros(b, d).double()}, "dt", "x has torch.float32"),
    "another state size": (lambda: {"A": torch.zeros(d, n + 1)}, "A", "(4, 3)"),
    "groups that do not divide": (lambda: {"B": torch.zeros(b, 3, n)}, "B", "a divisor of 4"),
    "C of another batch": (lambda: {"C": torch.zeros(1, n)}, "C", "(2, 3)"),
    "a short skip": (lambda: {"D": torch.zeros(1)}, "D", "(4,)"),
    "a narrow state": (lambda: {"state": torch.zeros(b, d, n).half()}, "state", "torch.float32"),
    "an index beyond": (lambda: {"state_batch_indices": torch.tensor([0, 2])}, "state_batch_indices", "0 to 1"),
    "indices as numbers": (lambda: {"state_batch_indices": torch.zeros(2)}, "state_batch_indices", "torch.int32"),
    "no state": (lambda: {"state": None}, "state", "torch.Tensor"),
}


@pytest.mark.parametrize(("changed", "argument", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_is_refused_by_name(changed: Callable[[], dict[str, Any]], argument: str, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        selective_state_update(**{"state": torch.zeros(b, d, n), **at(given(), 0), **changed()})
    assert caught.value.argument == argument
    assert said in str(caught.value)
