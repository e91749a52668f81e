"""Images with labels, split into those to learn from and those to test with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TESTED = 360


@dataclass(frozen=True)
class Images:
    """(N, channels, side, side) in [-1, 1] and (N,) classes, of both parts."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def side(self) -> int:
        return self.train.shape[2]


def digits() -> Images:
    """scikit-learn's 1,797 scans of 8 x 8; the same 360 are always the test.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message says how to.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'triton-attn[examples]'") from None
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    classes = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, rest = order[:TESTED], order[TESTED:]
    return Images(images[rest], classes[rest], images[test], classes[test], 10)


DATASETS = {"digits": digits}


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each moved by up to one pixel in both directions, -1 where nothing was."""
    n, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(3, (2, n, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
