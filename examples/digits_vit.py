"""Vision transformers on real scans: scikit-learn's 1,797 handwritten digits, one model for each attention, same data, seeds and steps.

    python examples/digits_vit.py [--types ripple hydra baseline] [--epochs 30] [--seeds 3]

Prints test accuracy (mean and spread over the seeds), milliseconds a step, parameters. About a minute for each type and seed on a
core that has nothing else to do. `triton-attn vit compare` does the same with checkpoints, a log and memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from triton_attn.models import VisionTransformer

TEST, BATCH, SIDE = 360, 32, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "strided_attention": {"attention_options": {"stride": 2, "include_self": True}},
    "local_global_attention": {"attention_options": {"window": 4, "global_tokens": 1}},
    "sparse_attention": {"attention_options": {"keep_ratio": 0.5}},
    "dilated_attention": {"attention_options": {"segment_lengths": (8, 17), "dilation_rates": (1, 2)}},
    "ripple": {"ripple_stages": 1},  # 4 x 4 patches: two stages would leave one cell
}


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 16, 16) in [-1, 1], scans of 8 x 8 enlarged, and what each shows.

    A patch of 2 x 2 pixels of the scan would leave its LayerNorm four numbers; enlarged, patches know their neighbours' edges.
    """
    data: Any = load_digits()
    scans = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(scans, size=(SIDE, SIDE), mode="bilinear"), torch.tensor(data.target)


def shifted(images: Tensor) -> Tensor:
    """Each moved by up to two pixels, which a digit does not mind."""
    padded = F.pad(images, (2, 2, 2, 2), value=-1.0)
    down, right = torch.randint(5, (2, len(images)))
    rows, columns = (start[:, None] + torch.arange(SIDE) for start in (down, right))
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(kind: str, seed: int, epochs: int) -> tuple[float, float, int]:
    """(share of the test digits that are right, milliseconds a step, parameters)."""
    images, labels = digits()
    torch.manual_seed(seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, rest = order[:TEST], order[TEST:]
    size: dict[str, Any] = {"img_size": SIDE, "patch_size": 4, "num_classes": 10, "channels": 1}
    model = VisionTransformer(
        **size,
        dim=64,
        depth=4,
        heads=4,
        mlp_dim=128,
        dim_head=16,
        attention_type=kind,
        dropout=0.0,
        emb_dropout=0.0,
        **OPTIONS.get(kind, {}),
    )
    steps = epochs * (len(rest) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    times = []
    for step in range(steps):
        if step % (len(rest) // BATCH) == 0:
            shuffled = rest[torch.randperm(len(rest))]
        chosen = shuffled[step % (len(rest) // BATCH) * BATCH :][:BATCH]
        start = time.perf_counter()
        loss = F.cross_entropy(model(shifted(images[chosen])), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - start)
    model.eval()
    with torch.no_grad():
        right = model(images[test]).argmax(1).eq(labels[test]).float().mean().item()
    return right, 1e3 * statistics.median(times), sum(x.numel() for x in model.parameters())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["ripple", "hydra", "baseline"])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args(argv)
    print("| attention | test accuracy | spread | ms a step | parameters |")
    print("|---|---|---|---|---|")
    for kind in chosen.types:
        runs = [train(kind, seed, chosen.epochs) for seed in range(chosen.seeds)]
        rights = [right for right, _, _ in runs]
        spread = statistics.pstdev(rights)
        took = statistics.median(run[1] for run in runs)
        print(f"| {kind} | {100 * statistics.mean(rights):.1f} % | {100 * spread:.1f} | {took:.1f} | {runs[0][2]:,} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
