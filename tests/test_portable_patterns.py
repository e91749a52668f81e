"""Portable patterns at lengths that take their own ways: a band of many blocks, fused unions, branches of many segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_attn
from triton_attn import CATALOG, use_backend
from triton_attn.portable import _banded, _fused, _near, dilated_attention
from triton_attn.portable.local_global_attention import SHORT

LONG = SHORT + 45


def called(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Notes each call of a function."""
    calls: list[str] = []
    function = getattr(owner, name)

    def noting(*args: Any) -> Any:
        calls.append(name)
        return function(*args)

    monkeypatch.setattr(owner, name, noting)
    return calls


@pytest.fixture(params=["fused", "windows", "windows, a few at a time"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short bands go by the fused call; longer ones, for which this makes all of them pass, by windows."""
    assert LONG <= _near.LONGEST
    if request.param != "fused":
        monkeypatch.setattr(_near, "LONGEST", 0)
    if request.param == "windows, a few at a time":
        monkeypatch.setattr(_banded, "AT_ONCE", 2**14)


BAND: dict[str, dict[str, Any]] = {
    "narrow": {"window": 40},
    "own key alone": {"window": 1},
    "wide": {"window": 2 * LONG},
    "causal": {"window": 70, "causal": True},
    "first tokens": {"window": 30, "global_tokens": 5},
    "causal, first tokens": {"window": 64, "global_tokens": 3, "causal": True},
}
UNION: dict[str, tuple[str, dict[str, Any]]] = {
    "stride and own key": ("strided_attention", {"stride": 4, "phase": 1, "include_self": True}),
    "subset and own key": ("subset_attention", {"indices": torch.tensor([0, 7, 200, 33])}),
    "subset with a key named twice": ("subset_attention", {"indices": torch.tensor([[0, 7, 7, 200, 33], [9, 8, 2, 1, 0]])}),
    "a subset a head": ("subset_attention", {"indices": torch.arange(30).remainder(7).view(2, 3, 5)}),
}
BRANCHES: dict[str, dict[str, Any]] = {
    "nested": {"segment_lengths": (64, 128), "dilation_rates": (1, 2)},
    "short tail": {"segment_lengths": (96, 250), "dilation_rates": (2, 3)},
    "causal": {"segment_lengths": (64, 400), "dilation_rates": (1, 4), "causal": True},
    "head groups": {"segment_lengths": (64, 128), "dilation_rates": (1, 2), "mode": "head_group"},
}


def compare(name: str, options: dict[str, Any], more: int = 0, dtype: torch.dtype = torch.float64, size: float = 1.0) -> None:
    """Output and gradients against the reference; `more` summaries, queries of a size."""
    leaves = {part: torch.randn(2, 3, LONG, 16, dtype=dtype) for part in ("query", "key", "value")}
    leaves["query"] *= size
    leaves = {part: x.requires_grad_() for part, x in leaves.items()}
    if more:
        leaves |= {part: torch.randn(2, 3, more, 16, dtype=dtype, requires_grad=True) for part in ("global_key", "global_value")}
    found: list[tuple[Tensor, ...]] = []
    for backend in ("portable", "reference"):
        with use_backend(backend):
            out = CATALOG[name].function(**leaves, **options)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        found.append((out, *torch.autograd.grad((out * weights).sum(), tuple(leaves.values()))))
    close = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=close, atol=close)


@pytest.mark.parametrize("options", BAND.values(), ids=BAND.keys())
@pytest.mark.usefixtures("way")
def test_a_long_band_goes_by_blocks(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = called(monkeypatch, _banded, "banded")
    compare("local_global_attention", options)
    assert calls == ["banded"]


@pytest.mark.usefixtures("way")
def test_summaries_ride_along_with_a_band(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = called(monkeypatch, _banded, "banded")
    compare("local_global_attention", {"window": 40}, more=6)
    assert calls == ["banded"]


@pytest.mark.parametrize(("name", "options"), UNION.values(), ids=UNION.keys())
def test_a_query_s_own_key_joins_a_fused_call(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = called(monkeypatch, _fused, "with_own_key")
    compare(name, options)
    assert calls == ["with_own_key"]


@pytest.mark.parametrize("options", BRANCHES.values(), ids=BRANCHES.keys())
def test_branches_join_fused_calls(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = called(monkeypatch, dilated_attention._Mixed, "apply")
    compare("dilated_attention", options, dtype=torch.float32)
    assert calls == ["apply"]


PHASES = {
    # batch, heads, tokens, segment, rate, rule, calls
    "heads side by side": (1, 8, 128, 128, 4, "block", 1),
    "a head a phase": (1, 8, 128, 128, 16, "block", 1),
    "several segments": (1, 8, 128, 32, 4, "block", 2),
    "several segments of a batch": (3, 8, 120, 30, 4, "mod", 2 * 2 * 2),
    "a short segment and a smaller group": (2, 5, 45, 20, 2, "block", 2 + 2 + 1 + 1),
}


@pytest.mark.parametrize(("b", "h", "n", "length", "rate", "rule", "calls"), PHASES.values(), ids=PHASES.keys())
def test_phases_share_calls_that_meet_each_selected_token_once(
    b: int, h: int, n: int, length: int, rate: int, rule: str, calls: int
) -> None:
    branch = (length, rate, dilated_attention._selecting(0, h, 1, rate, "longnet", rule))
    token = torch.arange(b * h * n).view(b, h, n, 1)
    pieces = [piece for _, (piece,) in dilated_attention._pieces([branch], token)]
    for piece in pieces:  # one head and one segment of one item meet
        first = piece[:, :, :1]
        assert torch.equal(piece // n, (first // n).expand(piece.shape))
        assert torch.equal(piece % n // length, (first % n // length).expand(piece.shape))
    found = torch.cat([piece.flatten() for piece in pieces])
    head, place = token // n % h, token % n
    phase = head // -(-h // rate) if rule == "block" else head % rate
    assert found.sort().values.tolist() == token[place % length % rate == phase].tolist()
    assert len(pieces) == calls


@pytest.mark.parametrize(
    ("n", "window", "goes"), [(200, 30, "fused"), (100, 10, ""), (256, 256, ""), (300, 300, "fused"), (1100, 30, "windows")]
)
def test_a_band_goes_the_way_that_pays(n: int, window: int, goes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, windows = called(monkeypatch, _near, "forward"), called(monkeypatch, _banded, "_forward")
    x = torch.randn(1, 1, n, 4)
    with use_backend("portable"):
        CATALOG["local_global_attention"].function(x, x, x, window=window)
    assert (fused, windows) == (["forward"] * (goes == "fused"), ["_forward"] * (goes == "windows"))


@pytest.mark.parametrize("size", [1.0, 40.0], ids=["usual", "too large for exp"])
@pytest.mark.parametrize(
    "options", [{"window": 40}, {"window": 64, "global_tokens": 3, "causal": True}], ids=["narrow", "causal, first tokens"]
)
@pytest.mark.usefixtures("way")
def test_a_band_bears_scores_of_any_size(options: dict[str, Any], size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = called(monkeypatch, _banded, "banded")
    compare("local_global_attention", options, size=size)
    assert calls == ["banded"]


@pytest.mark.usefixtures("way")
def test_what_one_head_holds_does_not_reach_another() -> None:
    x = torch.randn(1, 2, LONG, 8)
    x[:, 1] = torch.nan
    with use_backend("portable"):
        out = CATALOG["local_global_attention"].function(x, x, x, window=40)
    assert out[:, 0].isfinite().all()
    assert out[:, 1].isnan().all()


@pytest.mark.parametrize("more", [0, 3], ids=["window", "summaries"])
@pytest.mark.usefixtures("way")
def test_a_band_has_second_derivatives(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = called(monkeypatch, _banded, "banded")
    query, key, value, *summaries = leaves = [
        torch.randn(1, 2, length, 4, dtype=torch.float64, requires_grad=True)
        for length in (LONG, LONG, LONG, more, more)[: 5 if more else 3]
    ]
    options: dict[str, Any] = dict(zip(("global_key", "global_value"), summaries, strict=False))
    found: list[tuple[Tensor, ...]] = []
    for backend in ("portable", "reference"):
        with use_backend(backend):
            out = CATALOG["local_global_attention"].function(query, key + query, value, window=40, **options)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append((*first, *torch.autograd.grad(torch.stack([each.square().sum() for each in first]).sum(), leaves)))
    assert calls == ["banded"]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("way")
def test_several_gradients_of_a_band_at_once() -> None:
    leaves = [torch.randn(1, 2, LONG, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with use_backend("portable"):
        out = CATALOG["local_global_attention"].function(*leaves, window=50)
    several = torch.randn(2, *out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, leaves, several, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(several):
        for batched, alone in zip(found, torch.autograd.grad(out, leaves, one, retain_graph=True), strict=True):
            torch.testing.assert_close(batched[i], alone)


def test_a_second_derivative_of_branches_is_refused() -> None:
    x = torch.randn(1, 1, LONG, 8, requires_grad=True)
    with use_backend("portable"):
        out = CATALOG["dilated_attention"].function(x, x, x, segment_lengths=(64,), dilation_rates=(2,))
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="not implemented"):
        torch.autograd.grad(first.sum(), x)


PACKED = torch.tensor([0, 30, 96])
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("attention", {}),
    "dense, causal": ("attention", {"causal": True}),
    "packed": ("attention_varlen", {"cu_seqlens_q": PACKED, "cu_seqlens_k": PACKED}),
    "packed, causal": ("attention_varlen", {"cu_seqlens_q": PACKED, "cu_seqlens_k": PACKED, "causal": True}),
    "stride": ("strided_attention", {"stride": 4}),
    "stride, causal": ("strided_attention", {"stride": 4, "causal": True}),
    "stride and own key": ("strided_attention", {"stride": 4, "include_self": True}),
    "subset": ("subset_attention", {"indices": torch.tensor([0, 7, 33]), "include_self": False}),
    "subset and own key": ("subset_attention", {"indices": torch.tensor([0, 7, 33])}),
    "short band": ("local_global_attention", {"window": 8}),
    "band": ("local_global_attention", {"window": 40, "global_tokens": 3}),
    "band, causal": ("local_global_attention", {"window": 40, "global_tokens": 3, "causal": True}),
    "branches": ("dilated_attention", {"segment_lengths": (16, 64), "dilation_rates": (1, 4)}),
    "branches, causal": ("dilated_attention", {"segment_lengths": (16, 64), "dilation_rates": (1, 4), "causal": True}),
    "branches, detached": ("dilated_attention", {"segment_lengths": (16, 64), "dilation_rates": (1, 4), "detach_mixing": True}),
}


def drawn(label: str) -> list[Tensor]:
    shape = (96, 2, 8) if label.startswith("packed") else (1, 2, LONG if label.startswith("band") else 96, 8)
    return [torch.randn(shape) for _ in range(3)]


def apart(x: Tensor) -> Tensor:
    """The same numbers, those of a row not side by side: channels first, NaN between them."""
    wide = torch.full((*x.shape[:-2], x.shape[-1], 2 * x.shape[-2]), torch.nan)
    wide[..., ::2] = x.mT
    return wide[..., ::2].mT


def computed(label: str, given: list[Tensor], weight: Tensor, backend: str = "portable", **more: Any) -> list[Tensor]:
    name, options = FUSED[label]
    leaves = [x.detach().requires_grad_() for x in given]
    with use_backend(backend):
        out = CATALOG[name].function(*leaves, **options, **more)
    return [out, *torch.autograd.grad(out, leaves, weight)]


@pytest.mark.parametrize("label", FUSED)
def test_numbers_of_a_row_may_lie_apart(label: str) -> None:
    """Fused operators read a row's numbers side by side, whatever the stride says."""
    given = drawn(label)
    weight = torch.randn_like(given[0])
    expected = computed(label, given, weight)
    for which in range(4):
        strided = [apart(x) if which in (i, 3) else x for i, x in enumerate(given)]  # at last all of them and the output's gradient
        found = computed(label, strided, apart(weight) if which == 3 else weight)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_of_a_narrow_row_may_lie_apart(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 8, 96).to(dtype)
    name, options = FUSED["branches"]
    with use_backend("portable"):
        found, expected = (CATALOG[name].function(y, y, y, **options) for y in (x.mT, x.mT.contiguous()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1e-50])
@pytest.mark.parametrize("label", FUSED)
def test_a_scale_may_be_any_finite_number(label: str, scale: float) -> None:
    """Fused operators multiply the -inf of a key that causality hides by the scale."""
    given = drawn(label)
    weight = torch.randn_like(given[0])
    found, expected = (computed(label, given, weight, backend, scale=scale) for backend in ("portable", "reference"))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, equal_nan=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: triton_attn.strided_attention(x, x, x, stride=4, include_self=True),
        lambda x: triton_attn.sparse_attention(x, x, x, keep_ratio=0.25),
        lambda x: triton_attn.dilated_attention(x, x, x, segment_lengths=(8, 16), dilation_rates=(1, 2)),
    ],
    ids=["strided", "subset", "dilated"],
)
def test_gradients_that_might_be_differentiated_are_the_same_and_that_is_refused(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 24, 8, requires_grad=True)
    (plain,) = torch.autograd.grad(call(x).sum(), x)
    (again,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    assert torch.equal(plain, again)
    with pytest.raises(NotImplementedError, match="not implemented"):
        torch.autograd.grad(again.sum(), x)
