"""Performer attention goes on from a state: chunks, single steps and shared key heads give what one call gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_attn import ArgumentError, orthogonal_projection, performer_attention, use_backend
from triton_attn.nn import PerformerAttention
from triton_attn.portable import performer_attention as portable
from triton_attn.portable._carried import CHUNK

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
B, H, G, D, E, M = 2, 4, 2, 8, 6, 20
KERNELS = pytest.mark.parametrize("kernel", ["softmax", "elu", "relu"])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])


def drawn(n: int, heads: int = G) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(n)
    query, key, value = torch.randn(B, H, n, D, **DOUBLE), torch.randn(B, heads, n, D, **DOUBLE), torch.randn(B, heads, n, E, **DOUBLE)
    return query, 2.0 * key, value, orthogonal_projection(M, D, generator=torch.Generator().manual_seed(3), **DOUBLE)


def call(given: Sequence[Tensor], projection: Tensor, **options: Any) -> Any:
    query, key, value = given
    return performer_attention(query, key, value, projection, **options)


@KERNELS
@CAUSAL
@pytest.mark.parametrize("heads", [1, 2])
def test_query_heads_share_key_heads(kernel: str, causal: bool, heads: int) -> None:
    query, key, value, projection = drawn(CHUNK + 9, heads)
    given = [x.requires_grad_() for x in (query, key, value)]
    out = call(given, projection, kernel=kernel, causal=causal)
    copied = [query, *(x.repeat_interleave(H // heads, 1) for x in (key, value))]
    expected = call(copied, projection, kernel=kernel, causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, given, grad) for x in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@KERNELS
@pytest.mark.parametrize("cuts", [(1,), (CHUNK,), (5, CHUNK + 1, 2 * CHUNK)], ids=str)
def test_chunks_are_one_call(kernel: str, cuts: tuple[int, ...]) -> None:
    *given, projection = drawn(2 * CHUNK + 11)
    mask = torch.zeros(B, given[0].shape[2], dtype=torch.bool)
    mask[0, :7] = True  # the first piece may see no key at all
    mask[1, 60:70] = True
    options: dict[str, Any] = {"kernel": kernel, "causal": True, "return_state": True}
    whole, last = call(given, projection, key_padding_mask=mask, **options)
    outs, state = [], None
    for start, end in zip((0, *cuts), (*cuts, given[0].shape[2]), strict=True):
        pieces = [x[:, :, start:end] for x in given]
        out, state = call(pieces, projection, key_padding_mask=mask[:, start:end], initial_state=state, **options)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-12)


@KERNELS
def test_a_call_that_is_not_causal_adds_to_a_state(kernel: str) -> None:
    query, key, value, projection = drawn(30)
    options: dict[str, Any] = {"kernel": kernel, "return_state": True}
    whole, last = performer_attention(query, key, value, projection, **options)
    _, state = performer_attention(query[:, :, :3], key[:, :, :12], value[:, :, :12], projection, **options)
    out, state = performer_attention(query, key[:, :, 12:], value[:, :, 12:], projection, initial_state=state, **options)
    torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-12)


def test_gradients_pass_through_a_state() -> None:
    query, key, value, projection = drawn(24)
    given = [x.requires_grad_() for x in (query, key, value)]
    options: dict[str, Any] = {"causal": True}
    whole = call(given, projection, **options)
    first, state = call([x[:, :, :10] for x in given], projection, return_state=True, **options)
    second = call([x[:, :, 10:] for x in given], projection, initial_state=state, **options)
    grad = torch.randn_like(whole)
    found = torch.autograd.grad(torch.cat((first, second), 2), given, grad)
    torch.testing.assert_close(found, torch.autograd.grad(whole, given, grad), rtol=1e-8, atol=1e-10)


@KERNELS
@pytest.mark.parametrize("prompt", [1, 9])
def test_steps_of_the_module_are_its_forward_and_their_state_does_not_grow(kernel: str, prompt: int) -> None:
    torch.manual_seed(0)
    module = PerformerAttention(24, 3, M, kernel, causal=True, **DOUBLE).eval()
    x = torch.randn(B, 33, 24, **DOUBLE)
    with torch.no_grad():
        whole = module(x)
        state: Any = None
        out, state = module.step(x[:, :prompt], state)
        outs, sizes = [out], [part.shape for part in state]
        for t in range(prompt, 33):
            kept = [part.clone() for part in state]
            out, after = module.step(x[:, t : t + 1], state)
            assert all(map(torch.equal, kept, state))
            state = after
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-10, atol=1e-12)
    assert [part.shape for part in state] == sizes


def test_a_module_that_sees_later_tokens_takes_no_step() -> None:
    with pytest.raises(ArgumentError, match="causal is False; allowed for step: True"):
        PerformerAttention(24, 3).step(torch.ones(1, 1, 24))


def test_a_compiled_call_has_finite_gradients_where_levels_are_large() -> None:
    """Its last chunk is filled up, and a power at no query may not become infinite."""
    torch.manual_seed(4)
    projection = 8 * orthogonal_projection(20, D, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    q, k, v = ((torch.randn(1, 2, CHUNK + 5, D) * 4).requires_grad_() for _ in range(3))
    found = []
    for call in (performer_attention, torch.compile(performer_attention, backend="aot_eager", fullgraph=True)):
        with use_backend("portable"):
            out = call(q, k, v, projection, causal=True)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(x.isfinite().all() for x in found[0])
    for ours, eager in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@CAUSAL
def test_heads_in_parts_are_heads_together(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, projection = drawn(CHUNK + 7)
    _, begun = call((query, key, value), projection, causal=causal, return_state=True)
    leaves = [x.requires_grad_() for x in (query, key, value, *begun[:2])]
    found = []
    for most in (portable.MOST, 1):
        monkeypatch.setattr(portable, "MOST", most)
        state = (*leaves[3:], begun[2])
        out, last = call(leaves[:3], projection, causal=causal, initial_state=state, return_state=True)
        found.append([out, *last, *torch.autograd.grad(out.square().sum() + last[0].square().sum(), leaves)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
