"""LongNet on real text, beside the same model with dense attention: bytes of the standard library's own sources.

    python examples/longnet_text.py [--minutes 2] [--length 1024]

Both models have the same parameters, start from the same weights and take turns for the same time. Prints bits per byte before and after
on files that neither has seen, steps, milliseconds a step, and a continuation.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn.models import LongNet

SIZES: dict[str, Any] = {"num_tokens": 256, "dim": 128, "depth": 4, "heads": 4}


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to learn from, and those of every tenth file, kept apart."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        parts[number % 10 == 9].append(path.read_bytes())
    train, test = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8).long() for part in parts)
    return train, test


def stretches(text: Tensor, starts: Sequence[int], length: int) -> Tensor:
    return torch.stack([text[start : start + length + 1] for start in starts])


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokens: Tensor) -> float:
    model.eval()
    losses = [loss_of(model, row[None]).item() for row in tokens]
    model.train()
    return sum(losses) / len(losses) / math.log(2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="training time of each model")
    parser.add_argument("--length", type=int, default=1024, help="bytes of a training stretch")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--test", type=int, default=16, help="stretches that are kept apart")
    parser.add_argument("--generate", type=int, default=80, help="bytes to write")
    chosen = parser.parse_args(argv)
    length = chosen.length

    torch.manual_seed(0)
    draw = random.Random(0)
    train, test = texts()
    kept = stretches(test, torch.linspace(0, len(test) - length - 1, chosen.test).long().tolist(), length)
    lengths = (max(length // 8, 1), max(length // 2, 1), length)
    models = {"dilated": LongNet(**SIZES, segment_lengths=lengths, dilation_rates=(1, 2, 4))}
    models["dense"] = LongNet(**SIZES, segment_lengths=None, dilation_rates=None)
    models["dense"].load_state_dict(copy.deepcopy(models["dilated"].state_dict()))
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01) for name, model in models.items()}
    before = {name: bits_per_byte(model, kept) for name, model in models.items()}
    spent: dict[str, list[float]] = {name: [] for name in models}
    while min(sum(times) for times in spent.values()) < 60 * chosen.minutes:
        name = min(models, key=lambda name: sum(spent[name]))
        start = time.perf_counter()
        loss = loss_of(models[name], stretches(train, [draw.randrange(len(train) - length) for _ in range(chosen.batch)], length))
        optimizers[name].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
        optimizers[name].step()
        spent[name].append(time.perf_counter() - start)

    print(
        f"{len(train):,} bytes to learn from, {chosen.minutes} minutes each, stretches of {length}, segments {lengths}, rates (1, 2, 4)\n"
    )
    print("| attention | parameters | steps | ms a step | bits per byte before | after |")
    print("|---|---|---|---|---|---|")
    for name, model in models.items():
        size, times = sum(x.numel() for x in model.parameters()), spent[name]
        cells = (
            name,
            f"{size:,}",
            f"{len(times)}",
            f"{1e3 * sum(times) / len(times):.0f}",
            f"{before[name]:.3f}",
            f"{bits_per_byte(model, kept):.3f}",
        )
        print(f"| {' | '.join(cells)} |")
    prompt = kept[:1, : length // 4]
    written = models["dilated"].eval().generate(prompt, chosen.generate, temperature=0.7, generator=torch.Generator().manual_seed(0))
    told, more = (bytes(part.tolist()).decode(errors="replace") for part in (prompt[0, -60:], written[0, prompt.shape[1] :]))
    print(f"\n{told}[{more}]")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
