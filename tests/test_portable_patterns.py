"""Portable patterns at lengths that take their own ways: a band of many blocks, fused unions, branches of many segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_attn import CATALOG, use_backend
from triton_attn.portable import _banded, _fused, dilated_attention
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


def compare(name: str, options: dict[str, Any], more: int = 0, dtype: torch.dtype = torch.float64) -> None:
    """Output and gradients against the reference; `more` summaries."""
    leaves = {part: torch.randn(2, 3, LONG, 16, dtype=dtype, requires_grad=True) for part in ("query", "key", "value")}
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
def test_a_long_band_goes_by_blocks(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = called(monkeypatch, _banded, "banded")
    compare("local_global_attention", options)
    assert calls == ["banded"]


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


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "band": lambda x: CATALOG["local_global_attention"].function(x, x, x, window=8),
    "branches": lambda x: CATALOG["dilated_attention"].function(x, x, x, segment_lengths=(64,), dilation_rates=(2,)),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_a_second_derivative_is_refused(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 1, LONG, 8, requires_grad=True)
    with use_backend("portable"):
        (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="not implemented"):
        torch.autograd.grad(first.sum(), x)
