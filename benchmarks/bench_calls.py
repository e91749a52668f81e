"""Interleaved ratios of every row against its peers, and the host's share of a tiny call.

`make bench` runs them under pytest-benchmark, and keeps the timings for the report in build/bench.jsonl; the assertions are the ratios
that the project promises on a CPU.
"""

from __future__ import annotations

import importlib.util
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import triton_attn
from benchmarks.peers import beside
from triton_attn import CATALOG, bench
from triton_attn.mechanism import Case, Mechanism
from triton_attn.report import earlier
from triton_attn.testing import inputs

WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKLOADS = [
    pytest.param(row, case, peer, direction, id=f"{row.name}-{case.name}-{peer}-{direction}")
    for row in map(beside, CATALOG.values())
    for case in row.workloads[WHERE.type]
    for peer in row.peers
    for direction in (bench.FORWARD, bench.BOTH)
]

# What the project promises on a CPU: the peer's time over ours, forward and forward + backward. Other pairs are printed, not judged.
OVER_ALL_KEYS = "torch SDPA over all keys"
PROMISED = {
    ("attention", "dense", "torch SDPA"): (0.95, 0.95),
    ("attention", "cross", "torch SDPA"): (0.95, 0.95),
    ("strided_attention", "stride 4", OVER_ALL_KEYS): (3.0, 3.0),
    ("local_global_attention", "window 256", "local-attention"): (1.8, None),
    ("local_global_attention", "window 64, 4 global tokens", OVER_ALL_KEYS): (15.0, 15.0),
    ("subset_attention", "one key in eight", OVER_ALL_KEYS): (5.0, 5.0),
    ("dilated_attention", "12 times fewer pairs", OVER_ALL_KEYS): (7.0, 7.0),
    ("dilated_attention", "12 times fewer pairs", "torchscale's way"): (1.2, 1.2),
    ("linear_attention", "whole 8k", "torch SDPA"): (25.0, 25.0),
    ("causal_conv1d", "Mamba 130M, batch 8, 2048 tokens", "F.conv1d and silu"): (1.8, 1.8),
}


@pytest.mark.parametrize(("row", "case", "peer", "direction"), WORKLOADS)
def test_call_beside_its_peer(benchmark: Any, row: Mechanism, case: Case, peer: str, direction: str) -> None:
    dtype = torch.bfloat16 if WHERE.type == "cuda" else torch.float32
    try:
        timing = bench.time_beside(row, case, peer, direction, WHERE, dtype, seconds=8.0)
    except NotImplementedError as reason:
        pytest.skip(f"{peer}: {reason}")
    earlier.keep(timing)
    tensors, options = inputs.draw(row, case, dtype=dtype, device=WHERE)
    tensors.pop("seed", None)
    benchmark.extra_info.update(ratio=timing.ratio, peer_milliseconds=timing.peer_milliseconds, path=timing.path)
    benchmark.pedantic(lambda: row.call(**tensors, **options), rounds=3, warmup_rounds=1)
    beside = f"{timing.milliseconds:.2f} ms, {peer} {timing.peer_milliseconds:.2f} ms, ratio {timing.ratio:.3f}"
    print(f"\n{row.name} {case.name} {direction}: {beside}")
    least = PROMISED.get((row.name, case.name, peer), (None, None))[direction == bench.BOTH]
    if timing.path == "portable" and least is not None:
        assert timing.ratio >= least


@pytest.mark.parametrize("promise", PROMISED, ids=" ".join)
def test_a_promise_names_a_workload(promise: tuple[str, str, str]) -> None:
    row, case, peer = promise
    assert case in [each.name for each in CATALOG[row].workloads["cpu"]]
    assert peer in beside(CATALOG[row]).peers or not importlib.util.find_spec(peer.replace("-", "_"))


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
