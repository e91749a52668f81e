"""The public short convolution: causal_conv1d's ways of calling it, tiles of the portable path, steps, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import ArgumentError, causal_conv1d, causal_conv1d_fn, causal_conv1d_update, use_backend
from triton_attn.portable import causal_conv1d as portable

BACKENDS = pytest.mark.parametrize("backend", ["triton", "portable", "reference"])
b, d, length = 2, 4, 11


def given(taps: int = 4, steps: int = length) -> dict[str, Any]:
    return {"x": torch.randn(b, d, steps), "weight": torch.randn(d, taps), "bias": torch.randn(d)}


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1])
    return F.silu(y) if activation else y


@BACKENDS
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_torch_s_grouped_convolution(backend: str, taps: int, activation: str | None, bias: bool) -> None:
    call = given(taps) | ({} if bias else {"bias": None})
    leaves = [x.requires_grad_() for x in call.values() if x is not None]
    with use_backend(backend):
        found = causal_conv1d_fn(**call, activation=activation)
        gradients = torch.autograd.grad(found.square().sum(), leaves)
    expected = by_torch(**call, activation=activation)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), leaves), rtol=1e-4, atol=1e-5)


@BACKENDS
def test_channels_last_is_the_same_by_strides_alone(backend: str) -> None:
    call = given()
    turned = call | {"x": call["x"].mT.contiguous().mT}
    with use_backend(backend):
        found, expected = causal_conv1d(**turned), causal_conv1d(**call)
    torch.testing.assert_close(found, expected)
    if backend == "triton":
        assert torch.equal(found, expected)
        assert found.stride() == turned["x"].stride()


@BACKENDS
def test_sequences_of_a_packed_row_do_not_see_each_other(backend: str) -> None:
    call, cut = given(), 5
    numbers = (torch.arange(length) >= cut).int().expand(b, -1)
    call["x"].requires_grad_()
    with use_backend(backend):
        together = causal_conv1d(**call, activation="silu", seq_idx=numbers)
        apart = [causal_conv1d(**call | {"x": part}, activation="silu") for part in call["x"].split((cut, length - cut), 2)]
        torch.testing.assert_close(together, torch.cat(apart, 2))
        (gradient,) = torch.autograd.grad(together[..., cut:].sum(), call["x"])
    assert not gradient[..., :cut].any()


@BACKENDS
@pytest.mark.parametrize("steps", [1, 2, length])
def test_final_states_are_what_comes_next(backend: str, steps: int) -> None:
    call, before = given(steps=steps), torch.randn(b, d, 3)
    filled = torch.empty(b, d, 3)
    with use_backend(backend):
        _, final = causal_conv1d_fn(**call, initial_states=before, return_final_states=True)
        _, same = causal_conv1d_fn(**call, initial_states=before, return_final_states=True, final_states_out=filled)
    assert torch.equal(final, torch.cat((before, call["x"]), 2)[..., -3:])
    assert same is filled
    assert torch.equal(filled, final)


@BACKENDS
def test_sums_beyond_the_end_may_overflow(backend: str) -> None:
    """A step after the last would be four times the last one."""
    x = torch.zeros(1, 1, 8)
    x[..., -1] = 2e38
    x.requires_grad_()
    with use_backend(backend):
        out = causal_conv1d(x, torch.tensor([[4.0, 4.0, 4.0, 0.5]]), activation="silu")
        (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient[0, 0, -2:], torch.tensor([4.0 + 0.5 / 2, 0.5]))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_portable_tiles_join_without_a_seam(monkeypatch: pytest.MonkeyPatch, turned: bool, dtype: torch.dtype, activation: str) -> None:
    monkeypatch.setattr(portable, "SMALL", 0)
    monkeypatch.setattr(portable, "TILE", 24)
    monkeypatch.setattr(portable, "NARROWEST", 4)
    call: dict[str, Any] = {name: x.double() for name, x in given(steps=23).items()}
    x = call["x"].to(dtype)
    x = x.mT.contiguous().mT if turned else x
    small: dict[str, Any] = {"x": x.requires_grad_(), **{name: call[name].float().requires_grad_() for name in ("weight", "bias")}}
    exact: dict[str, Any] = {name: leaf.detach().double().requires_grad_() for name, leaf in small.items()}
    found, expected = causal_conv1d(**small, activation=activation), by_torch(**exact, activation=activation)
    near = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=near, atol=near)
    weights = torch.randn(b, d, 23, dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights.to(dtype)).sum(), tuple(small.values()))
    truth = torch.autograd.grad((expected * weights.to(dtype).double()).sum(), tuple(exact.values()))
    torch.testing.assert_close([x.double() for x in gradients], list(truth), rtol=4 * near, atol=16 * near)


@pytest.mark.parametrize("small", [0, 2**19])
def test_the_portable_path_differentiates_twice(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(portable, "SMALL", small)
    call = {name: x.double().requires_grad_() for name, x in given(steps=6).items()}
    assert torch.autograd.gradgradcheck(lambda x, weight, bias: causal_conv1d(x, weight, bias, "silu"), tuple(call.values()))


@BACKENDS
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("ring", [False, True])
def test_updates_are_the_convolution(backend: str, size: int, ring: bool) -> None:
    call, state = given(), torch.zeros(b, d, size)
    rest: dict[str, Any] = {"weight": call["weight"], "bias": call["bias"], "activation": "silu"}
    where, outs, done = state.data_ptr(), [], 0
    with use_backend(backend):
        for part in call["x"].split((1, 1, 1, 2, 6), 2):
            before = torch.full((b,), done, dtype=torch.int32) if ring else None
            x = part[..., 0] if part.shape[2] == 1 else part
            outs.append(causal_conv1d_update(x, state, **rest, cache_seqlens=before).view(part.shape))
            done += part.shape[2]
        expected = causal_conv1d(**call, activation="silu")
    torch.testing.assert_close(torch.cat(outs, 2), expected)
    assert state.data_ptr() == where
    kept = call["x"][..., -size:]
    assert torch.equal(state, kept.roll(length % size, 2) if ring else kept)


def test_updates_choose_rows_and_have_gradients() -> None:
    call, states = given(steps=1), torch.randn(5, d, 3)
    before = states.clone()
    x = call.pop("x")[..., 0].requires_grad_()
    out = causal_conv1d_update(x, states, **call, conv_state_indices=torch.tensor([4, 0]))
    expected = causal_conv1d(x[..., None], **call, initial_states=before[[4, 0]])[..., 0]
    torch.testing.assert_close(out, expected)
    assert torch.equal(states[1:4], before[1:4])
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, call["weight"][:, -1].expand(b, -1))


@pytest.mark.parametrize("function", [causal_conv1d, causal_conv1d_fn])
def test_it_compiles_whole(function: Callable[..., Any]) -> None:
    call = given()
    found = torch.compile(function, fullgraph=True, backend="eager")(**call, activation="silu")
    torch.testing.assert_close(found, by_torch(**call, activation="silu"))


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "one tap": (lambda: {"weight": torch.zeros(d, 1)}, "weight", "2 to 4"),
    "five taps": (lambda: {"weight": torch.zeros(d, 5)}, "weight", "2 to 4"),
    "a weight of torch's shape": (lambda: {"weight": torch.zeros(d, 1, 4)}, "weight", "'d k'"),
    "another activation": (lambda: {"activation": "gelu"}, "activation", "'silu', 'swish'"),
    "a state too long": (lambda: {"initial_states": torch.zeros(b, d, 4)}, "initial_states", "3 steps"),
    "a state and numbers": (
        lambda: {"initial_states": torch.zeros(b, d, 3), "seq_idx": torch.zeros(b, length, dtype=torch.int32)},
        "initial_states",
        "one of the two",
    ),
    "numbers that are none": (lambda: {"seq_idx": torch.zeros(b, length)}, "seq_idx", "torch.int32"),
    "a final state for nobody": (lambda: {"final_states_out": torch.zeros(b, d, 3)}, "final_states_out", "return_final_states"),
}


@pytest.mark.parametrize(("changed", "argument", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_is_refused_by_name(changed: Callable[[], dict[str, Any]], argument: str, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        causal_conv1d_fn(**{**given(), **changed()})
    assert caught.value.argument == argument
    assert said in str(caught.value)


WRONG_UPDATES: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "x of one axis": (lambda: {"x": torch.zeros(d)}, "x", "(B, D)"),
    "a state of another batch": (lambda: {"conv_state": torch.zeros(1, d, 3)}, "conv_state", "(2, 4"),
    "a state too short": (lambda: {"conv_state": torch.zeros(b, d, 2)}, "weight", "conv_state's 2"),
    "a narrow state": (lambda: {"conv_state": torch.zeros(b, d, 3).half()}, "conv_state", "torch.float32"),
    "an index beyond": (lambda: {"conv_state_indices": torch.tensor([0, 2])}, "conv_state_indices", "0 to 1"),
    "one length for all": (lambda: {"cache_seqlens": torch.tensor(3)}, "cache_seqlens", "(2,)"),
}


@pytest.mark.parametrize(("changed", "argument", "said"), WRONG_UPDATES.values(), ids=WRONG_UPDATES.keys())
def test_a_wrong_update_is_refused_by_name(changed: Callable[[], dict[str, Any]], argument: str, said: str) -> None:
    call = {**given(steps=1), "conv_state": torch.zeros(b, d, 3)}
    with pytest.raises(ArgumentError) as caught:
        causal_conv1d_update(**{**call, "x": call["x"][..., 0], **changed()})
    assert caught.value.argument == argument
    assert said in str(caught.value)
