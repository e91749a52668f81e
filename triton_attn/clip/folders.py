"""Images with masks of their defects, in the folders that MVTec AD and VisA come in."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_attn import ArgumentError

NAME = "train-clip-adapter"
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
SPLITS = ("train", "test", "all")


@dataclass(frozen=True)
class Sample:
    """An image; `mask` is None where there is no defect."""

    image: Path
    mask: Path | None
    class_name: str
    defect: str

    @property
    def label(self) -> int:
        """1 where there is a defect."""
        return int(self.mask is not None)


def _fail(path: Path, said: str) -> ArgumentError:
    return ArgumentError(NAME, "data", f"{path} {said}")


def _inside(folder: Path, allowed: str) -> list[Path]:
    if not folder.is_dir():
        raise _fail(folder, f"is no folder; allowed: {allowed}")
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _images(folder: Path, allowed: str) -> list[Path]:
    found = [path for path in _inside(folder, allowed) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise _fail(folder, f"holds no image; allowed: {allowed}")
    return found


def _classes(root: Path, wanted: Sequence[str] | None, marker: str, allowed: str) -> list[Path]:
    there = [path for path in _inside(root, allowed) if (path / marker).is_dir()]
    if not there:
        raise _fail(root, f"holds no folder with {marker}; allowed: {allowed}")
    unknown = sorted(set(wanted or ()) - {path.name for path in there})
    if unknown:
        known = ", ".join(path.name for path in there)
        raise ArgumentError(NAME, "classes", f"has {', '.join(map(repr, unknown))}, which {root} has not; allowed: {known}")
    return [path for path in there if not wanted or path.name in wanted]


def mvtec(root: Path, split: str = "test", classes: Sequence[str] | None = None) -> list[Sample]:
    """MVTec AD: CLASS/train/good, CLASS/test/good, CLASS/test/DEFECT and CLASS/ground_truth/DEFECT/NAME_mask.png.

    Args:
        root: the folder of the classes.
        split: "test", which alone has defects; "train"; "all".
        classes: some of them; None: all.

    Raises:
        ArgumentError: a folder or a mask is missing; the message names it.
    """
    allowed = "MVTec AD's CLASS/test/DEFECT and CLASS/ground_truth/DEFECT"
    found: list[Sample] = []
    for folder in _classes(root, classes, "test", allowed):
        for part in ("train", "test") if split == "all" else (split,):
            for kind in (path for path in _inside(folder / part, allowed) if path.is_dir()):
                for image in _images(kind, allowed):
                    mask = None if kind.name == "good" else folder / "ground_truth" / kind.name / f"{image.stem}_mask.png"
                    if mask is not None and not mask.is_file():
                        raise _fail(mask, f"is missing, the mask of {image}")
                    found.append(Sample(image, mask, folder.name, kind.name))
    return found


def visa(root: Path, split: str = "all", classes: Sequence[str] | None = None) -> list[Sample]:
    """VisA: CLASS/Data/Images/{Normal,Anomaly} and CLASS/Data/Masks/Anomaly/NAME.png, split by split_csv/1cls.csv.

    Args:
        root: the folder of the classes.
        split: "all": all images that are there; "train" and "test": those that the table lists so.
        classes: some of them; None: all.

    Raises:
        ArgumentError: a folder, an image, a mask or the table is missing or unreadable; the message names it.
    """
    allowed = "VisA's CLASS/Data/Images/{Normal,Anomaly} and CLASS/Data/Masks/Anomaly"
    folders = _classes(root, classes, "Data", allowed)
    if split != "all":
        return _listed(root, split, {folder.name for folder in folders})
    found: list[Sample] = []
    for folder in folders:
        images = folder / "Data" / "Images"
        found += [Sample(image, None, folder.name, "good") for image in _images(images / "Normal", allowed)]
        for image in _images(images / "Anomaly", allowed):
            mask = folder / "Data" / "Masks" / "Anomaly" / f"{image.stem}.png"
            if not mask.is_file():
                raise _fail(mask, f"is missing, the mask of {image}")
            found.append(Sample(image, mask, folder.name, "anomaly"))
    return found


def _listed(root: Path, split: str, classes: set[str]) -> list[Sample]:
    table, columns = root / "split_csv" / "1cls.csv", {"object", "split", "label", "image", "mask"}
    if not table.is_file():
        raise _fail(table, f"is missing, which split={split!r} needs; allowed: split='all'")
    chosen: list[dict[str, str]] = []
    try:
        with table.open(newline="", encoding="utf-8") as opened:
            rows = csv.DictReader(opened)
            if not columns <= set(rows.fieldnames or ()):
                raise _fail(table, f"has columns {rows.fieldnames}; allowed: {', '.join(sorted(columns))}")
            for row in rows:
                lacking = sorted(name for name in columns if row[name] is None)
                if lacking:
                    raise _fail(table, f"has no {', '.join(lacking)} in line {rows.line_num}; allowed: {len(columns)} fields")
                if row["label"] not in ("normal", "anomaly"):
                    raise _fail(table, f"has label {row['label'][:40]!r} in line {rows.line_num}; allowed: 'normal', 'anomaly'")
                if row["object"] in classes and row["split"] == split:
                    chosen.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise _fail(table, f"is no table in UTF-8 that can be read ({type(error).__name__}: {error})") from error
    found: list[Sample] = []
    for row in chosen:
        bad = row["label"] == "anomaly"
        image, mask = root / row["image"], root / (row["mask"] or "")
        for path in (image, mask) if bad else (image,):
            if not path.is_file():
                raise _fail(path, f"is missing, which {table} lists")
        found.append(Sample(image, mask if bad else None, row["object"], "anomaly" if bad else "good"))
    return found


LAYOUTS: dict[str, Callable[[Path, str, Sequence[str] | None], list[Sample]]] = {"mvtec": mvtec, "visa": visa}


@dataclass(frozen=True)
class Batch:
    """(B, 3, side, side) normalised, (B, side, side) of 0 and 1, (B,) of 0 and 1, B names."""

    images: Tensor
    masks: Tensor
    labels: Tensor
    class_names: list[str]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.images.to(device), self.masks.to(device), self.labels.to(device), self.class_names)


@dataclass(frozen=True)
class Loader:
    """Samples to what a CLIP takes: resized to a square, bicubic (masks: nearest), normalised."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def load(self, samples: Iterable[Sample]) -> Batch:
        """Read images and masks.

        Raises:
            ArgumentError: a file is missing or broken, or a mask is not of its image's size; the message names the file.
        """
        rows = list(samples)
        pairs = [self._read(sample) for sample in rows]
        labels = torch.tensor([sample.label for sample in rows])
        names = [sample.class_name for sample in rows]
        return Batch(torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs]), labels, names)

    def _read(self, sample: Sample) -> tuple[Tensor, Tensor]:
        import numpy

        image, size = self._opened(sample.image, "BICUBIC", rgb=True)
        pixels = torch.from_numpy(image.astype(numpy.float32)).movedim(2, 0) / 255
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.mean, self.std))
        if sample.mask is None:
            return (pixels - mean) / std, torch.zeros(self.side, self.side)
        mask, other = self._opened(sample.mask, "NEAREST", rgb=False)
        if other != size:
            raise _fail(sample.mask, f"has {other[0]} x {other[1]} pixels, its image {sample.image} has {size[0]} x {size[1]}")
        # VisA's masks number their defects, MVTec's are 0 and 255
        marked = mask > 0
        return (pixels - mean) / std, torch.from_numpy(marked.any(2) if marked.ndim == 3 else marked).float()

    def _opened(self, path: Path, resampling: str, *, rgb: bool) -> tuple[Any, tuple[int, int]]:
        import numpy
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as opened:
                # palettes and transparency hold no numbers to compare with 0
                flat = opened.convert("RGB") if rgb or opened.mode not in ("1", "L", "I", "I;16", "F") else opened
                resized = flat.resize((self.side, self.side), getattr(Image.Resampling, resampling))
                return numpy.array(resized), opened.size
        except FileNotFoundError:
            raise _fail(path, "is missing") from None
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise _fail(path, f"is no image that can be read ({type(error).__name__}: {error})") from error
