"""Images changed in ways that leave what they show: drawn for the whole batch, done on the part that a process has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("none", "shift", "crop_flip", "randaugment")
_LARGEST_SEED = 2**31


def augmented(images: Tensor, kind: str, generator: torch.Generator, part: slice = slice(None)) -> Tensor:
    """(B, C, side, side) bytes, of which those in `part` come back changed. What is drawn does not depend on `part`.

    "shift" moves by up to an eighth of the side; "crop_flip" does that and mirrors every other one; "randaugment" does
    that and two operations of torchvision's RandAugment.

    Raises:
        ModuleNotFoundError: torchvision is not installed; the message says how to.
    """
    count, side = images.shape[0], images.shape[-1]
    if kind == "none":
        return images[part]
    by = max(1, side // 8)
    places = torch.randint(2 * by + 1, (2, count), generator=generator)[:, part]
    moved = shifted(images[part], places[0], places[1], by)
    if kind == "shift":
        return moved
    mirrored = torch.randint(2, (count,), generator=generator)[part]
    moved = torch.where(mirrored[:, None, None, None].bool(), moved.flip(-1), moved)
    if kind == "crop_flip":
        return moved
    seeds = torch.randint(_LARGEST_SEED, (count,), generator=generator)[part]
    return _randaugmented(moved, seeds)


def shifted(images: Tensor, down: Tensor, right: Tensor, by: int) -> Tensor:
    """Each moved by by - down rows and by - right columns, nothing (0) where no pixel was."""
    n, _, height, width = images.shape
    padded = F.pad(images, (by, by, by, by))
    rows, columns = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def _randaugmented(images: Tensor, seeds: Tensor) -> Tensor:
    try:
        from torchvision.transforms.v2 import RandAugment
    except (ImportError, RuntimeError) as missing:  # RuntimeError: one that was built for another torch
        said = f"randaugment is torchvision's, which cannot be imported ({missing}): install it, or give augment crop_flip"
        raise ModuleNotFoundError(said) from missing
    operation = RandAugment(num_ops=2, magnitude=9)
    changed = []
    # it draws from torch's own generator, which belongs to dropout
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds.tolist(), strict=True):
            torch.manual_seed(seed)
            changed.append(operation(image))
    return torch.stack(changed) if changed else images
