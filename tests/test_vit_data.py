"""The datasets in their published formats, small ones made here: what is whole is read, what is not is named."""

from __future__ import annotations

import importlib.util
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.real_models  # noqa: F401  makes torchvision importable
from triton_attn import ArgumentError
from triton_attn.vit import formats, pickled_arrays, training
from triton_attn.vit.augmentation import augmented
from triton_attn.vit.images import DATASETS, Images, cifar100, digits, tiny_imagenet
from triton_attn.vit.settings import settings

# what Python 2 wrote for {'data': numpy.arange(6, dtype='u1').reshape(2, 3), 'fine_labels': [1, 2]}, protocol 2
PYTHON_2 = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
    b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89U\x06\x00\x01\x02\x03\x04\x05tbU\x0bfine_labels](K\x01K\x02eu."
)


def cifar(root: Path, protocol: int = 2, **changed: Any) -> Path:
    """A CIFAR-100 of a dozen images."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 8), ("test", 4)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        held: dict[Any, Any] = {b"data": pixels, b"fine_labels": list(range(count)), b"filenames": [b"x.png"] * count, **changed}
        (folder / name).write_bytes(pickle.dumps(held, protocol))
    return folder


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_is_read_from_the_folder_or_from_above_it(protocol: int, tmp_path: Path) -> None:
    folder = cifar(tmp_path, protocol)
    images = cifar100(tmp_path)
    assert (images.train.shape, images.test.shape, images.classes) == ((8, 3, 32, 32), (4, 3, 32, 32), 100)
    pixels = np.random.default_rng(8).integers(0, 256, (8, 3072), dtype=np.uint8)
    assert np.array_equal(images.train.numpy().reshape(8, -1), pixels)
    assert cifar100(folder).train_labels.tolist() == list(range(8))
    ready = images.ready(images.train[:1])
    torch.testing.assert_close(ready[0, 1, 2, 3], (images.train[0, 1, 2, 3] / 255 - 0.4867) / 0.2565)


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(PYTHON_2)
    held = pickled_arrays.load(path)
    assert held[b"fine_labels"] == [1, 2]
    assert np.array_equal(held[b"data"], np.arange(6, dtype=np.uint8).reshape(2, 3))


class Runs:
    """What a wicked file does when it is unpickled."""

    def __init__(self, call: Any, *given: Any) -> None:
        self.call, self.given = call, given

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.given


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Runs(os.mkdir, "made"), r"posix\.mkdir|nt\.mkdir"),
        (Runs(eval, "1"), r"builtins\.eval|__builtin__\.eval"),
        (Runs(np.ndarray, (10**6,)), "not callable|takes no arguments"),
        (Runs(np.dtype, "O"), "an array of 'O'"),
        ([1], "holds a list"),
    ],
)
def test_what_is_no_array_is_refused_and_never_run(content: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train"
    path.write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ArgumentError, match=said) as raised:
        pickled_arrays.load(path)
    assert str(path) in str(raised.value)
    assert not (tmp_path / "made").exists()


def test_broken_cifar_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no cifar-100-python: .* get https://"):
        cifar100(tmp_path)
    with pytest.raises(ArgumentError, match="data_dir is not given"):
        cifar100(None)
    folder = cifar(tmp_path)
    (folder / "train").write_bytes((folder / "train").read_bytes()[:5000])
    with pytest.raises(ArgumentError, match=r"train cannot be read: .*truncated"):
        cifar100(tmp_path)
    cifar(tmp_path, fine_labels=[0])
    with pytest.raises(ArgumentError, match=r"no 8 numbers under 'fine_labels'"):
        cifar100(tmp_path)
    cifar(tmp_path)
    held = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [3, 100]}, 2)
    (folder / "test").write_bytes(held)
    with pytest.raises(ArgumentError, match=r"test has class 100; allowed: 0 to 99"):
        cifar100(tmp_path)
    (folder / "test").unlink()
    with pytest.raises(FileNotFoundError, match=r"test is missing; get https://"):
        cifar100(tmp_path)


def test_a_model_trains_on_cifar_and_is_evaluated_with_its_folder(tmp_path: Path) -> None:
    cifar(tmp_path)
    given = settings({"dataset": "cifar100", "epochs": 1, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "mlp_dim": 32, "warm_up": 0.0})
    (only,) = training.train(given, tmp_path / "run", data_dir=tmp_path)
    assert 4 < only.loss < 6  # a hundred classes, by chance: log 100 is 4.6
    assert training.evaluate(tmp_path / "run" / "last.pt", tmp_path) == only.accuracy
    with pytest.raises(ArgumentError, match="data_dir is not given"):
        training.evaluate(tmp_path / "run" / "last.pt")


def tiny(root: Path, monkeypatch: pytest.MonkeyPatch, size: int = 64) -> Path:
    """A Tiny ImageNet of two classes."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setitem(formats.CLASSES, formats.TINY, 2)
    folder = root / "tiny-imagenet-200"
    paths = [folder / "train" / name / "images" / f"{name}_{i}.JPEG" for name in ("n01", "n02") for i in range(2)]
    paths += [folder / "val" / "images" / f"val_{i}.JPEG" for i in range(2)]
    for place, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = "L" if place == 1 else "RGB"  # some of the published ones are grey
        image.new(mode, (size, size), 40 * place if mode == "L" else (40 * place, 10, 0)).save(path)
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn02\t0\t0\t9\t9\n")
    return folder


def test_tiny_imagenet_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path, monkeypatch)
    images = tiny_imagenet(tmp_path)
    assert (images.train.shape, images.test.shape, images.classes) == ((4, 3, 64, 64), (2, 3, 64, 64), 2)
    assert images.train_labels.tolist() == [0, 0, 1, 1]  # n02 is named first
    assert images.test_labels.tolist() == [1, 0]
    assert images.train[3, :, 5, 5].tolist() == [40] * 3


def test_broken_tiny_imagenets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny(tmp_path, monkeypatch)
    path = folder / "train" / "n01" / "images" / "n01_0.JPEG"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 60])
    with pytest.raises(ArgumentError, match=r"n01_0.JPEG cannot be decoded: .*truncated"):
        tiny_imagenet(tmp_path)
    path.write_bytes(whole)
    (folder / "train" / "n03").mkdir()
    with pytest.raises(ArgumentError, match=r"train has 3 classes; allowed: the 2 of wnids.txt; n03 is in one"):
        tiny_imagenet(tmp_path)
    (folder / "train" / "n03").rmdir()
    (folder / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_1.JPEG is missing"):
        tiny_imagenet(tmp_path)
    (folder / "wnids.txt").write_text("n01\n")
    with pytest.raises(ArgumentError, match=r"wnids.txt names 1 classes; allowed: 2"):
        tiny_imagenet(tmp_path)
    tiny(tmp_path / "large", monkeypatch, 32)
    with pytest.raises(ArgumentError, match=r"has 32 x 32 pixels; allowed: 64 x 64"):
        tiny_imagenet(tmp_path / "large")


def test_wrong_classes_are_refused_before_anything_learns_them() -> None:
    pixels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ArgumentError, match="has class 5 in test; allowed: 0 to 4"):
        Images(pixels, torch.tensor([0, 4]), pixels, torch.tensor([5, 0]), 5)
    with pytest.raises(ArgumentError, match="2 images and 1 labels in train"):
        Images(pixels, torch.tensor([0]), pixels, torch.tensor([5, 0]), 5)


def test_digits_are_there_without_a_folder() -> None:
    pytest.importorskip("sklearn")
    images = digits()
    assert (len(images.train), len(images.test), images.channels, images.side) == (1437, 360, 1, 16)
    ready = images.ready(images.train)
    assert (ready.min().item(), ready.max().item()) == (-1.0, 1.0)
    assert set(DATASETS) == {"digits", "cifar100", "tiny_imagenet"}


def pictures(count: int = 12, side: int = 16) -> torch.Tensor:
    return torch.randint(1, 255, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["none", "shift", "crop_flip", "randaugment"])
def test_a_process_changes_its_part_as_one_alone_would(kind: str) -> None:
    if kind == "randaugment" and importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    images = pictures()
    state = torch.get_rng_state()
    whole = augmented(images, kind, torch.Generator().manual_seed(0))
    assert whole.shape == images.shape
    assert whole.dtype == torch.uint8
    for rank in range(3):
        part = augmented(images, kind, torch.Generator().manual_seed(0), slice(rank, 12, 3))
        assert torch.equal(part, whole[rank::3])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole, images) == (kind == "none")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is there")
def test_randaugment_without_torchvision_says_what_to_do() -> None:
    with pytest.raises(ModuleNotFoundError, match="give augment crop_flip"):
        augmented(pictures(), "randaugment", torch.Generator())


def test_shifts_move_each_image_by_an_eighth_at_the_most_and_mirror_none() -> None:
    images = pictures(20)
    moved = augmented(images, "shift", torch.Generator().manual_seed(0))
    found = set()
    for before, after in zip(images, moved, strict=True):
        wide = torch.nn.functional.pad(before, (2, 2, 2, 2))
        (place,) = [(i, j) for i in range(5) for j in range(5) if torch.equal(after, wide[:, i : i + 16, j : j + 16])]
        found.add(place)
    assert len(found) > 8


def test_crops_stay_within_an_eighth_and_mirror_some() -> None:
    images = pictures(20)
    moved = augmented(images, "crop_flip", torch.Generator().manual_seed(0))
    mirrored = 0
    for before, after in zip(images, moved, strict=True):
        wide = torch.nn.functional.pad(before, (2, 2, 2, 2))
        places = [(i, j) for i in range(5) for j in range(5)]
        plain = any(torch.equal(after, wide[:, i : i + 16, j : j + 16]) for i, j in places)
        mirror = any(torch.equal(after.flip(-1), wide[:, i : i + 16, j : j + 16]) for i, j in places)
        assert plain != mirror
        mirrored += mirror
    assert 3 < mirrored < 17
