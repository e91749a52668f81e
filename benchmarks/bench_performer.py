"""Performer attention beside performer-pytorch's, (1, 8, 2048, 64) with 256 features: ratios, interleaved. `make bench` installs it."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from triton_attn import bench, orthogonal_projection, performer_attention

WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMISED = {False: 1.5, True: 10.0}  # causal -> their time over ours, on a CPU


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
def test_beside_performer_pytorch(benchmark: Any, causal: bool) -> None:
    peer = pytest.importorskip("performer_pytorch")
    query, key, value = (torch.randn(1, 8, 2048, 64, device=WHERE) for _ in range(3))
    theirs = peer.FastAttention(dim_heads=64, nb_features=256, causal=causal).to(WHERE)
    projection = orthogonal_projection(256, 64, device=WHERE)

    def ours() -> torch.Tensor:
        out: torch.Tensor = performer_attention(query, key, value, projection, causal=causal)
        return out

    with torch.no_grad():
        mine, peers = bench.interleave(ours, lambda: theirs(query, key, value), WHERE, seconds=8.0)
    ratio = statistics.median(b / a for a, b in zip(mine, peers, strict=True))
    print(f"\ncausal {causal}: {1e3 * statistics.median(mine):.1f} ms beside {1e3 * statistics.median(peers):.1f} ms, ratio {ratio:.2f}")
    benchmark.extra_info.update(ratio=ratio)
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
    if WHERE.type == "cpu":
        assert ratio >= PROMISED[causal]
