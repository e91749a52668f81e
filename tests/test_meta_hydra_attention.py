"""Hydra attention with a head for each feature: lengths beyond a span, zeros, and what it is to `hydra_attention`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_attn import hydra_attention, meta_hydra_attention, use_backend

pytestmark = pytest.mark.usefixtures("strict")
BACKENDS = pytest.mark.parametrize("backend", ["triton", "portable", "reference"])


def drawn(n: int = 7, *, branches: int = 2, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, branches, 3, n, width), (2, 3, n, width), (2, 3, n, width))
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    return query, key, value


@BACKENDS
def test_zeros_stay_zeros_and_get_no_gradient(backend: str) -> None:
    query, key, value = drawn()
    with torch.no_grad():
        query[:, 0, :, 2] = 0.0
        key[:, :, 4] = 0.0
    with use_backend(backend):
        out = meta_hydra_attention(query, key, value, causal=True)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert not out[:, 0, :, 2].any()
    assert not grads[0][:, 0, :, 2].any()
    assert not grads[1][:, :, 4].any()
    assert not grads[2][:, :, 4].any()
    assert all(x.isfinite().all() for x in grads)


@BACKENDS
def test_what_is_hidden_may_be_nan_and_gets_no_gradient(backend: str) -> None:
    query, key, value = drawn()
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[0, 5:] = hidden[1, 0] = True
    nan = hidden[:, None, :, None].expand(key.shape)
    key, value = (x.detach().masked_fill(nan, math.nan).requires_grad_() for x in (key, value))
    with use_backend(backend):
        out, state = meta_hydra_attention(query, key, value, causal=True, key_padding_mask=hidden, return_state=True)
    grads = torch.autograd.grad(out.sum() + state.sum(), (key, value))
    assert out.isfinite().all()
    assert all(torch.equal(x == 0, nan) for x in grads)


@BACKENDS
def test_the_state_is_what_a_last_query_sees(backend: str) -> None:
    query, key, value = drawn(9)
    with use_backend(backend):
        out, state = meta_hydra_attention(query, key, value, causal=True, return_state=True)
    last = query[..., -1, :]
    torch.testing.assert_close(out[..., -1, :], last / last.norm(dim=-1, keepdim=True) * state[:, None])


def test_all_keys_are_summed_over_several_spans() -> None:
    query, key, value = torch.randn(1, 2, 1, 530, 4), *torch.randn(2, 1, 1, 1050, 4).unbind()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    found = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            out, state = meta_hydra_attention(*leaves, return_state=True)
        found.append((out, state, *torch.autograd.grad(out.sum() + state.sum(), leaves)))
    # a thousand terms in another order, of which some cancel
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_it_is_a_variant_of_hydra_attention() -> None:
    query, key, value = drawn()
    mask = torch.rand(2, 7) < 0.3
    cases: tuple[dict[str, Any], ...] = ({}, {"causal": True}, {"key_padding_mask": mask, "return_state": True})
    for options in cases:
        found = hydra_attention(query, key, value, variant="meta", **options)
        expected = meta_hydra_attention(query, key, value, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_float16_sum_of_65536_ones_is_finite_and_right() -> None:
    ones = torch.ones(1, 1, 65536, 1, dtype=torch.float16)
    out = meta_hydra_attention(ones[:, None], ones, ones / 2, causal=True)
    assert torch.equal(out[0, 0, 0, :, 0].float(), (torch.arange(1, 65537) / 2).half().float())


def test_one_query_may_be_mapped_over_many_keys() -> None:
    query, key, value = (x.detach() for x in drawn())
    keys = torch.stack((key, 2.0 * value))
    with use_backend("portable"):
        found = torch.func.vmap(meta_hydra_attention, in_dims=(None, 0, None))(query, keys, value)
        expected = torch.stack([meta_hydra_attention(query, one, value) for one in keys])
    torch.testing.assert_close(found, expected)
