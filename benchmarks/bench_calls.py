"""Interleaved ratios of every row against its peers, and the host's share of a tiny call.

`make bench` runs them under pytest-benchmark; the assertions are the ratios that the project promises on a CPU.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import triton_attn
from triton_attn import CATALOG, bench
from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import inputs

WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKLOADS = [
    pytest.param(row, case, peer, direction, id=f"{row.name}-{case.name}-{peer}-{direction}")
    for row in CATALOG.values()
    for case in row.workloads[WHERE.type]
    for peer in row.peers
    for direction in (bench.FORWARD, bench.BOTH)
]


@pytest.mark.parametrize(("row", "case", "peer", "direction"), WORKLOADS)
def test_call_beside_its_peer(benchmark: Any, row: Mechanism, case: Case, peer: str, direction: str) -> None:
    dtype = torch.bfloat16 if WHERE.type == "cuda" else torch.float32
    timing = bench.time_beside(row, case, peer, direction, WHERE, dtype, seconds=8.0)
    tensors, options = inputs.draw(row, case, dtype=dtype, device=WHERE)
    tensors.pop("seed", None)
    benchmark.extra_info.update(ratio=timing.ratio, peer_milliseconds=timing.peer_milliseconds, path=timing.path)
    benchmark.pedantic(lambda: row.call(**tensors, **options), rounds=3, warmup_rounds=1)
    beside = f"{timing.milliseconds:.2f} ms, {peer} {timing.peer_milliseconds:.2f} ms, ratio {timing.ratio:.3f}"
    print(f"\n{row.name} {case.name} {direction}: {beside}")
    if timing.path == "portable":
        assert timing.ratio > 1 / 1.05


def test_host_overhead_of_a_tiny_call(benchmark: Any) -> None:
    """(1, 4, 16, 16): what the checks and the dispatch add to torch's own call, in microseconds."""
    torch.set_num_threads(1)
    query, key, value = (torch.randn(1, 4, 16, 16) for _ in range(3))
    added = []
    for _ in range(7):
        ours, theirs = bench.interleave(
            lambda: [triton_attn.attention(query, key, value) for _ in range(200)],
            lambda: [F.scaled_dot_product_attention(query, key, value) for _ in range(200)],
            torch.device("cpu"),
            seconds=0.3,
        )
        added.append(5e3 * (statistics.median(ours) - statistics.median(theirs)))
    benchmark.extra_info.update(added_microseconds=statistics.median(added))
    benchmark(triton_attn.attention, query, key, value)
    print(f"\nadded to SDPA: {statistics.median(added):.1f} microseconds")
    assert statistics.median(added) < 15.0
