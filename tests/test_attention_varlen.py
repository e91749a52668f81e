"""Packed sequences: each is what it is alone, by torch's own call and by flash-attn's definition of places and windows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from triton_attn import ArgumentError, Unsupported, attention, attention_varlen, use_backend
from triton_attn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func
from triton_attn.kernels.attention_varlen import pattern
from triton_attn.reference._packed import visible
from triton_attn.testing import inputs

BACKENDS = pytest.mark.parametrize("backend", ["triton", "portable", "reference"])
OFFSETS = [0, 5, 5, 17, 30]


def offsets(ends: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(ends, dtype=dtype)


Three = tuple[Tensor, Tensor, Tensor]


def three(tensors: Iterable[Tensor]) -> Three:
    q, k, v = tensors
    return q, k, v


def packed(m: int = 30, n: int = 30, h: int = 2, g: int = 1, **options: Any) -> Three:
    torch.manual_seed(0)
    return three(torch.randn(length, heads, 16, requires_grad=True, **options) for length, heads in ((m, h), (n, g), (n, g)))


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
def test_every_sequence_is_what_torch_gives_it_alone(backend: str, causal: bool) -> None:
    drawn, ends = packed(), offsets(OFFSETS)
    with use_backend(backend):
        out = attention_varlen(*drawn, ends, ends, causal=causal)
    alone = []
    for a, b in pairwise(OFFSETS):
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in drawn)
        alone.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1))
    expected = torch.cat(alone)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, drawn, weight), torch.autograd.grad(expected, drawn, weight), strict=True):
        torch.testing.assert_close(ours, theirs)


def by_hand(ends_q: list[int], ends_k: list[int], causal: bool, window: tuple[int, int], m: int, n: int) -> Tensor:
    """flash-attn's words: query i of a sequence sees keys i + Nk - Nq - left to i + Nk - Nq + right."""
    seen = torch.zeros(m, n, dtype=torch.bool)
    for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        for i in range(b - a):
            for j in range(d - c):
                place = i + (d - c) - (b - a)
                left = window[0] < 0 or j >= place - window[0]
                right = window[1] < 0 or j <= place + window[1]
                seen[a + i, c + j] = left and right and (not causal or j <= place)
    return seen


ENDS = st.lists(st.integers(0, 12), min_size=1, max_size=5)


@given(ENDS, st.data(), st.booleans(), st.integers(-1, 6), st.integers(-1, 6))
def test_who_sees_whom_is_flash_attns_rule(lengths: list[int], data: st.DataObject, causal: bool, left: int, right: int) -> None:
    others = data.draw(st.lists(st.integers(0, 12), min_size=len(lengths), max_size=len(lengths)))
    ends_q, ends_k = ([0, *torch.tensor(each).cumsum(0).tolist()] for each in (lengths, others))
    m, n = ends_q[-1] + data.draw(st.integers(0, 3)), ends_k[-1]
    query, key = torch.empty(m, 1, 4), torch.empty(n, 1, 4)
    seen = by_hand(ends_q, ends_k, causal, (left, right), m, n)
    assert torch.equal(visible(query, key, offsets(ends_q), offsets(ends_k), causal, (left, right)), seen)
    # the kernel has it as intervals, of keys by query and of queries by key
    numbers: Any = pattern(query, key, offsets(ends_q), offsets(ends_k), causal, (left, right)).queries[0].numbers
    begin, end, earliest, latest, count = numbers
    assert count == m
    assert all(torch.all(x[1:] >= x[:-1]) for x in (begin, end, earliest, latest))
    columns, rows = torch.arange(n), torch.arange(m)
    assert torch.equal((columns >= begin[:, None]) & (columns < end[:, None]), seen)
    by_key = (rows[:, None] >= earliest) & (rows[:, None] < latest)
    assert torch.all(by_key | ~seen)


@BACKENDS
def test_queries_without_keys_give_nothing(backend: str) -> None:
    drawn = packed(10, 6)
    with use_backend(backend):
        out, lse = attention_varlen(*drawn, offsets([0, 4, 10]), offsets([0, 0, 6]), causal=True, return_lse=True)
    assert not out[:4].any()
    assert torch.all(lse[:, :4] == -math.inf)
    assert lse[:, 4:].isfinite().all()
    gradient, *_ = torch.autograd.grad(out.sum(), drawn)
    assert not gradient[:4].any()


@pytest.mark.parametrize("ends", [[0], [0, 0], [0, 0, 0]])
@BACKENDS
def test_a_call_of_nothing_gives_nothing(backend: str, ends: list[int]) -> None:
    with use_backend(backend):
        out, lse = attention_varlen(*packed(0, 0), offsets(ends), offsets(ends), return_lse=True)
    assert (out.shape, lse.shape) == ((0, 2, 16), (2, 0))


@BACKENDS
def test_one_sequence_is_dense_attention(backend: str) -> None:
    q, k, v = packed(7, 20, 4, 2)
    with use_backend(backend):
        out = attention_varlen(q, k, v, offsets([0, 7]), offsets([0, 20]), causal=True)
        dense = attention(*three(x.transpose(0, 1)[None] for x in (q, k, v)), causal="bottom_right")
    torch.testing.assert_close(out, dense[0].transpose(0, 1))


@pytest.mark.parametrize("axis", [0, 1])
def test_strides_beyond_two_to_the_31(axis: int) -> None:
    near = three(torch.randn(5, 3, 16, dtype=torch.float16) for _ in range(3))
    far = three(inputs.laid_out(x, inputs.FAR_ALONG[axis]) for x in near)
    assert far[0].stride(axis) * (far[0].shape[axis] - 1) >= 2**31
    ends = offsets([0, 2, 5])
    with use_backend("triton"):
        assert torch.equal(attention_varlen(*far, ends, ends), attention_varlen(*near, ends, ends))


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_a_compiled_call_takes_other_offsets_without_compiling_again(backend: str) -> None:
    drawn = three(x.detach() for x in packed())
    torch._dynamo.reset()
    with use_backend(backend):
        compiled = torch.compile(lambda ends: attention_varlen(*drawn, ends, ends, causal=True), fullgraph=True, backend="aot_eager")
        compiled(offsets([0, 5, 30]))
        other = offsets([0, 17, 30])
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(other), attention_varlen(*drawn, other, other, causal=True))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "offsets that end early": ({"cu_seqlens_q": offsets([0, 5, 5, 17, 20])}, r"cu_seqlens_q is \[0, 5, 5, 17, 20\]; allowed: from 0 to 30"),
    "offsets that fall": ({"cu_seqlens_k": offsets([0, 20, 10, 30])}, "cu_seqlens_k"),
    "offsets of other sequences": ({"cu_seqlens_k": offsets([0, 10, 20, 30])}, "cu_seqlens_k"),
    "no offsets": ({"cu_seqlens_q": None}, "cu_seqlens_q is None"),
    "offsets as floats": ({"cu_seqlens_q": offsets(OFFSETS, torch.float32)}, "cu_seqlens_q"),
    "three windows": ({"window_size": (1, 2, 3)}, r"window_size is \(1, 2, 3\); allowed: \(left, right\)"),
    "a window below -1": ({"window_size": (-2, 1)}, "window_size has -2"),
    "causal as a word": ({"causal": "top_left"}, "causal is 'top_left'"),
    "a batch": ({"query": torch.zeros(1, 30, 2, 16)}, "query"),
    "heads that do not divide": ({"query": torch.zeros(30, 3, 16), "key": torch.zeros(30, 2, 16), "value": torch.zeros(30, 2, 16)}, "key"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(changed: dict[str, Any], message: str) -> None:
    query, key, value = (x.detach() for x in packed())
    right = {"query": query, "key": key, "value": value, "cu_seqlens_q": offsets(OFFSETS), "cu_seqlens_k": offsets(OFFSETS)}
    with pytest.raises((ArgumentError, TypeError), match=message):
        attention_varlen(**{**right, **changed})


# flash-attn's own names


def test_flash_attns_functions_by_position() -> None:
    q, k, v = (x.detach() for x in packed())
    ends = offsets(OFFSETS)
    out = flash_attn_varlen_func(q, k, v, ends, ends, 13, 13, 0.0, 0.3, True, (4, 0))
    assert torch.equal(out, attention_varlen(q, k, v, ends, ends, scale=0.3, causal=True, window_size=(4, 0)))
    same, lse, nothing = flash_attn_varlen_func(q, k, v, ends, ends, 13, 13, causal=True, return_attn_probs=True)
    assert (same.shape, lse.shape, nothing) == (q.shape, (2, 30), None)
    batch = three(torch.randn(2, length, 4, 16) for length in (5, 9, 9))
    out = flash_attn_func(*batch, causal=True)
    expected = attention(*three(x.transpose(1, 2) for x in batch), causal="bottom_right").transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert flash_attn_func(*batch, return_attn_probs=True)[1].shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"softcap": 30.0}, "softcap=30.0"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes"),
        ({"block_table": torch.ones(2)}, "block_table"),
    ],
)
def test_what_these_functions_do_not_compute_they_refuse_by_name(changed: dict[str, Any], message: str) -> None:
    q, k, v = packed()
    ends = offsets(OFFSETS)
    with pytest.raises(Unsupported, match=message):
        flash_attn_varlen_func(q, k, v, ends, ends, 13, 13, **changed)
    with pytest.raises(Unsupported, match="window_size"):
        flash_attn_func(*three(x[None] for x in (q, k, v)), window_size=(3, 3))
