"""The tolerance policy catches faults, passes right results, and needs all of its tiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_attn import CATALOG, verify
from triton_attn.mechanism import Case
from triton_attn.testing import numerics

ROW = CATALOG["attention"]
CASE = Case("causal", {"b": 2, "h": 2, "g": 2, "m": 64, "n": 64, "d": 32, "e": 32}, {"causal": True})
CPU = torch.device("cpu")


def faulty(change: Callable[[Tensor], Tensor], **instead: Any) -> verify.Run:
    """The portable path with a fault in its output or its arguments."""
    run = verify.differentiable_run(ROW, ROW.portable)

    def wrong(tensors: Any, options: Any, grads: Any) -> Any:
        outputs, gradients = run(tensors, {**options, **instead}, grads)
        return (change(outputs[0].detach().clone()), *outputs[1:]), gradients

    return wrong


def one_element(out: Tensor) -> Tensor:
    out[0, 1, 40, 3] += 0.05
    return out


def last_row(out: Tensor) -> Tensor:
    out[:, :, -1] = 0
    return out


def same(out: Tensor) -> Tensor:
    return out


FAULTS = {
    "scale 1 % off": faulty(same, scale=1.01 * 32**-0.5),
    "scale 0.2 % off": faulty(same, scale=1.002 * 32**-0.5),
    "one element off by 0.05": faulty(one_element),
    "last row zero": faulty(last_row),
    "not causal": faulty(same, causal=False),
    "output rounded to eight bits": faulty(lambda out: out.to(torch.float8_e4m3fn).to(out.dtype)),
    "one NaN": faulty(lambda out: out.masked_fill(out == out.max(), torch.nan)),
    "wrong shape": faulty(lambda out: out[..., :-1]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_fault_is_caught(fault: str, dtype: torch.dtype) -> None:
    comparisons = verify.judge(ROW, CASE, FAULTS[fault], dtype=dtype, where=CPU)
    assert any(c.fault for c in comparisons)
    with pytest.raises(AssertionError, match="out"):
        numerics.assert_right(comparisons)


@pytest.mark.parametrize("dtype", numerics.ROUNDOFF, ids=str)
def test_a_right_result_passes(dtype: torch.dtype) -> None:
    comparisons = verify.judge(ROW, CASE, faulty(same), dtype=dtype, where=CPU, borrowed=True)
    numerics.assert_right(comparisons)
    assert 0 < max(c.ratio for c in comparisons) <= 1


def test_each_tier_alone_misses_a_fault_that_the_other_catches() -> None:
    precise = verify.judge(ROW, CASE, FAULTS["one element off by 0.05"], dtype=torch.float16, where=CPU)[0]
    blurred = verify.judge(ROW, CASE, FAULTS["scale 0.2 % off"], dtype=torch.float16, where=CPU)[0]
    assert precise.ratio > 1
    assert blurred.ratio < 1 < blurred.rms


def test_infinities_must_stand_where_the_truth_has_them() -> None:
    truth = torch.tensor([0.0, -torch.inf, torch.nan])
    size = torch.ones(3)
    assert not numerics.compare("lse", truth, truth.double(), size, dtype=torch.float32).fault
    for wrong in ([0.0, torch.inf, torch.nan], [0.0, -torch.inf, 1.0], [torch.nan, -torch.inf, torch.nan]):
        assert numerics.compare("lse", torch.tensor(wrong), truth.double(), size, dtype=torch.float32).fault


def test_the_message_shows_element_ratio_and_truth() -> None:
    found = torch.zeros(4)
    found[2] = 1.0
    comparison = numerics.compare("out", found, torch.zeros(4), torch.ones(4), dtype=torch.float32)
    with pytest.raises(AssertionError, match=r"out\[2\] is 1, the truth 0: 4194304.00 times its bound"):
        numerics.assert_right([comparison], "context")


def test_the_bound_is_no_smaller_than_what_it_bounds() -> None:
    """S of an output is at least the output's own magnitude: a relative error of u is always allowed."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn(1, 2, 9, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = ROW.reference(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad)
    sizes = ROW.bound(query.detach(), key.detach(), value.detach(), grad)
    assert (sizes["out"] >= out.abs()).all()
    for name, gradient in zip(ROW.differentiable, gradients, strict=True):
        assert (sizes[name] >= gradient.abs()).all()


@pytest.mark.parametrize(("found", "truth"), [(torch.inf, 7e4), (65504.0, 65510.0), (torch.inf, 65510.0)])
def test_what_the_dtype_cannot_hold_is_infinite(found: float, truth: float) -> None:
    assert not judged_in_half(found, truth)


@pytest.mark.parametrize(("found", "truth"), [(torch.inf, 6e4), (-torch.inf, 7e4), (torch.nan, 7e4), (6e4, 7e4), (torch.inf, -7e4)])
def test_an_infinity_elsewhere_is_a_fault(found: float, truth: float) -> None:
    assert judged_in_half(found, truth)


def judged_in_half(found: float, truth: float) -> str:
    one = torch.tensor([truth], dtype=torch.float64)
    return numerics.compare("out", torch.tensor([found], dtype=torch.float16), one, one.abs(), dtype=torch.float16).fault


@pytest.mark.parametrize("size", [torch.nan, -1.0, torch.inf])
def test_a_bound_that_bounds_nothing_is_a_fault(size: float) -> None:
    sizes = torch.ones(8, dtype=torch.float64)
    sizes[3] = size
    wrong = torch.zeros(8, dtype=torch.float64)
    assert "out[3] has no bound" in numerics.compare("out", wrong.float(), wrong, sizes, dtype=torch.float32).fault


@pytest.mark.parametrize(
    ("found", "truth", "said"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), ""),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), r"out[1] is 2, the truth 3"),
        (torch.tensor([True]), torch.tensor([False]), r"out[0] is True, the truth False"),
        (torch.tensor([1]), torch.tensor([1.0]), "out is of torch.int64, the truth of torch.float32"),
    ],
)
def test_integers_and_truth_values_are_exact(found: torch.Tensor, truth: torch.Tensor, said: str) -> None:
    assert numerics.compare("out", found, truth, truth, dtype=torch.float32).fault == said
