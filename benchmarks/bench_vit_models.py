"""Whole vision transformers from 32 to 512 pixels, patches of 4: dense against ripple and hydra of the same width, in turns.

    python -m pytest benchmarks/bench_vit_models.py --benchmark-enable --benchmark-only -s

On a CPU the model is small (width 128, two heads of 64, two blocks, one image), because a dense training step at 512 pixels attends
over 16,385 tokens; on a GPU it is the original's (width 384, six heads, twelve blocks).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from triton_attn.vit import speed
from triton_attn.vit.settings import Settings

WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGE: dict[str, Any] = {"dim": 384, "depth": 12, "heads": 6, "mlp_dim": 1536, "ripple_stages": 3}
SMALL: dict[str, Any] = {"dim": 128, "depth": 2, "heads": 2, "mlp_dim": 256, "ripple_stages": 3}
SIZE = {**(LARGE if WHERE.type == "cuda" else SMALL), "dim_head": 64, "patch_size": 4}
KINDS = ("baseline", "ripple", "hydra")
SIDES = (32, 64, 128, 256, 512)
# (side, model): the least that dense's training step may take over it on a CPU
PROMISED = {(256, "ripple"): 2.0, (256, "hydra"): 1.4, (512, "ripple"): 4.0, (512, "hydra"): 4.0}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("direction", [speed.FORWARD, speed.TRAINING])
def test_models_beside_dense(benchmark: Any, side: int, direction: str) -> None:
    models = {kind: Settings(attention_type=kind, **SIZE) for kind in KINDS}
    batch = 8 if WHERE.type == "cuda" else 1
    rows = speed.speeds(models, [side], WHERE, batch=batch, directions=[direction], seconds=4.0, least=3)
    dense = next(row.ms for row in rows if row.what == "baseline")
    for row in rows:
        print(f"\n{side} pixels, {row.tokens} tokens, {direction}, {row.what}: {row.ms:.1f} ms, ", end="")
        print(f"{row.images_per_second:.2f} images a second, dense takes {dense / row.ms:.2f} times as long", end="")
        benchmark.extra_info[row.what] = {"ms": row.ms, "images_per_second": row.images_per_second, "ratio": dense / row.ms}
        least = PROMISED.get((side, row.what))
        if WHERE.type == "cpu" and direction == speed.TRAINING and least:
            assert dense / row.ms > least, row
    call = speed.step(models["ripple"], (side, 100, 3), batch, WHERE, direction)
    benchmark.pedantic(call, rounds=1)
