"""CIFAR-100 and Tiny ImageNet as they are published, read into (pixels, labels) of both parts and the number of classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from triton_attn import ArgumentError
from triton_attn.vit import pickled_arrays

Parts = tuple[Tensor, Tensor, Tensor, Tensor, int]
CIFAR, CIFAR_FROM = "cifar-100-python", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
TINY, TINY_FROM = "tiny-imagenet-200", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
CLASSES = {CIFAR: 100, TINY: 200}
SIDE = {CIFAR: 32, TINY: 64}


def cifar100(folder: Path) -> Parts:
    """`train` and `test`, pickles of {data: (N, 3072) bytes, fine_labels: N numbers}.

    Raises:
        ArgumentError: a file holds something else, or is cut off; the message names it.
        FileNotFoundError: a file is missing.
    """
    root = _inside(folder, CIFAR, "train", CIFAR_FROM)
    parts: list[Tensor] = []
    for name in ("train", "test"):
        path = _present(root / name, CIFAR_FROM)
        held = pickled_arrays.load(path)
        pixels, labels = held.get(b"data"), held.get(b"fine_labels")
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
            raise ArgumentError("vit", "dataset", f"{path} has no bytes of shape (N, 3072) under 'data'; allowed: CIFAR-100's own file")
        if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
            raise ArgumentError("vit", "dataset", f"{path} has no {len(pixels)} numbers under 'fine_labels'; allowed: CIFAR-100's own file")
        if labels and not 0 <= min(labels) <= max(labels) < CLASSES[CIFAR]:
            wrong = min(labels) if min(labels) < 0 else max(labels)
            raise ArgumentError("vit", "dataset", f"{path} has class {wrong}; allowed: 0 to {CLASSES[CIFAR] - 1}")
        parts += [torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), torch.tensor(labels)]
    train, train_labels, test, test_labels = parts
    return train, train_labels, test, test_labels, CLASSES[CIFAR]


def tiny_imagenet(folder: Path) -> Parts:
    """`wnids.txt`, `train/<id>/images/*.JPEG`, `val/images/*.JPEG` with `val/val_annotations.txt`.

    Raises:
        ArgumentError: there are other classes than `wnids.txt` names, or an image is broken; the message names it.
        FileNotFoundError: a file is missing.
        ModuleNotFoundError: Pillow is not installed.
    """
    root = _inside(folder, TINY, "wnids.txt", TINY_FROM)
    names = (root / "wnids.txt").read_text().split()
    if len(names) != CLASSES[TINY] or len(set(names)) != len(names):
        raise ArgumentError("vit", "dataset", f"{root / 'wnids.txt'} names {len(set(names))} classes; allowed: {CLASSES[TINY]}")
    number = {name: place for place, name in enumerate(names)}
    folders = {path.name for path in _present(root / "train", TINY_FROM).iterdir() if path.is_dir()}
    if folders != set(names):
        apart = ", ".join(sorted(folders ^ set(names))[:3])
        allowed = f"the {len(names)} of wnids.txt; {apart} is in one of them alone"
        raise ArgumentError("vit", "dataset", f"{root / 'train'} has {len(folders)} classes; allowed: {allowed}")
    learned = [(path, number[name]) for name in names for path in sorted((root / "train" / name / "images").glob("*.JPEG"))]
    notes = _present(root / "val" / "val_annotations.txt", TINY_FROM)
    tested = []
    for line in notes.read_text().splitlines():
        image, _, rest = line.partition("\t")
        name = rest.partition("\t")[0]
        if name not in number:
            raise ArgumentError("vit", "dataset", f"{notes} gives {image} the class {name[:40]!r}; allowed: those of wnids.txt")
        tested.append((root / "val" / "images" / image, number[name]))
    return *_decoded(learned, root / "train"), *_decoded(tested, notes), len(names)


def _decoded(listed: Sequence[tuple[Path, int]], where: Path) -> tuple[Tensor, Tensor]:
    if not listed:
        raise ArgumentError("vit", "dataset", f"{where} names no images; allowed: one and more")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter's lock
        pixels = torch.stack(list(pool.map(_decode, (path for path, _ in listed))))
    return pixels, torch.tensor([label for _, label in listed])


def _decode(path: Path) -> Tensor:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError("JPEG files are read by Pillow: pip install pillow") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; get {TINY_FROM}")
    side = SIDE[TINY]
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            size = image.size
            pixels = np.asarray(image.convert("RGB")) if size == (side, side) else None
    except (OSError, SyntaxError, ValueError) as broken:
        raise ArgumentError("vit", "dataset", f"{path} cannot be decoded: {broken}; allowed: a whole JPEG file") from broken
    if pixels is None:
        raise ArgumentError("vit", "dataset", f"{path} has {size[0]} x {size[1]} pixels; allowed: {side} x {side}")
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _inside(folder: Path, name: str, mark: str, source: str) -> Path:
    """The folder itself or the one of that name in it, whichever has the mark."""
    for root in (folder, folder / name):
        if (root / mark).is_file():
            return root
    raise FileNotFoundError(f"{folder} holds no {name}: neither {folder / mark} nor {folder / name / mark} is a file; get {source}")


def _present(path: Path, source: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; get {source}")
    return path
