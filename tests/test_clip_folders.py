"""Folders of MVTec AD and VisA, made of drawn defects: what is listed, what is read, and what is missing or broken by its name."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_attn import ArgumentError
from triton_attn.clip.drawn import DEFECTS, NAMES, draw
from triton_attn.clip.folders import Loader, Sample, mvtec, visa

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
EACH, SIDE = 2, 32
LOADER = Loader(24, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw(tmp_path / "mvtec", each=EACH, side=SIDE)


def as_visa(folder: Path, root: Path) -> Path:
    """The same images in VisA's folders, with masks that number their defects, and its table."""
    rows: list[dict[str, str]] = []
    for index, sample in enumerate(mvtec(folder, "all")):
        kind = "Anomaly" if sample.label else "Normal"
        image = root / sample.class_name / "Data" / "Images" / kind / f"{index:04}.JPG"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.open(sample.image).save(image)
        row = {"object": sample.class_name, "split": sample.image.parts[-3], "label": kind.lower(), "mask": ""}
        if sample.mask is not None:
            mask = root / sample.class_name / "Data" / "Masks" / "Anomaly" / f"{index:04}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.open(sample.mask).point(lambda value: value // 255).save(mask)
            row["mask"] = mask.relative_to(root).as_posix()
        rows.append({**row, "image": image.relative_to(root).as_posix()})
    table = root / "split_csv" / "1cls.csv"
    table.parent.mkdir()
    with table.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, ["object", "split", "label", "image", "mask"])
        writer.writeheader()
        writer.writerows(rows)
    return root


def test_mvtec_s_folders_are_listed_with_their_masks(folder: Path) -> None:
    found = mvtec(folder)
    assert len(found) == len(NAMES) * EACH * (1 + len(DEFECTS))
    assert {sample.defect for sample in found if sample.label} == set(DEFECTS)
    assert all(sample.mask is not None and sample.mask.name == f"{sample.image.stem}_mask.png" for sample in found if sample.label)
    train = mvtec(folder, "train")
    assert {sample.label for sample in train} == {0}
    assert mvtec(folder, "all", ["flower"]) == [s for s in mvtec(folder, "all") if s.class_name == "flower"]
    assert len(mvtec(folder, "all")) == len(train) + len(found)


def test_visa_s_folders_and_table_list_the_same(folder: Path, tmp_path: Path) -> None:
    root = as_visa(folder, tmp_path / "visa")
    for split in ("all", "train", "test"):
        ours, theirs = mvtec(folder, split), visa(root, split)
        assert sorted((s.class_name, s.label) for s in ours) == sorted((s.class_name, s.label) for s in theirs)
    ours, theirs = (sorted(given, key=lambda s: (s.class_name, s.label)) for given in (mvtec(folder, "test"), visa(root, "test")))
    torch.testing.assert_close(LOADER.load(theirs).masks, LOADER.load(ours).masks)  # 1 counts as 255 does


def test_drawn_masks_are_the_pixels_that_were_drawn_on(folder: Path, tmp_path: Path) -> None:
    """The same cuttings without the drawing are not kept, so: damaged pixels are magenta, and nearly no others are."""
    loader = Loader(SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    batch = loader.load(sample for sample in mvtec(folder) if sample.label)
    red, green, blue = batch.images.unbind(1)
    magenta = (green < 0.3) & (red > 0.6) & (blue > 0.6)
    assert magenta[batch.masks == 1].float().mean() > 0.95
    assert magenta[batch.masks == 0].float().mean() < 0.05
    assert batch.labels.eq(1).all()
    again = draw(tmp_path / "again", each=EACH, side=SIDE)
    torch.testing.assert_close(loader.load(mvtec(again)).images, loader.load(mvtec(folder)).images, rtol=0, atol=0)


def test_images_are_resized_and_normalised(folder: Path) -> None:
    sample = mvtec(folder)[0]
    batch = LOADER.load([sample])
    resized = torch.tensor(list(Image.open(sample.image).convert("RGB").resize((24, 24), Image.Resampling.BICUBIC).tobytes()))
    expected = (resized.view(24, 24, 3).float() / 255 - torch.tensor(LOADER.mean)) / torch.tensor(LOADER.std)
    torch.testing.assert_close(batch.images[0], expected.movedim(2, 0))
    assert batch.masks.shape == (1, 24, 24)
    assert batch.class_names == [sample.class_name]


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "I;16", "1"])
def test_masks_of_any_kind_mark_the_same_pixels(mode: str, tmp_path: Path) -> None:
    marked = torch.zeros(8, 8, dtype=torch.bool)
    marked[2:5, 3:7] = True
    flat = Image.new("L", (8, 8))
    flat.putdata([int(value) * 255 for value in marked.flatten()])
    mask = Image.new("I;16", (8, 8)) if mode == "I;16" else flat.convert(mode)
    if mode == "I;16":
        mask.putdata([int(value) * 40_000 for value in marked.flatten()])
    mask.save(tmp_path / "mask.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    loader = Loader(8, (0.5,) * 3, (0.5,) * 3)
    batch = loader.load([Sample(tmp_path / "image.png", tmp_path / "mask.png", "thing", "hole")])
    assert torch.equal(batch.masks[0].bool(), marked)


# what is missing or broken


def test_a_mask_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    root = as_visa(folder, tmp_path / "visa")
    mask = next(s.mask for s in mvtec(folder) if s.mask is not None)
    mask.unlink()
    with pytest.raises(ArgumentError, match=re.escape(f"data {mask} is missing, the mask of ")):
        mvtec(folder)
    mask = next(s.mask for s in visa(root) if s.mask is not None)
    mask.unlink()
    with pytest.raises(ArgumentError, match=re.escape(f"data {mask} is missing, the mask of ")):
        visa(root)
    with pytest.raises(ArgumentError, match=re.escape(f"data {mask} is missing, which {root}/split_csv/1cls.csv lists")):
        visa(root, "test")
    (root / "split_csv" / "1cls.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ArgumentError, match=r"1cls.csv has columns \['a', 'b'\]; allowed: image, label, mask, object, split"):
        visa(root, "test")
    (root / "split_csv" / "1cls.csv").unlink()
    with pytest.raises(ArgumentError, match=r"1cls.csv is missing, which split='test' needs"):
        visa(root, "test")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"flower,test,anomaly\n", "has no image, mask in line 2; allowed: 5 fields"),
        (b"flower,test,defect,a,b\n", "has label 'defect' in line 2; allowed: 'normal', 'anomaly'"),
        (b"flower,test,normal,\xff,\n", "is no table in UTF-8 that can be read (UnicodeDecodeError"),
        (b"flower,test,normal," + b"x" * 140_000 + b",\n", "is no table in UTF-8 that can be read (Error: field larger"),
    ],
    ids=["short", "label", "bytes", "long"],
)
def test_a_table_that_says_nothing_right_is_named(content: bytes, said: str, folder: Path, tmp_path: Path) -> None:
    root = as_visa(folder, tmp_path / "visa")
    table = root / "split_csv" / "1cls.csv"
    table.write_bytes(b"object,split,label,image,mask\n" + content)
    with pytest.raises(ArgumentError, match=re.escape(f"data {table} {said}")):
        visa(root, "test")


def test_an_image_too_large_to_be_honest_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = mvtec(folder)[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE)
    with pytest.raises(ArgumentError, match=re.escape(f"{sample.image} is no image that can be read (DecompressionBombError")):
        LOADER.load([sample])


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def text(path: Path) -> None:
    path.write_text("no image")


def other_size(path: Path) -> None:
    Image.new("L", (5, 9)).save(path)


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (broken, "is no image that can be read"),
        (text, "is no image that can be read"),
        (other_size, "has 5 x 9 pixels, its image"),
        (gone, "is missing"),
    ],
)
def test_a_broken_file_is_named_when_it_is_read(damage: Callable[[Path], None], said: str, folder: Path) -> None:
    sample = next(s for s in mvtec(folder) if s.mask is not None)
    for path in (sample.image, sample.mask)[damage is other_size :]:
        assert path is not None
        kept = path.read_bytes()
        damage(path)
        with pytest.raises(ArgumentError, match=re.escape(f"{path} {said}")):
            LOADER.load([sample])
        path.write_bytes(kept)


def test_folders_that_are_none_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: mvtec(tmp_path / "nowhere"), f"data {tmp_path}/nowhere is no folder"),
        (lambda: mvtec(tmp_path / "empty"), f"data {tmp_path}/empty holds no folder with test; allowed: MVTec AD's"),
        (lambda: visa(folder), f"data {folder} holds no folder with Data; allowed: VisA's"),
        (lambda: mvtec(folder, classes=["bottle"]), f"classes has 'bottle', which {folder} has not; allowed: flower, temple"),
        (lambda: draw(folder), f"root {folder} is not empty"),
        (lambda: draw(tmp_path / "x", side=8), "side is 8; allowed: 16 to 256"),
    ]
    for call, said in cases:
        with pytest.raises(ArgumentError, match=re.escape(said)):
            call()
    hole = folder / "flower" / "test" / "hole"
    hole.mkdir()
    with pytest.raises(ArgumentError, match=re.escape(f"{hole} holds no image")):
        mvtec(folder)
