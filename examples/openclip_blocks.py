"""What each residual block of triton_attn.nn costs beside OpenCLIP's own, measured here.

    python examples/openclip_blocks.py [--tokens 197 1024 4096] [--batch 1] [--rounds 10] [--backward]

A table for each number of tokens: time, speed-up over the standard block, memory (on a GPU), parameters. Accuracy is no part of it:
a block that computes another function has to be trained first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from triton_attn.integrations.block_benchmark import benchmark_attention_blocks

GROWTH = {"standard": "N^2", "parallel": "N^2", "linear": "N", "deepnorm": "N^2", "sparse": "N K", "subln": "N^2"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 1024, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--backward", action="store_true")
    chosen = parser.parse_args(argv)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
