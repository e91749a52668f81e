"""A small Mamba byte language model on real text, beside a dense transformer of equal size: the standard library's own sources.

    python examples/mamba_text.py [--minutes 3] [--threads 2]

Both train for the same time on the same bytes, taking turns. Prints bits per byte on files that neither has seen, a continuation that
Mamba writes token by token with a state of constant size, and how far that is from the parallel form.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn.nn import MambaLayer, MultiheadAttention

BYTES = 256
WIDTH, DEPTH, HEADS = 128, 4, 4


class MambaBlock(nn.Module):
    """x + Mamba(norm(x)), twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.mixers = nn.ModuleList(MambaLayer(WIDTH, dropout=0.0) for _ in range(2))

    def parts(self, caches: Any) -> Iterator[tuple[nn.Module, MambaLayer, Any]]:
        for norm, mixer, cache in zip(self.norms, self.mixers, caches, strict=True):
            assert isinstance(mixer, MambaLayer)
            yield norm, mixer, cache

    def forward(self, x: Tensor, caches: Any = (None, None)) -> Tensor:
        for norm, mixer, cache in self.parts(caches):
            x = x + mixer(norm(x), cache=cache)
        return x

    def step(self, x: Tensor, caches: Any) -> Tensor:
        for norm, mixer, cache in self.parts(caches):
            x = x + mixer.step(norm(x), *cache)[0]
        return x


class DenseBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), five times as wide: then it has a Mamba block's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.attention = MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 5 * WIDTH), nn.GELU(), nn.Linear(5 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attention(normed, normed, normed, need_weights=False, attn_mask=causal, is_causal=True)[0]
        x = x + self.feed_forward(self.norms[1](x))
        return x


class Model(nn.Module):
    """Bytes in, the logits of the next byte out."""

    def __init__(self, mamba: bool, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        # Mamba knows the order of tokens by itself
        self.positions = None if mamba else nn.Parameter(torch.zeros(length, WIDTH))
        self.blocks = nn.ModuleList(MambaBlock() if mamba else DenseBlock() for _ in range(DEPTH))
        self.norm = nn.RMSNorm(WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x if self.positions is None else x + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def caches(self, batch: int) -> list[Any]:
        return [[mixer.allocate_inference_cache(batch) for _, mixer, _ in block.parts((None, None))] for block in self.mamba_blocks()]

    def mamba_blocks(self) -> list[MambaBlock]:
        return [block for block in self.blocks if isinstance(block, MambaBlock)]

    @torch.no_grad()
    def read(self, tokens: Tensor, caches: list[Any]) -> Tensor:
        """The logits after a prompt, read in parallel; the caches remember it."""
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return F.linear(self.norm(x[:, -1]), self.embedding.weight)

    @torch.no_grad()
    def step(self, token: Tensor, caches: list[Any]) -> Tensor:
        """The logits after one more token, (B,)."""
        x = self.embedding(token[:, None])
        for block, cache in zip(self.mamba_blocks(), caches, strict=True):
            x = block.step(x, cache)
        return F.linear(self.norm(x[:, 0]), self.embedding.weight)


class Sources:
    """The standard library's Python files, every tenth kept apart."""

    def __init__(self, files: int | None = None) -> None:
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for number, path in enumerate(paths):
            parts[number % 10 == 9].append(path.read_bytes())
        self.train, self.test = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8).long() for part in parts)
        self.random = random.Random(0)

    def batch(self, size: int, length: int) -> Tensor:
        starts = [self.random.randrange(len(self.train) - length) for _ in range(size)]
        return torch.stack([self.train[start : start + length + 1] for start in starts])

    def held_out(self, count: int, length: int) -> Tensor:
        """Stretches spread evenly over the files that are kept apart."""
        starts = torch.linspace(0, len(self.test) - length - 1, count).long().tolist()
        return torch.stack([self.test[start : start + length + 1] for start in starts])


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokens: Tensor) -> float:
    losses = [loss_of(model, tokens[i : i + 4]).item() for i in range(0, len(tokens), 4)]
    return sum(losses) / len(losses) / math.log(2)


def generate(model: Model, prompt: Tensor, count: int) -> tuple[Tensor, float, int]:
    """(the likeliest continuation, how far its logits are from the parallel form's, bytes of state)."""
    caches = model.caches(1)
    logits = model.read(prompt, caches)
    found, seen = [], []
    for _ in range(count):
        seen.append(logits)
        found.append(logits.argmax(-1))
        logits = model.step(found[-1], caches)
    tokens = torch.stack(found, 1)
    with torch.no_grad():
        parallel = model(torch.cat((prompt, tokens), 1))[:, prompt.shape[1] - 1 : -1]
    apart = (torch.stack(seen, 1) - parallel).abs().max().item()
    kept = sum(state.numel() * state.element_size() for block in caches for cache in block for state in cache)
    return tokens, apart, kept


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="training time of each model (default 3)")
    parser.add_argument("--length", type=int, default=512, help="bytes of a training stretch (default 512)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--test", type=int, default=32, help="stretches that are kept apart (default 32)")
    parser.add_argument("--files", type=int, help="how many of the sources (default all)")
    parser.add_argument("--generate", type=int, default=200, help="bytes to write (default 200)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sources = Sources(args.files)
    test = sources.held_out(args.test, args.length)
    models = {"mamba": Model(True, args.length), "dense": Model(False, args.length)}
    optimisers = {name: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01) for name, model in models.items()}
    spent, steps = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0)
    print(f"{len(sources.train)} bytes to learn from, {len(sources.test)} kept apart, {args.minutes} minutes each")
    while min(spent.values()) < 60 * args.minutes:
        name = min(spent, key=lambda name: spent[name])
        start = time.perf_counter()
        loss = loss_of(models[name], sources.batch(args.batch, args.length))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
        optimisers[name].step()
        optimisers[name].zero_grad()
        spent[name] += time.perf_counter() - start
        steps[name] += 1
    print("\n| model | parameters | steps | bits per byte |\n|---|---|---|---|")
    for name, model in models.items():
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"| {name} | {size} | {steps[name]} | {bits_per_byte(model.eval(), test):.3f} |")

    prompt = test[0, : args.length // 2][None]
    tokens, apart, kept = generate(models["mamba"], prompt, args.generate)
    print(f"\nstate of {kept} bytes at any length; logits step by step and in parallel differ by {apart:.1e} at most")
    print(f"\n{bytes(prompt[0, -80:].tolist()).decode(errors='replace')}[{bytes(tokens[0].tolist()).decode(errors='replace')}]")
    return 0 if apart < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
