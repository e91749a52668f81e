"""Pooling of tokens: stages compose, what is hidden is absent, wrong arguments are named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from triton_attn import ArgumentError, pool_tokens, use_backend

pytestmark = pytest.mark.usefixtures("strict")
BACKENDS = pytest.mark.parametrize("backend", ["triton", "portable", "reference"])


@BACKENDS
def test_stages_give_the_means_of_larger_cells(backend: str) -> None:
    x, hidden = torch.randn(2, 2, 8 * 12, 5), torch.rand(2, 8 * 12) < 0.4
    with use_backend(backend):
        means, counts = pool_tokens(x, rows=8, key_padding_mask=hidden, return_count=True)
        found, counted = pool_tokens(means, rows=4, count=counts, return_count=True)
    shown = (~hidden).float().view(2, 1, 2, 4, 3, 4, 1)
    total = shown.sum((3, 5))
    truth = (x.view(2, 2, 2, 4, 3, 4, 5) * shown).sum((3, 5)) / total.clamp(min=1)
    torch.testing.assert_close(found, truth.flatten(2, 3))
    assert torch.equal(counted, total[:, 0, :, :, 0].flatten(1))


@BACKENDS
def test_what_is_hidden_may_be_nan_and_gets_no_gradient(backend: str) -> None:
    hidden = torch.zeros(1, 15, dtype=torch.bool)
    hidden[:, [0, 1, 7]] = True  # one cell whole, half of another
    count = torch.arange(15.0)[None] % 4
    absent = hidden | (count == 0)
    x = torch.randn(1, 2, 15, 4).masked_fill(absent[:, None, :, None], math.nan).requires_grad_()
    with use_backend(backend):
        out, counted = pool_tokens(x, count=count, key_padding_mask=hidden, return_count=True)
    assert not counted.requires_grad
    assert out.isfinite().all()
    assert not out[:, :, 0].any()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient == 0, absent[:, None, :, None].expand(x.shape))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"rows": 4}, "rows is 4; allowed: a divisor of the 15 tokens"),
    "no rows": ({"rows": 0}, "rows is 0"),
    "counts of another length": ({"count": torch.ones(1, 14)}, "count has shape"),
    "narrow counts": ({"count": torch.ones(1, 15).half()}, "count has dtype"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=r"^pool_tokens: ") as raised:
        pool_tokens(torch.randn(1, 2, 15, 4), **arguments)
    assert said in str(raised.value)
