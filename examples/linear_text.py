"""A small causal byte model on the standard library's sources: linear, Performer and dense attention, same parameters, equal steps."""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn import attention, linear_attention, linear_attention_step, orthogonal_projection, performer_attention

KINDS = ("linear", "performer", "dense")
HEADS = 4


class Layer(nn.Module):
    projection: Tensor

    def __init__(self, kind: str, dim: int, features: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix = nn.Conv1d(dim, dim, 4, groups=dim)  # the last four tokens: it stands for positions
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.register_buffer("projection", orthogonal_projection(features, dim // HEADS, generator=torch.Generator().manual_seed(0)))

    def heads(self, x: Tensor) -> list[Tensor]:
        """(B, 3 + N, dim) -> three of (B, H, N, D)."""
        b, n, dim = x.shape
        mixed = self.mix(x.mT).mT
        return [part.view(b, n - 3, HEADS, dim // HEADS).transpose(1, 2) for part in self.qkv(mixed).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(F.pad(self.norm1(x), (0, 0, 3, 0)))
        if self.kind == "linear":
            out = linear_attention(query, key, value, causal=True)
        elif self.kind == "performer":
            out = performer_attention(query, key, value, self.projection, causal=True)
        else:
            out = attention(query, key, value, causal=True)
        assert isinstance(out, Tensor)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        after: Tensor = x + self.ffn(self.norm2(x))
        return after

    def step(self, x: Tensor, state: tuple[Tensor, tuple[Tensor, Tensor] | None]) -> tuple[Tensor, tuple[Tensor, tuple[Tensor, Tensor]]]:
        """One token of (B, 1, dim) after `state`: the last three normed tokens, and what linear attention carries."""
        window = torch.cat((state[0], self.norm1(x)), 1)
        query, key, value = (part[:, :, 0] for part in self.heads(window))
        out, carried = linear_attention_step(query, key, value, state[1])
        x = x + self.out(out.flatten(1)[:, None])
        return x + self.ffn(self.norm2(x)), (window[:, 1:], carried)


class Model(nn.Module):
    def __init__(self, kind: str, dim: int = 128, depth: int = 2, features: int = 64) -> None:
        super().__init__()
        self.dim = dim
        self.bytes = nn.Embedding(256, dim)
        self.layers = nn.ModuleList(Layer(kind, dim, features) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def step(self, token: Tensor, states: list[tuple[Tensor, tuple[Tensor, Tensor] | None]]) -> Tensor:
        """(B,) -> (B, 256); `states` is brought up to date."""
        x = self.bytes(token)[:, None]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            x, states[i] = layer.step(x, states[i])
        logits: Tensor = self.head(self.norm(x))[:, 0]
        return logits

    def start(self, batch: int = 1) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        return [(torch.zeros(batch, 3, self.dim), None) for _ in self.layers]


def sources(limit: int = 4_000_000) -> Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def loss(model: Model, text: Tensor, at: Tensor, tokens: int) -> Tensor:
    batch = torch.stack([text[i : i + tokens + 1] for i in at.tolist()])
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(kind: str, text: Tensor, steps: int, tokens: int, batch: int) -> tuple[Model, float]:
    """(the model, its bits per byte on the last tenth of the text, which it did not see)."""
    torch.manual_seed(0)
    model, cut = Model(kind), len(text) * 9 // 10
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    drawn = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, text, torch.randint(cut - tokens, (batch,), generator=drawn), tokens).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        kept = torch.linspace(cut, len(text) - tokens - 1, 32).long()
        return model, float(loss(model, text, kept, tokens)) / math.log(2)


def seconds(model: Model, text: Tensor, tokens: int) -> float:
    """The shorter of two training steps."""
    took = []
    for _ in range(2):
        begun = time.perf_counter()
        loss(model, text, torch.tensor([0]), tokens).backward()  # type: ignore[no-untyped-call]
        took.append(time.perf_counter() - begun)
    return min(took)


@torch.no_grad()
def generate(model: Model, prompt: bytes, count: int) -> tuple[bytes, float, int]:
    """(text, the largest difference of its logits from the parallel call's, bytes of state)."""
    states, seen, steps = model.start(), list(prompt), []
    for i in range(len(prompt) + count - 1):
        steps.append(model.step(torch.tensor([seen[i]]), states))
        if i + 1 == len(seen):
            seen.append(int(steps[-1].argmax()))
    apart = (torch.cat(steps) - model(torch.tensor([seen[:-1]]))[0]).abs().max()
    held = [tensor for window, carried in states for tensor in (window, *(carried or ()))]
    return bytes(seen), float(apart), sum(x.numel() * x.element_size() for x in held)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs=2, default=[512, 4096], help="at which a step is timed")
    given = parser.parse_args(arguments)
    text, models = sources(), {}
    short, long = given.lengths
    print(f"| attention | parameters | bits per byte | ms a step at {short} | at {long} |\n|---|---|---|---|---|")
    for kind in KINDS:
        model, bits = train(kind, text, given.steps, given.tokens, given.batch)
        models[kind] = model
        size = sum(x.numel() for x in model.parameters())
        times = [f"{1e3 * seconds(model, text, length):.0f}" for length in given.lengths]
        print(f"| {kind} | {size:,} | {bits:.3f} | {' | '.join(times)} |", flush=True)
    written, apart, held = generate(models["linear"], b"def __init__(self", 100)
    print(f"\nstate of {held} bytes at any length; logits step by step and in parallel differ by {apart:.1e} at most\n")
    print(written.decode(errors="replace"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
