"""Which way does the camera pan? Blocks of each mechanism learn it from patches of two photographs, beside dense attention.

    pip install 'triton-attn[examples]'     # scikit-learn, whose package has the photographs: nothing is fetched afterwards
    python examples/hierarchical_video.py [--steps 800] [--mechanisms dense,streamed] [--memory]

A clip is three frames of 32 x 32 pixels that pan over a photograph by one patch of 8 x 8 a frame: left, right, up or down. Training
clips come from the left 60 % of the photographs, test clips from the rest. "dense", "strided" and "local_global" see a clip as one
sequence of 48 tokens. "streamed" sees one frame at a time: a strided block, a local-global block, then cross-memory blocks whose
memory is the patches of the frames before. Prints accuracy and time of each; with --memory, instead, the memory that one block
keeps for its backward pass, at 1k to 64k tokens.
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
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from triton_attn.nn import HierarchicalAttentionBlock

FRAMES, SIDE, PATCH, DIM, HEADS = 3, 32, 8, 64, 2
PLACES = (SIDE // PATCH) ** 2  # tokens of a frame
WAYS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}  # (rows, columns)
TRAINED = 0.6  # this share of a photograph's columns is for training
# attention_type and options of each block
STACKS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "dense": [("dense", {})] * 2,
    "strided": [("strided", {"stride": 2}), ("strided", {"stride": 2, "phase": 1})],
    "local_global": [("local_global", {"local_window": 2 * PLACES + 8})] * 2,
    "streamed": [("cross_memory", {}), ("strided", {"stride": 2}), ("local_global", {"local_window": 8})],
}
SIZES, REMEMBERED = (1024, 4096, 16384, 65536), 256


class Clips:
    """Clips of photographs, and which way they pan."""

    def __init__(self) -> None:
        photographs = [torch.from_numpy(photograph.copy()) for photograph in load_sample_images().images]
        self.photographs = [photograph.permute(2, 0, 1).float() for photograph in photographs]

    def draw(self, count: int, train: bool) -> tuple[Tensor, Tensor]:
        """Patches (count, FRAMES, PLACES, 3 PATCH^2), each of mean 0 and about unit variance, and ways (count,)."""
        ways = torch.randint(len(WAYS), (count,))
        frames = torch.stack([self._pan(list(WAYS.values())[way], train) for way in ways.tolist()])
        patches = frames.unfold(3, PATCH, PATCH).unfold(4, PATCH, PATCH).permute(0, 1, 3, 4, 2, 5, 6).flatten(4).flatten(2, 3)
        patches = patches - patches.mean(-1, keepdim=True)
        return patches / (patches.std(-1, keepdim=True) + 5.0), ways

    def _pan(self, way: tuple[int, int], train: bool) -> Tensor:
        photograph = self.photographs[int(torch.randint(len(self.photographs), ()))]
        height, width = photograph.shape[1:]
        border = int(TRAINED * width)
        low, high = (0, border) if train else (border, width)
        # the corner of the first frame, such that all frames lie inside
        ends = [(FRAMES - 1) * PATCH * step for step in way]
        rows, columns = (
            (max(0, -end) + start, stop - SIDE - max(0, end)) for end, start, stop in zip(ends, (0, low), (height, high), strict=True)
        )
        top, left = (int(torch.randint(start, stop + 1, ())) for start, stop in (rows, columns))
        corners = [(top + t * PATCH * way[0], left + t * PATCH * way[1]) for t in range(FRAMES)]
        return torch.stack([photograph[:, y : y + SIDE, x : x + SIDE] for y, x in corners])


class Panning(nn.Module):
    """Patches to the way that the camera pans, read off the last frame."""

    places: Tensor

    def __init__(self, stack: Sequence[tuple[str, dict[str, Any]]]) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH**2, DIM)
        # the rows and columns themselves: how far apart two patches lie is then linear in what attention adds to a token
        side = torch.linspace(-1.0, 1.0, SIDE // PATCH)
        self.register_buffer("places", torch.cartesian_prod(side, side))
        self.place = nn.Linear(2, DIM, bias=False)
        self.time = nn.Parameter(torch.randn(FRAMES, 1, DIM) / 2)
        self.norm = nn.LayerNorm(DIM)
        self.blocks = nn.ModuleList(HierarchicalAttentionBlock(DIM, HEADS, kind, dropout=0.0, **options) for kind, options in stack)
        self.head = nn.Linear(DIM, len(WAYS))
        self.streamed = any(kind == "cross_memory" for kind, _ in stack)
        with torch.no_grad():  # what looks alike finds each other from the start: half the steps
            for block in self.blocks:
                attention: Any = block.attention
                attention.k_proj.weight.copy_(attention.q_proj.weight.mul_(2.0))

    def forward(self, patches: Tensor) -> Tensor:
        x = self.norm(self.embed(patches) + self.place(self.places) + self.time)
        if not self.streamed:
            x = x.flatten(1, 2)
            for block in self.blocks:
                x = block(x)
            return self.head(x[:, -PLACES:].mean(1))  # type: ignore[no-any-return]
        memory: Tensor | None = None  # the first frame is its own
        for frame in x.unbind(1):
            seen = frame
            for block in self.blocks:
                seen = block(seen, memory) if block.attention_type == "cross_memory" else block(seen)
            memory = frame if memory is None else torch.cat((memory, frame), 1)
        return self.head(seen.mean(1))  # type: ignore[no-any-return]


def learn(name: str, clips: Clips, steps: int, batch: int) -> tuple[Panning, float]:
    """A trained model and the median milliseconds of a step."""
    torch.manual_seed(0)
    model = Panning(STACKS[name])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(steps, 2))
    taken = []
    for _ in range(steps):
        patches, ways = clips.draw(batch, train=True)
        start = time.perf_counter()
        loss = F.cross_entropy(model(patches), ways)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        taken.append(time.perf_counter() - start)
        schedule.step()
    return model.eval(), 1e3 * statistics.median(taken)


@torch.no_grad()
def accuracy(model: Panning, clips: Clips, count: int) -> float:
    torch.manual_seed(1)
    patches, ways = clips.draw(count, train=False)
    right: Tensor = model(patches).argmax(1) == ways
    return right.float().mean().item()


def kept(kind: str, n: int) -> float:
    """MiB of float32 that an attention layer, 768 wide with 12 heads, keeps for its backward pass, beside input and parameters."""
    block = HierarchicalAttentionBlock(768, 12, kind, dropout=0.0)
    x = torch.randn(1, n, 768, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in (x, *block.parameters())}  # these are kept anyway
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    memory = [torch.randn(1, REMEMBERED, 768)] if kind == "cross_memory" else []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block.attention(x, *memory)
    assert out.requires_grad
    return sum(storages.values()) / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="training steps (default 800)")
    parser.add_argument("--batch", type=int, default=32, help="clips in a step (default 32)")
    parser.add_argument("--test", type=int, default=1000, help="clips to test on (default 1000)")
    parser.add_argument("--mechanisms", default=",".join(STACKS), help=f"some of {','.join(STACKS)}")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--tokens", type=int, nargs="+", default=SIZES, help="lengths for --memory")
    args = parser.parse_args(argv)
    if args.memory:
        print("| attention | " + " | ".join(f"{n} tokens" for n in args.tokens) + " |")
        for kind in ("local_global", "cross_memory", "strided", "dense"):
            print(f"| {kind} | " + " | ".join(f"{kept(kind, n):.1f} MiB" for n in args.tokens) + " |", flush=True)
        return 0
    names = args.mechanisms.split(",")
    if not set(names) <= STACKS.keys():
        parser.error(f"--mechanisms: {args.mechanisms}; allowed: {','.join(STACKS)}")
    clips = Clips()
    print("| blocks | accuracy on test clips | milliseconds a training step |")
    for name in names:
        model, milliseconds = learn(name, clips, args.steps, args.batch)
        print(f"| {name} | {100 * accuracy(model, clips, args.test):.1f} % | {milliseconds:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
