"""What each residual block of triton_attn.nn costs beside OpenCLIP's own, measured here.

    python examples/openclip_blocks.py [--tokens 197 1024 4096] [--batch 1] [--rounds 10] [--backward]
    python examples/openclip_blocks.py --memory 80 [--towers ViT-B-16 ViT-L-14 ViT-H-14] [--dtype bf16] [--checkpointing]

A table for each number of tokens: time, speed-up over the standard block, memory (on a GPU), parameters. Accuracy is no part of it:
a block that computes another function has to be trained first.

With --memory a table for each image tower instead: what a training step (forward, backward, AdamW) holds on 32 images, and on how many
images it fits into so many GB. It is counted on tensors that have shapes and no numbers, with the kernels of a GPU, and needs no GPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from triton_attn.integrations.block_benchmark import benchmark_attention_blocks
from triton_attn.nn.enhanced_transformer import BLOCK_TYPES

GROWTH = {"standard": "N^2", "parallel": "N^2", "linear": "N", "deepnorm": "N^2", "sparse": "N K", "subln": "N^2"}

IMAGES = 32


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 1024, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--memory", type=float, help="GB of a GPU: count memory, time nothing")
    parser.add_argument("--towers", nargs="+", default=["ViT-B-16", "ViT-L-14", "ViT-H-14"])
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--checkpointing", action="store_true")
    chosen = parser.parse_args(argv)
    if chosen.memory is not None:
        for tower in chosen.towers:
            print_memory(tower, chosen.memory, chosen.dtype, chosen.checkpointing)
        return 0
    for tokens in chosen.tokens:
        found = benchmark_attention_blocks(
            chosen.width, chosen.heads, tokens, chosen.batch, num_warmup=2, num_iterations=chosen.rounds, backward=chosen.backward
        )
        print(f"\n{chosen.batch} x {tokens} tokens, width {chosen.width}, {'forward + backward' if chosen.backward else 'forward'}\n")
        print("| block | ms | speed-up | peak MB | parameters | attention grows as |")
        print("|---|---|---|---|---|---|")
        for kind, row in found.items():
            memory = "not measured" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}"
            cells = (kind, f"{row['avg_time_ms']:.1f}", f"{row['speedup']:.2f}", memory, f"{row['parameters']:,}", GROWTH[kind])
            print(f"| {' | '.join(cells)} |")
    return 0


def print_memory(tower: str, memory: float, dtype: str, checkpointing: bool) -> None:
    from triton_attn.capacity import TOWERS, TowerSetup, largest_batch, readable, tower_peak

    size = TOWERS[tower]
    saving = ", checkpointing" if checkpointing else ""
    print(f"\n{tower}, {size.tokens} tokens, width {size.width}, {size.layers} blocks, {dtype}, AdamW{saving}\n")
    print(f"| block | {IMAGES} images | most images in {memory:g} GB |")
    print("|---|---|---|")
    for kind in BLOCK_TYPES:
        setup = TowerSetup(tower, kind, dtype, checkpointing=checkpointing)
        measure = functools.cache(tower_peak)  # the search starts at as many images
        best = largest_batch(setup, 1e9 * memory, measure=measure)
        print(f"| {kind} | {readable(measure(setup, IMAGES).bytes)} | {f'{best.batch:,}' if best else 'none'} |", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
