"""What linear attention promises beside its row: steps, errors, long sequences, and faults that its ancestors have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from triton_attn import ArgumentError, linear_attention, linear_attention_step, use_backend
from triton_attn.portable import _carried, _linear
from triton_attn.testing.interpreter import Record

BACKENDS = pytest.mark.parametrize("backend", ["triton", "portable", "reference"])


def drawn(b: int = 2, h: int = 4, g: int = 2, n: int = 19, d: int = 8, e: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, h, n, d), torch.randn(b, g, n, d), torch.randn(b, g, n, e)


@BACKENDS
@pytest.mark.parametrize("feature_map", ["elu", "crelu"])
def test_steps_are_one_call(backend: str, feature_map: str) -> None:
    query, key, value = drawn()
    with use_backend(backend):
        whole, (last, normalizer) = linear_attention(query, key, value, causal=True, feature_map=feature_map, return_state=True)
        state, outs = None, []
        for t in range(query.shape[2]):
            out, state = linear_attention_step(query[:, :, t], key[:, :, t], value[:, :, t], state, feature_map=feature_map)
            outs.append(out)
    assert state is not None
    torch.testing.assert_close(torch.stack(outs, 2), whole)
    torch.testing.assert_close(state, (last, normalizer))


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_a_denominator_is_no_narrower_than_float32(backend: str, strict: Record) -> None:
    """257 is no number of bfloat16: rounded to one, it would give 2 for 255 / 128, and 256 for itself."""
    query, key = (torch.zeros(1, 1, 16, 4, dtype=torch.bfloat16) for _ in range(2))
    query[..., 0], key[0, 0, :3, 0] = 1.0, torch.tensor([128.0, 128.0, 1.0], dtype=torch.bfloat16)
    value = torch.full((1, 1, 16, 4), 255 / 128, dtype=torch.bfloat16)
    with use_backend(backend):
        out, (_, normalizer) = linear_attention(query, key, value, feature_map="identity", causal=True, return_state=True)
    assert torch.equal(out, value)
    assert normalizer[0, 0, 0] == 257


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_one_give_exactly_one_within_a_tile(dtype: torch.dtype, strict: Record) -> None:
    query, key, value = (x.to(dtype) for x in drawn(n=16))
    with use_backend("triton"):
        out = linear_attention(query, key, torch.ones_like(value), causal=True, eps=0.0)
    assert (out == 1).all()


@BACKENDS
@pytest.mark.parametrize("feature_map", ["relu", "crelu"])
def test_the_slope_at_zero_is_zero(backend: str, feature_map: str) -> None:
    query, key, value = drawn()
    query[..., :3] = 0.0
    key[..., 3:] = 0.0  # elsewhere, lest those be multiplied by 0
    with use_backend(backend):
        out = linear_attention(query.requires_grad_(), key.requires_grad_(), value, feature_map=feature_map, normalize=False)
        asked, told = torch.autograd.grad(out.sum(), (query, key))
    assert not asked[..., :3].any()
    assert not told[..., 3:].any()


@BACKENDS
def test_tokens_are_mixed_not_heads(backend: str) -> None:
    query, key, value = drawn(b=1, h=2, g=2)
    value.requires_grad_()
    with use_backend(backend):
        out = linear_attention(query, key, value)
    (gradient,) = torch.autograd.grad(out[0, 0, 0].sum(), value)
    assert gradient[0, 0].abs().min() > 0
    assert not gradient[0, 1].any()


@BACKENDS
def test_masked_keys_are_absent_from_numerator_and_denominator(backend: str) -> None:
    query, key, value = drawn()
    mask = torch.zeros(2, key.shape[2], dtype=torch.bool)
    mask[:, 5:] = True
    with use_backend(backend):
        masked = linear_attention(query, key, value, key_padding_mask=mask)
        short = linear_attention(query, key[:, :, :5], value[:, :, :5])
    torch.testing.assert_close(masked, short)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_pieces_and_spans_are_one_call(monkeypatch: pytest.MonkeyPatch, causal: bool, masked: bool) -> None:
    monkeypatch.setattr(_linear, "MOST", 1)
    monkeypatch.setattr(_carried, "CHUNKS", 1)
    leaves = [x.requires_grad_() for x in drawn(n=150)]
    state = torch.randn(2, 2, 8, 12, requires_grad=True), torch.rand(2, 2, 8, requires_grad=True)
    mask = torch.rand(2, 150) < 0.3 if masked else None
    found = []
    for backend in ("portable", "reference"):
        with use_backend(backend):
            options: dict[str, Any] = {"causal": causal, "key_padding_mask": mask, "initial_state": state, "return_state": True}
            out, last = linear_attention(*leaves, **options)
        found.append((out, *last, *torch.autograd.grad(out.sum() + last[0].sum(), (*leaves, *state))))
    # 150 terms in another order, over denominators that a random state can make small
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_sixty_five_thousand_ones_in_half_precision_are_one(causal: bool) -> None:
    ones = torch.ones(1, 1, 65536, 16, dtype=torch.float16)
    with use_backend("portable"):
        out, (state, normalizer) = linear_attention(ones, ones, ones, causal=causal, return_state=True)
    assert torch.equal(out, ones)
    assert torch.equal(state, torch.full_like(state, 2 * 65536.0))
    assert torch.equal(normalizer, torch.full_like(normalizer, 2 * 65536.0))


@pytest.mark.parametrize("causal", [False, True])
def test_a_kernel_goes_on_from_a_state_that_half_precision_cannot_hold(causal: bool) -> None:
    ones = torch.ones(1, 1, 40, 16, dtype=torch.float16)
    before = torch.full((1, 1, 16, 16), 2 * 65496.0), torch.full((1, 1, 16), 2 * 65496.0)
    with use_backend("triton"):
        out, (state, _) = linear_attention(ones, ones, ones, causal=causal, initial_state=before, return_state=True)
    assert torch.equal(out, ones)
    assert torch.equal(state, torch.full_like(state, 2 * 65536.0))


def test_the_kernel_that_serves_wide_states_is_none() -> None:
    from triton_attn import CATALOG

    refuses = CATALOG["linear_attention"].kernels[-1].refuses

    def wide(dtype: torch.dtype, width: int) -> dict[str, Any]:
        return dict.fromkeys(("query", "key", "value"), torch.empty(1, 1, 1, width, dtype=dtype, device="meta"))

    assert not refuses(wide(torch.bfloat16, 256), {})
    assert refuses(wide(torch.float16, 129), {})
    padded = {"key_padding_mask": torch.empty(1, 1, dtype=torch.bool, device="meta")}
    assert not refuses(wide(torch.float16, 128), {})
    assert refuses({**wide(torch.float16, 128), **padded}, {})
    assert not refuses({**wide(torch.float16, 64), **padded}, {})
    assert not refuses({**wide(torch.bfloat16, 128), **padded}, {})
    assert refuses(wide(torch.float32, 65), {})
    assert not refuses(wide(torch.float32, 64), {})
    assert refuses(wide(torch.float32, 64), {"feature_map": "crelu"})


@pytest.mark.parametrize("causal", [False, True])
def test_a_normaliser_alone_may_be_mapped(causal: bool) -> None:
    query, key, value = drawn()
    state, normalizers = torch.randn(2, 2, 8, 12), torch.rand(3, 2, 2, 8)

    def call(normalizer: Tensor) -> Any:
        return linear_attention(query, key, value, causal=causal, initial_state=(state, normalizer))

    torch.testing.assert_close(torch.func.vmap(call)(normalizers), torch.stack([call(normalizer) for normalizer in normalizers]))


@BACKENDS
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_what_has_no_score_is_0_over_eps(backend: str, eps: float) -> None:
    query, key, value = drawn()
    mask = torch.zeros(2, key.shape[2], dtype=torch.bool)
    mask[0] = True
    with use_backend(backend):
        out = linear_attention(query, key, value, key_padding_mask=mask, eps=eps)
    assert (out[0] == 0).all() if eps else out[0].isnan().all()
    assert out[1].isfinite().all()


def test_a_head_wider_than_a_kernel_s_is_served() -> None:
    query, key, value = drawn(d=130, e=300)
    for feature_map in ("elu", "crelu"):  # the latter has 260 features
        found = []
        for backend in ("auto", "reference"):
            with use_backend(backend):
                found.append(linear_attention(query, key, value, feature_map=feature_map, causal=True))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "feature map": ({"feature_map": "softmax"}, "feature_map", "'elu', 'relu', 'crelu', 'identity'"),
    "causal as a text": ({"causal": "top_left"}, "causal", "True, False"),
    "eps": ({"eps": -1.0}, "eps", "0 and more"),
    "a word for a flag": ({"return_state": "x"}, "return_state", "True, False"),
    "one tensor": ({"initial_state": torch.zeros(2, 2, 8, 12)}, "initial_state", "two tensors"),
    "features": ({"initial_state": (torch.zeros(2, 2, 8, 12), torch.zeros(2, 2, 8)), "feature_map": "crelu"}, "initial_state", "16"),
    "half a state": ({"initial_state": (torch.zeros(2, 2, 8, 12).half(), torch.zeros(2, 2, 8))}, "initial_state", "torch.float32"),
    "heads of a state": ({"initial_state": (torch.zeros(2, 4, 8, 12), torch.zeros(2, 4, 8))}, "initial_state", "g = 2"),
}


@pytest.mark.parametrize(("options", "argument", "said"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_argument_is_named(options: dict[str, Any], argument: str, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        linear_attention(*drawn(), **options)
    assert caught.value.argument == argument
    assert said in str(caught.value)


def test_causal_needs_as_many_keys_as_queries() -> None:
    query, key, value = drawn()
    with pytest.raises(ArgumentError, match="causal is True with 7 queries and 19 keys"):
        linear_attention(query[:, :, :7], key, value, causal=True)


def test_a_step_takes_one_token() -> None:
    query, key, value = drawn()
    with pytest.raises(ArgumentError, match=r"query has shape .* one token"):
        linear_attention_step(query, key, value)
