"""Hydra's shared state against one for each branch, and ripple against linear attention on the same tokens: ratios, interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_attn import bench, hydra_attention, linear_attention, ripple_attention

WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIRECTIONS = (bench.FORWARD, bench.BOTH)


def beside(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: list[Tensor], direction: str) -> float:
    """Their median time over ours."""
    calls = [ours, theirs]
    if direction == bench.BOTH:
        grad = torch.randn_like(ours())
        calls = [lambda call=call: torch.autograd.grad(call(), leaves, grad) for call in calls]  # type: ignore[misc]
    mine, peers = bench.interleave(calls[0], calls[1], WHERE, seconds=8.0)
    ratio = statistics.median(b / a for a, b in zip(mine, peers, strict=True))
    print(f"\n{name} {direction}: {1e3 * statistics.median(mine):.2f} ms beside {1e3 * statistics.median(peers):.2f} ms, ratio {ratio:.2f}")
    return ratio


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_hydra_beside_a_linear_attention_for_each_branch(benchmark: Any, direction: str) -> None:
    """(1, 8, 4096, 64), 4 branches."""
    query = torch.randn(1, 4, 8, 4096, 64, device=WHERE, requires_grad=True)
    key, value = (torch.randn(1, 8, 4096, 64, device=WHERE, requires_grad=True) for _ in range(2))

    def separate() -> Tensor:
        return torch.stack([linear_attention(branch, key, value, feature_map="crelu") for branch in query.unbind(1)], 1)

    ratio = beside("hydra, 4 branches", lambda: hydra_attention(query, key, value), separate, [query, key, value], direction)
    benchmark.extra_info.update(ratio=ratio)
    benchmark.pedantic(lambda: hydra_attention(query, key, value), rounds=3, warmup_rounds=1)
    if WHERE.type == "cpu" and direction == bench.FORWARD:
        assert ratio > 1.4


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ripple_beside_linear_attention(benchmark: Any, direction: str) -> None:
    """64 x 64 tokens and a class token, 3 stages, (1, 6, 4097, 64): reported, nothing is promised."""
    query, key, value = (torch.randn(1, 6, 4097, 64, device=WHERE, requires_grad=True) for _ in range(3))
    layers: Any = [[torch.randn(shape, device=WHERE) / 8 for shape in ((64, 64), (64,), (64,), (64,))] for _ in range(3)]

    def ripple() -> Tensor:
        return ripple_attention(query, key, value, layers, layers, grid_size=(64, 64))

    ratio = beside(
        "ripple, 3 stages", ripple, lambda: linear_attention(query, key, value, feature_map="crelu"), [query, key, value], direction
    )
    benchmark.extra_info.update(ratio=ratio)
    benchmark.pedantic(ripple, rounds=3, warmup_rounds=1)
