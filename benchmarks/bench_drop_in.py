"""The host's share of tiny calls: our drop-ins beside torch's own, taking turns, in microseconds.

    python -m pytest benchmarks/bench_drop_in.py --benchmark-enable --benchmark-only -s

prints the table of docs/drop_in.md, a row for each test.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import triton_attn
from triton_attn import bench
from triton_attn.nn import MultiheadAttention

WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CALLS_AT_ONCE, ROUNDS, SECONDS = 100, 200, 20.0
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def function(ours: Any, **options: Any) -> Pair:
    """(1, 4, 16, 16): batch, heads, length, width."""
    tensors = [torch.randn(1, 4, 16, 16, device=WHERE, requires_grad=True) for _ in range(3)]
    theirs: Any = F.scaled_dot_product_attention
    return lambda: ours(*tensors, **options), lambda: theirs(*tensors, **options)


def masked() -> Pair:
    return function(triton_attn.scaled_dot_product_attention, attn_mask=torch.ones(1, 1, 16, 16, dtype=torch.bool, device=WHERE))


def module(need_weights: bool) -> Pair:
    """(1, 16, 64): batch, length, width; 4 heads. In evaluation without gradients torch's takes its fused path."""
    x = torch.randn(1, 16, 64, device=WHERE)
    theirs: Any = torch.nn.MultiheadAttention(64, 4, batch_first=True, device=WHERE).eval()
    ours = MultiheadAttention(64, 4, batch_first=True, device=WHERE).eval()
    ours.load_state_dict(theirs.state_dict())
    return lambda: ours(x, x, x, need_weights=need_weights)[0], lambda: theirs(x, x, x, need_weights=need_weights)[0]


PAIRS: dict[str, Callable[[], Pair]] = {
    "attention": lambda: function(triton_attn.attention),
    "scaled_dot_product_attention": lambda: function(triton_attn.scaled_dot_product_attention),
    "scaled_dot_product_attention, attn_mask": masked,
    "MultiheadAttention, need_weights=False": lambda: module(need_weights=False),
    "MultiheadAttention, need_weights=True": lambda: module(need_weights=True),
}


@pytest.mark.parametrize("direction", ["forward, no gradient", bench.BOTH])
@pytest.mark.parametrize("name", PAIRS)
def test_tiny_call_beside_torchs(benchmark: Any, name: str, direction: str) -> None:
    torch.set_num_threads(1)

    def repeated(call: Callable[[], Any]) -> Callable[[], Any]:
        if direction == bench.BOTH:
            return lambda: [call().sum().backward() for _ in range(CALLS_AT_ONCE)]
        return lambda: [call() for _ in range(CALLS_AT_ONCE)]

    ours, theirs = PAIRS[name]()
    with nullcontext() if direction == bench.BOTH else torch.no_grad():
        times = bench.interleave(repeated(ours), repeated(theirs), WHERE, seconds=SECONDS, most=ROUNDS)
        benchmark.pedantic(repeated(ours), rounds=3, warmup_rounds=1)
    mine, peers = (1e6 * statistics.median(spent) / CALLS_AT_ONCE for spent in times)
    added = statistics.median(1e6 * (a - b) / CALLS_AT_ONCE for a, b in zip(*times, strict=True))
    benchmark.extra_info.update(microseconds=mine, peer_microseconds=peers, added_microseconds=added)
    print(f"\n| {name} | {direction} | {mine:.1f} | {peers:.1f} | {added:+.1f} |")
