"""The public selective scan: mamba_ssm's ways of calling it, layouts, refusals, and the faults that scans elsewhere have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import triton_attn
from triton_attn import CATALOG, ArgumentError, selective_scan, selective_scan_fn, use_backend
from triton_attn.portable import _scan_tiles
from triton_attn.testing import strict_interpreter

BACKENDS = pytest.mark.parametrize("backend", ["triton", "portable", "reference"])
b, d, length, n = 2, 4, 9, 3


def given(groups: int = 0, **how: Any) -> dict[str, Any]:
    shape = (b, groups, n, length) if groups else (b, n, length)
    return {
        "u": torch.randn(b, d, length, **how),
        "delta": torch.randn(b, d, length, **how),
        "A": -torch.rand(d, n) - 0.1,
        "B": torch.randn(shape, **how),
        "C": torch.randn(shape, **how),
        "D": torch.randn(d),
        "z": torch.randn(b, d, length, **how),
        "delta_bias": torch.randn(d),
        "delta_softplus": True,
    }


def by_einsum(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The recurrence with every step's decay and input made beforehand, as mamba_ssm's reference has it; derived anew."""
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}
    u, z = wide["u"], wide.get("z")
    size = wide["delta"] + (wide["delta_bias"][:, None] if wide.get("delta_bias") is not None else 0.0)
    size = F.softplus(size) if wide.get("delta_softplus") else size
    steps = []
    for x in (wide["B"], wide["C"]):
        if x.ndim == 2:
            steps.append(x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2]))
        else:
            grouped = x[:, None] if x.ndim == 3 else x
            steps.append(grouped.repeat_interleave(u.shape[1] // grouped.shape[1], 1))
    decay = torch.exp(torch.einsum("bdl,dn->bdnl", size, wide["A"]))
    added = torch.einsum("bdl,bdnl,bdl->bdnl", size, steps[0], u)
    state, rows = torch.zeros_like(decay[..., 0]), []
    for t in range(u.shape[2]):
        state = decay[..., t] * state + added[..., t]
        rows.append(torch.einsum("bdn,bdn->bd", state, steps[1][..., t]))
    y = torch.stack(rows, 2)
    y = y if wide.get("D") is None else y + wide["D"][:, None] * u
    return y if z is None else y * F.silu(z), state


# what mamba_ssm's own tests vary
GRID: list[dict[str, Any]] = [
    {},
    {"z": None},
    {"D": None},
    {"delta_bias": None},
    {"delta_bias": None, "delta_softplus": False, "delta": torch.rand(b, d, length)},
    {"D": None, "z": None, "delta_bias": None},
    {"B": torch.randn(d, n)},
    {"C": torch.randn(d, n)},
    {"B": torch.randn(d, n), "C": torch.randn(d, n)},
]


@BACKENDS
@pytest.mark.parametrize("changed", GRID, ids=lambda changed: " ".join(changed) or "everything")
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_the_scan_is_the_recurrence(backend: str, changed: dict[str, Any], groups: int) -> None:
    call = {**given(groups), **changed}
    with use_backend(backend):
        found, last = selective_scan_fn(**call, return_last_state=True)
    expected, state = by_einsum(call)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.double(), state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [0, 2])
def test_portable_tiles_join_without_a_seam(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    monkeypatch.setattr(_scan_tiles, "TILE", 0)
    monkeypatch.setattr(_scan_tiles, "SHORTEST", 4)
    call: dict[str, Any] = {name: x.double().requires_grad_() if isinstance(x, Tensor) else x for name, x in given(groups).items()}
    with use_backend("portable"):
        found, expected = selective_scan_fn(**call, return_last_state=True), by_einsum(call)
    assert _scan_tiles.steps_of(length, n, d) == 4 < length
    by_what = [x for x in call.values() if isinstance(x, Tensor)]
    downwards = [torch.randn_like(x) for x in expected]
    gradients, truth = (torch.autograd.grad(outputs, by_what, downwards) for outputs in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, truth, rtol=1e-9, atol=1e-9)


@BACKENDS
def test_positions_are_those_of_mamba_ssm(backend: str) -> None:
    call = given()
    with use_backend(backend):
        assert torch.equal(selective_scan_fn(*call.values()), selective_scan(**call))


@BACKENDS
@pytest.mark.parametrize("groups", [0, 2])
def test_channels_last_is_the_same_by_strides_alone(backend: str, groups: int) -> None:
    call = given(groups)
    turned: dict[str, Any] = {
        name: x.movedim(-1, 1).contiguous() if name in ("u", "delta", "z", "B", "C") else x for name, x in call.items()
    }
    with use_backend(backend):
        found, last = selective_scan(**turned, layout="bld", return_last_state=True)
        expected, state = selective_scan(**call, return_last_state=True)
    assert found.shape == (b, length, d)
    exact: dict[str, Any] = {"rtol": 0.0, "atol": 0.0} if backend == "triton" else {}
    torch.testing.assert_close((found, last), (expected.transpose(1, 2), state), **exact)
    if backend == "triton":
        assert found.is_contiguous()


@BACKENDS
def test_what_is_the_same_at_every_step_has_its_own_gradient(backend: str) -> None:
    call = given() | {"B": torch.randn(d, n, requires_grad=True), "C": torch.randn(d, n, requires_grad=True)}
    with use_backend(backend):
        found = torch.autograd.grad(selective_scan(**call).sum(), (call["B"], call["C"]))
    expected = torch.autograd.grad(by_einsum(call)[0].sum(), (call["B"], call["C"]))
    torch.testing.assert_close(found, tuple(x.float() for x in expected), rtol=1e-4, atol=1e-4)


@BACKENDS
def test_padding_has_a_step_of_zero_after_bias_and_softplus(backend: str) -> None:
    """Zeros in place of delta do not: softplus(bias) decays the state. The gradients of what comes before show it too."""
    call = given()
    longer: dict[str, Any] = {name: F.pad(x, (0, 5)) if name in ("u", "delta", "z", "B", "C") else x for name, x in call.items()}
    mask = torch.arange(length + 5).expand(b, -1) < length
    leaves = [call["u"].requires_grad_(), call["A"].requires_grad_()]
    with use_backend(backend):
        _, last = selective_scan(**call, return_last_state=True)
        longer["u"] = F.pad(call["u"], (0, 5))
        _, padded = selective_scan(**longer, mask=mask, return_last_state=True)
        _, trapped = selective_scan(**longer, return_last_state=True)
        torch.testing.assert_close(padded, last)
        assert not torch.allclose(trapped, last, rtol=1e-2)
        torch.testing.assert_close(torch.autograd.grad(padded.sum(), leaves), torch.autograd.grad(last.sum(), leaves))


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_long_sequences_stay_finite(backend: str) -> None:
    """A source's layer has exp(+n Delta) and is NaN after 64 steps."""
    steps = 65536 if backend == "portable" else 512
    u, delta = torch.randn(1, 2, steps), torch.randn(1, 2, steps)
    B, C = torch.randn(2, 1, 2, steps)
    with use_backend(backend):
        out, last = selective_scan(u, delta, -torch.tensor([[1.0, 1e4]] * 2), B, C, delta_softplus=True, return_last_state=True)
    assert out.isfinite().all()
    assert last.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("name", ["delta", "B", "C"])
def test_one_step_of_any_input_changes_that_step(backend: str, name: str) -> None:
    """A source's delta, B and C are constants: nothing is selected."""
    call = given()
    with use_backend(backend):
        before = selective_scan(**call)
        call[name] = call[name].clone()
        call[name][..., 4] += 1.0
        after = selective_scan(**call)
    assert torch.equal(before[..., :4], after[..., :4])
    assert not torch.allclose(before[..., 4], after[..., 4])


def test_parameters_stay_in_float32_under_autocast() -> None:
    call = given()
    with torch.autocast("cpu", torch.bfloat16):
        out, last = selective_scan(**call, return_last_state=True)
    by_hand: dict[str, Any] = {name: x.bfloat16() if name in ("u", "delta", "z", "B", "C") else x for name, x in call.items()}
    assert out.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert torch.equal(out, selective_scan(**by_hand))


def states(count: int) -> dict[str, Any]:
    return {"A": torch.zeros(d, count), "B": torch.zeros(b, count, length), "C": torch.zeros(b, count, length)}


def grouped(count: int) -> dict[str, Any]:
    return {name: torch.zeros(b, count, n, length) for name in ("B", "C")}


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "a complex A": (lambda: {"A": -torch.rand(d, n).to(torch.complex64)}, "A", "complex64"),
    "A of another half": (lambda: {"A": -torch.rand(d, n).bfloat16()}, "A", "torch.bfloat16; allowed: torch.float32"),
    "no states": (lambda: states(0), "A", "1 to 256"),
    "too many states": (lambda: states(257), "A", "state size 257; allowed: 1 to 256"),
    "groups that do not divide": (lambda: grouped(3), "B", "3 groups"),
    "C of other groups": (lambda: {"C": torch.zeros(b, 2, n, length)}, "C", "g = 1"),
    "a short delta": (lambda: {"delta": torch.zeros(b, d, length - 1)}, "delta", "l = 9"),
    "a numeric mask": (lambda: {"mask": torch.ones(b, length)}, "mask", "torch.bool"),
    "a mask of another length": (lambda: {"mask": torch.ones(b, 3, dtype=torch.bool)}, "mask", "(2, 9)"),
    "packed in a batch": (lambda: {"cu_seqlens": torch.tensor([0, length])}, "cu_seqlens", "batch of 2"),
    "a layout of another order": (lambda: {"layout": "dbl"}, "layout", "'bdl', 'bld'"),
    "an initial state of another batch": (lambda: {"initial_state": torch.zeros(1, d, n)}, "initial_state", "q = 2"),
    "softplus by a word": (lambda: {"delta_softplus": "yes"}, "delta_softplus", "True, False"),
}


@pytest.mark.parametrize(("changed", "argument", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_is_refused_by_name(changed: Callable[[], dict[str, Any]], argument: str, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        selective_scan(**{**given(), **changed()})
    assert caught.value.argument == argument
    assert said in str(caught.value)


@pytest.mark.parametrize("ends", [[1, length], [0, length - 1], [0, 5, 3, length], [0, length + 1]])
def test_offsets_that_do_not_rise_from_first_to_last_are_refused(ends: list[int]) -> None:
    call: dict[str, Any] = {
        name: x[:1] if isinstance(x, Tensor) and name in ("u", "delta", "z", "B", "C") else x for name, x in given().items()
    }
    with pytest.raises(ArgumentError, match=f"cu_seqlens is .*allowed: from 0 to {length}"):
        selective_scan(**call, cu_seqlens=torch.tensor(ends))


def test_offsets_of_any_value_touch_nothing_beyond_the_tensors() -> None:
    """A kernel reads them on the device, after whatever check was made."""
    code = CATALOG["selective_scan"].kernels[0].load()
    call = {name: x for name, x in given(1).items() if name != "delta_softplus"}
    tensors = {
        **{name: x[:1] if name in ("u", "delta", "z", "B", "C") else x for name, x in call.items()},
        "initial_state": None,
        "mask": None,
    }
    ends = torch.tensor([-7, 40, 99, -3, -2], dtype=torch.int32)
    options = {"cu_seqlens": ends, "delta_softplus": True}
    with strict_interpreter():
        out, last = code.forward(**tensors, **options, return_last_state=True)
        code.backward(torch.ones_like(out), None, **tensors, **options, out=out, last_state=last, needs=(True,) * 9)
    with use_backend("reference"):
        expected = selective_scan(**{**tensors, "cu_seqlens": torch.tensor([0, length], dtype=torch.int32)}, delta_softplus=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_the_public_names_are_there() -> None:
    assert {"selective_scan", "selective_scan_fn"} <= set(triton_attn.__all__)
