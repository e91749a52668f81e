"""How many images a GPU can train OpenCLIP's image towers on, with each residual block: memory counted as for LongNet's step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError
from triton_attn.capacity.memory import count
from triton_attn.capacity.training import OPTIMIZERS, Step, needs_torchao, optimizer_of
from triton_attn.nn.enhanced_transformer import BLOCK_TYPES, EnhancedTransformer

NAME = "capacity"


class TowerSize(NamedTuple):
    """Of an image tower: pixels of a side, pixels of a patch's side, width, blocks, heads, width of its features."""

    image: int
    patch: int
    width: int
    layers: int
    heads: int
    features: int

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image // self.patch) ** 2 + 1


# open_clip's model_configs of these names
TOWERS = {
    "ViT-B-16": TowerSize(224, 16, 768, 12, 12, 512),
    "ViT-L-14": TowerSize(224, 14, 1024, 24, 16, 768),
    "ViT-H-14": TowerSize(224, 14, 1280, 32, 16, 1024),
    "tiny": TowerSize(32, 8, 32, 2, 2, 16),
}
TOWER_DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
FIRST_BATCH, LARGEST_BATCH = 32, 1 << 20


@dataclass(frozen=True)
class TowerSetup:
    """What is trained, and how.

    `tower`: a name of TOWERS. `block_type`: of `triton_attn.nn.EnhancedTransformer`. `dtype`: "bf16" (all of it) or "float32".
    `optimizer`: "adamw", "adamw8bit" (torchao's) or "none". `checkpointing`: blocks are computed again in the backward pass.
    """

    tower: str = "ViT-B-16"
    block_type: str = "standard"
    dtype: str = "bf16"
    optimizer: str = "adamw"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        allowed: dict[str, Iterable[str]] = {"tower": TOWERS, "block_type": BLOCK_TYPES, "dtype": TOWER_DTYPES, "optimizer": OPTIMIZERS}
        for name, known in allowed.items():
            if getattr(self, name) not in tuple(known):
                raise ArgumentError(NAME, name, f"is {getattr(self, name)!r}; allowed: {', '.join(known)}")
        needs_torchao(self.optimizer)


@dataclass(frozen=True)
class TowerPeak:
    """Bytes at the worst moment of a training step on so many images, and how they divide."""

    setup: TowerSetup
    batch: int
    bytes: int
    parts: dict[str, int] = field(default_factory=dict)


class ImageTower(nn.Module):
    """OpenCLIP's VisionTransformer with its parameters: (B, 3, image, image) to (B, features)."""

    def __init__(self, size: TowerSize, block_type: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, size.width, size.patch, size.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(size.width))
        self.positional_embedding = nn.Parameter(torch.randn(size.tokens, size.width))
        self.ln_pre = nn.LayerNorm(size.width)
        self.transformer = EnhancedTransformer(size.width, size.layers, size.heads, block_type=block_type)
        self.ln_post = nn.LayerNorm(size.width)
        self.proj = nn.Parameter(size.width**-0.5 * torch.randn(size.width, size.features))

    def forward(self, images: Tensor) -> Tensor:
        """Features of the class token."""
        patches = self.conv1(images).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(patches.shape[0], 1, -1), patches], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        out: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return out


def tower_step(setup: TowerSetup, batch: int) -> Step:
    """The tower, its optimiser and one step on so many images. The loss is a mean of squares: other towers and losses are not in it."""
    size, dtype = TOWERS[setup.tower], TOWER_DTYPES[setup.dtype]
    with _made_in(dtype):
        tower = ImageTower(size, setup.block_type)
    tower.transformer.set_grad_checkpointing(setup.checkpointing)
    images = torch.randn(batch, 3, size.image, size.image, dtype=dtype)
    optimizer = optimizer_of(setup.optimizer, tower)

    def train() -> None:
        torch.autograd.backward(tower(images).square().mean())
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return Step((tower,), optimizer, train, (images,))


@contextlib.contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are made in this dtype: tensors without numbers cannot be moved to it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tower_peak(setup: TowerSetup, batch: int) -> TowerPeak:
    """The peak of a step on so many images, by its shapes alone; kernels are those of a GPU.

    Raises:
        ArgumentError: batch is not a whole number above 0.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ArgumentError(NAME, "batch", f"is {batch!r}; allowed: 1 and more")
    return TowerPeak(setup, batch, *count(lambda: tower_step(setup, batch)))


def largest_batch(setup: TowerSetup, memory: float, *, measure: Callable[[TowerSetup, int], TowerPeak] = tower_peak) -> TowerPeak | None:
    """The step on most images that fits into so many bytes, exactly: one image more does not; None if not even one does.

    Memory grows along a line from some batch on, so that a few steps are counted and no ladder of them.
    """
    first = measure(setup, FIRST_BATCH)
    low, high = (first, None) if first.bytes <= memory else (measure(setup, 1), first)
    if low.bytes > memory:
        return None
    slope = 0.0
    while high is None or high.batch - low.batch > 1:
        if high is None and low.batch >= LARGEST_BATCH:
            return low
        aim = low.batch + int((memory - low.bytes) / slope) if slope else 2 * low.batch
        aim = max(aim, low.batch + 1)
        found = measure(setup, aim if high is None else min(aim, high.batch - 1))
        slope = max((found.bytes - low.bytes) / (found.batch - low.batch), 1.0)
        if found.bytes <= memory:
            low = found
        else:
            high = found
    return low
