"""CrossMemoryAttention.fuse_with_memory: the mix as it is written, beside the mix inside of the output projection.

    python -m pytest benchmarks/bench_fusion.py --benchmark-enable --benchmark-only -s

prints the table of docs/hierarchical.md. `inside` is r (a W^T + b) + (1 - r) x = addmm((1 - r) x + r b, a, W^T) with the factors given to
the product, which a tensor ratio and hooks of out_proj would not allow.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_attn import bench
from triton_attn.nn import CrossMemoryAttention

WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RATIO, MEMORY = 0.5, 256


class Inside(CrossMemoryAttention):
    """The mix as the epilogue of the output projection."""

    def forward(self, local_features: Tensor, memory_tokens: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:
        self.local = local_features
        return super().forward(local_features, memory_tokens, *rest, **more)

    def output(self, heads: Tensor) -> Tensor:
        projection: Any = self.out_proj
        rows = heads.transpose(1, 2).flatten(2).flatten(0, 1)
        local = self.local.flatten(0, 1)
        mixed: Tensor = torch.addmm(local, rows, projection.weight.mT, beta=1 - RATIO, alpha=RATIO)
        bias: Tensor = RATIO * projection.bias
        return (mixed + bias).view(self.local.shape)


@pytest.mark.parametrize("direction", ["forward, no gradient", bench.BOTH])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_mix_as_written_beside_the_mix_inside(benchmark: Any, tokens: int, direction: str) -> None:
    torch.set_num_threads(1)
    written, inside = CrossMemoryAttention(device=WHERE), Inside(device=WHERE)
    inside.load_state_dict(written.state_dict())
    local, memory = (torch.randn(1, n, 768, device=WHERE, requires_grad=True) for n in (tokens, MEMORY))
    torch.testing.assert_close(written.fuse_with_memory(local, memory, RATIO), inside(local, memory, False))

    def run(call: Callable[[], Tensor]) -> Callable[[], Any]:
        return (lambda: call().sum().backward()) if direction == bench.BOTH else call  # type: ignore[no-untyped-call]

    ours, theirs = run(lambda: written.fuse_with_memory(local, memory, RATIO)), run(lambda: inside(local, memory, False))
    with nullcontext() if direction == bench.BOTH else torch.no_grad():
        times = bench.interleave(ours, theirs, WHERE, seconds=8.0)
        benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
    mine, other = (1e3 * statistics.median(spent) for spent in times)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    benchmark.extra_info.update(ratio=ratio)
    print(f"\n| {tokens} | {direction} | {mine:.1f} | {other:.1f} | {ratio:.3f} |")
