"""Images with labels, split into those to learn from and those to test with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import ArgumentError
from triton_attn.vit import formats

TESTED = 360


@dataclass(frozen=True)
class Images:
    """(N, channels, side, side) bytes, and (N,) classes, of both parts; mean and deviation of a channel in 0 to 1."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    mean: tuple[float, ...] = (0.5,)
    deviation: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        for part, pixels, labels in (("train", self.train, self.train_labels), ("test", self.test, self.test_labels)):
            if len(pixels) != len(labels) or not len(labels):
                raise ArgumentError("vit", "dataset", f"has {len(pixels)} images and {len(labels)} labels in {part}; they must be as many")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                found = low if low < 0 else high
                raise ArgumentError("vit", "dataset", f"has class {found} in {part}; allowed: 0 to {self.classes - 1}")

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def side(self) -> int:
        return self.train.shape[2]

    def ready(self, pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """(pixels / 255 - mean) / deviation, on the device."""
        mean, deviation = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (self.mean, self.deviation))
        return (pixels.to(device).float() / 255 - mean) / deviation


def digits(folder: Path | None = None) -> Images:
    """scikit-learn's 1,797 scans of 8 x 8, enlarged to 16 x 16; the same 360 are always the test. No folder is needed.

    Enlarged, because a model of 16 patches would have 2 x 2 pixels in each: the LayerNorm of four numbers leaves little of them.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message says how to.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'triton-attn[examples]'") from None
    pixels, labels = load_digits(return_X_y=True)
    scans = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(scans, size=(16, 16), mode="bilinear").round().to(torch.uint8)
    classes = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, rest = order[:TESTED], order[TESTED:]
    return Images(images[rest], classes[rest], images[test], classes[test], 10)


def cifar100(folder: Path | None = None) -> Images:
    """The 60,000 images of 32 x 32 of `cifar-100-python`, or of a folder that holds it.

    Raises:
        ArgumentError: no folder is given, or a file holds something else; the message names it.
        FileNotFoundError: a file is missing; the message says which, and where to get it.
    """
    parts = formats.cifar100(_needed(folder, "cifar100"))
    return Images(*parts, mean=(0.5071, 0.4867, 0.4408), deviation=(0.2675, 0.2565, 0.2761))


def tiny_imagenet(folder: Path | None = None) -> Images:
    """The 110,000 labelled images of 64 x 64 of `tiny-imagenet-200`, or of a folder that holds it; the test is its `val`.

    Raises:
        ArgumentError: no folder is given, or a file holds something else; the message names it.
        FileNotFoundError: a file is missing; the message says which, and where to get it.
        ModuleNotFoundError: Pillow is not installed; the message says how to.
    """
    parts = formats.tiny_imagenet(_needed(folder, "tiny_imagenet"))
    return Images(*parts, mean=(0.4802, 0.4481, 0.3975), deviation=(0.2770, 0.2691, 0.2821))


def _needed(folder: Path | None, dataset: str) -> Path:
    if folder is None:
        raise ArgumentError("vit", "data_dir", f"is not given; allowed: the folder that holds {dataset}")
    return folder


DATASETS: dict[str, Callable[[Path | None], Images]] = {"digits": digits, "cifar100": cifar100, "tiny_imagenet": tiny_imagenet}
