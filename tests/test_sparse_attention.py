"""Every rule of sparse attention against its definition as a mask, on every backend, with its gradients; and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_attn
from triton_attn import ArgumentError, sparse_attention, use_backend
from triton_attn.reference.attention import attention as dense

pytestmark = pytest.mark.usefixtures("strict")
SIZES = [(1, 1, 1, 21), (2, 2, 1, 18), (1, 1, 1, 1)]


def draw(b: int, h: int, g: int, n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(b, heads, n, 16, dtype=dtype, requires_grad=True) for heads in (h, g, g)]


def seen(n: int, rule: Callable[[int, int], bool]) -> Tensor:
    return torch.tensor([[rule(i, j) for j in range(n)] for i in range(n)]).view(1, 1, n, n)


def uniform(i: int, j: int, n: int, kept: int) -> bool:
    return i == j or j in {t * n // kept for t in range(kept)}


def window(i: int, j: int, n: int, percent: int) -> bool:
    def pairs(half: int) -> int:
        return sum(abs(a - b) <= half for a in range(n) for b in range(n))

    return abs(i - j) <= max(half for half in range(n) if half == 0 or pairs(half) <= percent / 100 * n * n + 0.25)


def fixed(i: int, j: int, n: int, block: int) -> bool:
    return i // block == j // block or j % block == block - 1


def strided(i: int, j: int, n: int, block: int) -> bool:
    return abs(i - j) <= block or (i - j) % block == 0


CASES: dict[str, tuple[dict[str, Any], Callable[[int, int, int, int], bool], bool]] = {
    "uniform": ({"keep_ratio": 0.3}, uniform, False),
    "uniform, causal": ({"keep_ratio": 0.3, "causal": True}, uniform, True),
    "window": ({"keep_ratio": 0.2, "selection": "window"}, window, False),
    "window, most keys, causal": ({"keep_ratio": 0.8, "selection": "window", "causal": True}, window, True),
    "fixed": ({"selection": "fixed"}, fixed, False),
    "fixed, causal": ({"selection": "fixed", "causal": True}, fixed, True),
    "fixed, short blocks": ({"selection": "fixed", "block": 3}, fixed, False),
    "strided": ({"selection": "strided", "causal": True}, strided, True),
    "strided, short blocks": ({"selection": "strided", "causal": True, "block": 3}, strided, True),
    "strided, one block": ({"selection": "strided", "causal": True, "block": 50}, strided, True),
}


def number(options: dict[str, Any], n: int) -> int:
    """What the rule is made of: keys kept, the share of all pairs in percent, or the length of a block."""
    if options.get("selection") == "window":
        return round(100 * float(options["keep_ratio"]))
    if "keep_ratio" in options:
        return max(1, math.ceil(float(options["keep_ratio"]) * n))
    return int(options.get("block", math.isqrt(max(n - 1, 0)) + 1))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(("options", "rule", "causal"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_a_rule_is_its_mask(
    options: dict[str, Any], rule: Callable[[int, int, int, int], bool], causal: bool, padded: bool, sizes: tuple[int, ...], backend: str
) -> None:
    b, h, g, n = sizes
    dtype = torch.float32 if backend == "triton" else torch.float64
    query, key, value = draw(b, h, g, n, dtype)
    mask = seen(n, lambda i, j: rule(i, j, n, number(options, n)) and not (causal and j > i))
    padding = torch.rand(b, n) < 0.3 if padded else None
    with use_backend(backend):
        out, lse = sparse_attention(query, key, value, key_padding_mask=padding, return_lse=True, **options)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    truth, true_lse = dense(*wide, mask=mask, key_padding_mask=padding, return_lse=True)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if backend == "triton" else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(out.double(), truth, **close)
    torch.testing.assert_close(lse.double(), true_lse, **close)
    found = torch.autograd.grad(out.square().sum(), (query, key, value))
    for x, y in zip(found, torch.autograd.grad(truth.square().sum(), wide), strict=True):
        torch.testing.assert_close(x.double(), y, **close)


def test_top_keys_are_those_of_the_score_or_the_longest() -> None:
    query, key, value = draw(2, 4, 2, 40)
    score = torch.randn(2, 40)
    found = sparse_attention(query, key, value, keep_ratio=0.2, selection="topk", score=score)
    expected = triton_attn.subset_attention(query, key, value, indices=score.topk(8).indices)
    assert torch.equal(found, expected)
    found = sparse_attention(query, key, value, keep_ratio=0.2, selection="topk")
    expected = triton_attn.subset_attention(query, key, value, indices=key.norm(dim=-1).topk(8).indices)
    assert torch.equal(found, expected)


def test_top_keys_are_chosen_among_those_that_are_not_padded() -> None:
    query, key, value = draw(1, 1, 1, 20)
    padding = torch.arange(20)[None] >= 10
    score = torch.arange(20.0)[None]
    found = sparse_attention(query, key, value, keep_ratio=0.25, selection="topk", score=score, key_padding_mask=padding)
    expected = triton_attn.subset_attention(query, key, value, indices=torch.arange(5, 10), key_padding_mask=padding)
    torch.testing.assert_close(found, expected)


def test_random_keys_follow_the_generator() -> None:
    query, key, value = draw(1, 2, 2, 40)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(sparse_attention(query, key, value, keep_ratio=0.2, selection="random"))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("n", [1, 20, 31])
def test_all_keys_kept_is_dense_attention(n: int) -> None:
    query, key, value = draw(1, 2, 1, n)
    for selection in ("uniform", "random", "topk", "window"):
        found = sparse_attention(query, key, value, keep_ratio=1.0, selection=selection)
        torch.testing.assert_close(found, triton_attn.attention(query, key, value))


BLOCKED: dict[str, dict[str, Any]] = {
    "fixed": {"selection": "fixed"},
    "fixed, causal": {"selection": "fixed", "causal": True},
    "strided": {"selection": "strided", "causal": True},
}
EACH_BLOCKED = pytest.mark.parametrize("options", BLOCKED.values(), ids=BLOCKED.keys())


@EACH_BLOCKED
@pytest.mark.parametrize(("b", "n"), [(0, 0), (0, 1), (0, 17), (2, 0)])
def test_nothing_gives_nothing(options: dict[str, Any], b: int, n: int) -> None:
    out, lse = sparse_attention(*draw(b, 2, 1, n), return_lse=True, **options)
    assert out.shape == (b, 2, n, 16)
    assert lse.shape == (b, 2, n)


@EACH_BLOCKED
def test_blocks_have_second_derivatives_where_one_of_two_calls_sees_nothing(options: dict[str, Any]) -> None:
    given = [torch.randn(1, 1, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    padding = torch.arange(5)[None] == 0

    def outputs(*tensors: Tensor) -> Any:
        out, lse = sparse_attention(*tensors, block=2, key_padding_mask=padding, return_lse=True, **options)
        return out, lse.where(lse > -math.inf, 0.0)

    assert torch.autograd.gradgradcheck(outputs, given)


@pytest.mark.parametrize("options", [*BLOCKED.values(), {"keep_ratio": 0.4, "selection": "window"}], ids=[*BLOCKED, "window"])
def test_a_rule_compiles_at_the_next_length_too(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(lambda *tensors: sparse_attention(*tensors, **options), fullgraph=True, backend="eager")
    for n in (20, 33, 35):
        given = [x.detach() for x in draw(1, 2, 1, n)]
        torch.testing.assert_close(compiled(*given), sparse_attention(*given, **options))


def test_an_explained_or_refused_call_draws_no_keys() -> None:
    query, key, value = draw(1, 1, 1, 20)
    before = torch.get_rng_state()
    rule: dict[str, Any] = {"keep_ratio": 0.3, "selection": "random"}
    assert triton_attn.explain(sparse_attention, query, key, value, **rule).mechanism == "subset_attention"
    with pytest.raises(ArgumentError, match="sparse_attention: causal is 'bottom'"):
        sparse_attention(query, key, value, causal="bottom", **rule)
    assert torch.equal(torch.get_rng_state(), before)


def test_masked_tokens_and_those_outside_of_the_rule_change_nothing() -> None:
    """The original added its mask as numbers: every token saw every other."""
    query, key, value = draw(1, 1, 1, 24)
    rule: dict[str, Any] = {"indices": torch.tensor([3, 7]), "include_self": False}
    before = sparse_attention(query, key, value, **rule)
    changed = [x.detach().clone() for x in (key, value)]
    for x in changed:
        x[:, :, 8:] = 100.0
    assert torch.equal(before, sparse_attention(query, *changed, **rule))


def test_dropout_drops_jointly() -> None:
    query, key, value = draw(1, 1, 1, 36, torch.float32)
    rules: list[dict[str, Any]] = [{"selection": "fixed"}, {"selection": "strided", "causal": True}, {"keep_ratio": 0.5}]
    for options in rules:
        mean = torch.stack([sparse_attention(query, key, value, dropout_p=0.3, **options) for _ in range(300)]).mean(0)
        whole = sparse_attention(query, key, value, **options)
        assert (mean - whole).abs().max() < 0.5
        assert (mean - whole).abs().mean() < 0.06


PADDING = torch.zeros(1, 8, dtype=torch.bool)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no rule": ({}, "keep_ratio"),
    "two rules": ({"keep_ratio": 0.5, "indices": torch.tensor([0])}, "keep_ratio"),
    "unknown rule": ({"keep_ratio": 0.5, "selection": "best"}, "selection"),
    "a rule beside indices": ({"indices": torch.tensor([0]), "selection": "topk"}, "selection"),
    "ratio 0": ({"keep_ratio": 0.0}, "keep_ratio"),
    "ratio above 1": ({"keep_ratio": 1.5}, "keep_ratio"),
    "ratio NaN": ({"keep_ratio": math.nan}, "keep_ratio"),
    "ratio of a block rule": ({"keep_ratio": 0.5, "selection": "fixed"}, "keep_ratio"),
    "score of another rule": ({"keep_ratio": 0.5, "score": torch.zeros(1, 8)}, "score"),
    "score of another shape": ({"keep_ratio": 0.5, "selection": "topk", "score": torch.zeros(1, 9)}, "score"),
    "block of another rule": ({"keep_ratio": 0.5, "block": 4}, "block"),
    "score that is no tensor": ({"keep_ratio": 0.5, "selection": "topk", "score": [0.0] * 8}, "score"),
    "score of flags": ({"keep_ratio": 0.5, "selection": "topk", "score": torch.ones(1, 8, dtype=torch.bool)}, "score"),
    "padding of another length": ({"keep_ratio": 0.5, "selection": "topk", "key_padding_mask": PADDING[:, 1:]}, "key_padding_mask"),
    "padding of numbers": ({"keep_ratio": 0.5, "selection": "topk", "key_padding_mask": PADDING.float()}, "key_padding_mask"),
    "padding that is no tensor": ({"keep_ratio": 0.5, "selection": "topk", "key_padding_mask": [[True] * 8]}, "key_padding_mask"),
    "key that is no tensor": ({"keep_ratio": 0.5, "key": [1.0]}, "key"),
    "no key": ({"keep_ratio": 0.5, "key": None}, "key"),
    "key of two axes": ({"keep_ratio": 0.5, "key": torch.zeros(8, 16)}, "key"),
    "an unknown alignment of a block rule": ({"selection": "fixed", "causal": "bottom"}, "causal"),
    "an unknown alignment of strides": ({"selection": "strided", "causal": "bottom"}, "causal"),
    "causal that is a number": ({"selection": "strided", "causal": 1}, "causal"),
    "include_self that is a word": ({"keep_ratio": 0.5, "selection": "window", "include_self": "yes"}, "include_self"),
    "own keys of fewer": ({"keep_ratio": 0.5, "key": torch.zeros(1, 1, 7, 16), "value": torch.zeros(1, 1, 7, 16)}, "query"),
    "block 0": ({"selection": "fixed", "block": 0}, "block"),
    "window without the query's own key": ({"keep_ratio": 0.5, "selection": "window", "include_self": False}, "include_self"),
    "strided into the future": ({"selection": "strided"}, "causal"),
    "index beyond the keys": ({"indices": torch.tensor([8])}, "indices"),
    "negative index": ({"indices": torch.tensor([-1])}, "indices"),
    "indices that are numbers": ({"indices": torch.tensor([0.5])}, "indices"),
}


@pytest.mark.parametrize(("options", "argument"), BAD.values(), ids=BAD.keys())
def test_a_wrong_argument_is_named(options: dict[str, Any], argument: str) -> None:
    tensors = dict(zip(("query", "key", "value"), draw(1, 1, 1, 8, torch.float32), strict=True))
    with pytest.raises(ArgumentError) as caught:
        sparse_attention(**{**tensors, **options})
    assert caught.value.argument == argument
    assert str(caught.value).startswith("subset_attention: " if argument == "indices" else "sparse_attention: ")


def test_whole_numbers_rank_keys_too() -> None:
    query, key, value = draw(1, 1, 1, 8)
    score, padding = torch.arange(8)[None], torch.arange(8)[None] > 5
    found = sparse_attention(query, key, value, keep_ratio=0.25, selection="topk", score=score, key_padding_mask=padding)
    expected = triton_attn.subset_attention(query, key, value, indices=torch.tensor([4, 5]), key_padding_mask=padding)
    torch.testing.assert_close(found, expected)


def test_indices_that_no_key_has_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"subset_attention: indices has shape \(3, 4\); allowed: \(K,\), \(2, K\) or \(2, 1, K\)"):
        triton_attn.subset_attention(*draw(2, 2, 1, 8), indices=torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(ArgumentError, match="indices names 1, and there are no keys; allowed: none at all"):
        triton_attn.subset_attention(*draw(1, 1, 1, 0), indices=torch.tensor([0]))
