"""AA-CLIP's losses: where the patches of an image are nearer to the text of damage, and whether the masks say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import ArgumentError

NAME = "train-clip-adapter"
TEMPERATURE, FOCUS, SMOOTH = 100.0, 2.0, 1e-5


def similarity_map(features: Tensor, states: Tensor, size: tuple[int, int]) -> Tensor:
    """softmax over states of 100 <patch, state>, enlarged to the image: (B, M, D), (B, D, 2) -> (B, 2, height, width).

    Raises:
        ArgumentError: M is no square number.
    """
    side = math.isqrt(features.shape[1])
    if side * side != features.shape[1]:
        raise ArgumentError(NAME, "features", f"have {features.shape[1]} patches; allowed: a square number")
    scores = TEMPERATURE * (features @ states)
    grid = torch.unflatten(scores.mT, 2, (side, side))
    return F.interpolate(grid, size, mode="bilinear", align_corners=True).softmax(1)


def focal_loss(shares: Tensor, mask: Tensor) -> Tensor:
    """mean of -(1 - p)^2 log p, p the share of the right state; (B, 2, H, W), (B, H, W) of 0 and 1."""
    p = shares[:, 1] * mask + shares[:, 0] * (1 - mask)
    p = p * (1 - SMOOTH) + (1 - p) * SMOOTH + SMOOTH  # so that no logarithm is infinite
    return -((1 - p).abs() ** FOCUS * p.log()).mean()


def dice_loss(share: Tensor, mask: Tensor) -> Tensor:
    """1 - mean over images of (2 sum(share mask) + 1) / (sum(share) + sum(mask) + 1)."""
    both, either = (share * mask).flatten(1).sum(1), share.flatten(1).sum(1) + mask.flatten(1).sum(1)
    return 1 - ((2 * both + 1) / (either + 1)).mean()


def segmentation_loss(shares: Tensor, mask: Tensor) -> Tensor:
    """focal + dice of what is whole + dice of what is not."""
    return focal_loss(shares, mask) + dice_loss(shares[:, 0], 1 - mask) + dice_loss(shares[:, 1], mask)


def orthogonal_loss(states: Tensor) -> Tensor:
    """(mean over images of <normal, abnormal>)^2."""
    return (states[:, :, 0] * states[:, :, 1]).sum(1).mean() ** 2


def level_loss(levels: Sequence[Tensor], states: Tensor, mask: Tensor, level_reduce: str) -> Tensor:
    """segmentation_loss of every level, summed; "last": of the last level alone, which is what the original's stage 1 computes."""
    chosen = levels[-1:] if level_reduce == "last" else levels
    size: Any = tuple(mask.shape[1:])
    return torch.stack([segmentation_loss(similarity_map(level, states, size), mask) for level in chosen]).sum()


def text_loss(levels: Sequence[Tensor], states: Tensor, mask: Tensor, level_reduce: str, norm_weight: float) -> Tensor:
    """Stage 1: level_loss + norm_weight orthogonal_loss, the latter once."""
    return level_loss(levels, states, mask, level_reduce) + norm_weight * orthogonal_loss(states)


def image_loss(levels: Sequence[Tensor], detected: Tensor, states: Tensor, mask: Tensor, label: Tensor, level_reduce: str) -> Tensor:
    """Stage 2: cross entropy of <image, state> with whether there is a defect, + level_loss."""
    scores = (detected[:, None] @ states)[:, 0]
    return F.cross_entropy(scores, label) + level_loss(levels, states, mask, level_reduce)
