"""OpenCLIP's residual blocks beside the standard one, in turns, from 197 to 8192 tokens, forward and with the backward pass.

    python -m pytest benchmarks/bench_residual_blocks.py --benchmark-enable --benchmark-only -s

Width 768, 12 heads, float32 on a CPU. The parallel block is folded where there is no backward pass. A round calls every block once; the
speed-up is the median over rounds of the standard block's time over the block's in the same round.
What pytest-benchmark itself times is the whole comparison; the blocks' own times are printed and stand in extra_info.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from triton_attn.integrations.block_benchmark import benchmark_attention_blocks

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
# (sequences, tokens) -> rounds that do not count and that do, forward; with the backward pass
SIZES = {(8, 197): ((2, 7), (1, 5)), (1, 1024): ((2, 7), (1, 5)), (1, 4096): ((1, 5), (1, 3)), (1, 8192): ((0, 3), (0, 2))}
# (tokens, block): the least speed-up forward on a CPU; linear is meant to reach 1.8 at 4096, where 1.78 to 1.83 was measured
PROMISED = {(4096, "linear"): 1.7, (8192, "linear"): 2.6, (4096, "sparse"): 1.25, (4096, "deepnorm"): 0.95}


@pytest.mark.parametrize(("batch", "tokens"), SIZES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
def test_blocks_beside_the_standard_one(benchmark: Any, batch: int, tokens: int, backward: bool) -> None:
    warmup, rounds = SIZES[batch, tokens][backward]
    sizes = (768, 12, tokens, batch, WHERE, warmup, rounds)
    rows = benchmark.pedantic(lambda: benchmark_attention_blocks(*sizes, backward=backward), rounds=1)
    for kind, row in rows.items():
        direction = "forward + backward" if backward else "forward"
        memory = "" if row["memory_mb"] is None else f", {row['memory_mb']:.0f} MiB"
        print(f"\n{batch} x {tokens} tokens, {direction}, {kind}: {row['avg_time_ms']:.0f} ms, {row['speedup']:.2f}x{memory}", end="")
        benchmark.extra_info[kind] = {"ms": row["avg_time_ms"], "speedup": row["speedup"], "memory_mb": row["memory_mb"]}
    for (length, kind), least in PROMISED.items():
        if WHERE == "cpu" and not backward and length == tokens:
            assert rows[kind]["speedup"] > least, (kind, tokens)
