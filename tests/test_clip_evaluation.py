"""Embeddings of a batch's classes, maps of damage and their scores; the command's pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.small_clip import pictures, small_clip, texts
from triton_attn import ArgumentError
from triton_attn.clip import evaluation
from triton_attn.clip import pictures as drawing
from triton_attn.clip.evaluation import anomaly_map, evaluate
from triton_attn.clip.folders import Batch, Loader, Sample
from triton_attn.clip.prompts import States, embeddings
from triton_attn.clip.settings import read
from triton_attn.models import AdaptedCLIPWithCrossAttention

DOUBLE = torch.float64
ROOT = Path(__file__).parents[1]


def make(**how: Any) -> Any:
    given: dict[str, Any] = {"text_adapt_until": 2, "image_adapt_until": 2, "levels": (2, 5), "cross_attn_heads": 2, **how}
    return AdaptedCLIPWithCrossAttention(small_clip(dtype=DOUBLE), **given).eval()


def tokens() -> dict[str, States]:
    return {name: (texts(2), texts(3)) for name in ("pill", "nut")}


def directions(model: Any, text: Tensor) -> Tensor:
    return F.normalize(F.normalize(model.encode_text(text), dim=-1).mean(0), dim=0)


@pytest.mark.parametrize("names", [["pill", "nut", "pill"], ["nut", "nut", "nut"]])
def test_each_image_has_the_text_of_its_class_beside_its_own_context(names: list[str]) -> None:
    model, said = make(), tokens()
    context = model.compute_image_context(pictures(3, DOUBLE))
    found = embeddings(model, said, names, context)
    for image, name in enumerate(names):
        model.set_image_context(context[image : image + 1])
        for state in range(2):
            torch.testing.assert_close(found[image, :, state], directions(model, said[name][state]))
    model.clear_image_context()
    alone = embeddings(model, said, names, None)
    for image, name in enumerate(names):
        for state in range(2):
            torch.testing.assert_close(alone[image, :, state], directions(model, said[name][state]))
    assert model.current_image_context is None


def test_a_mean_context_is_one_for_all_as_in_the_original() -> None:
    model, said, names = make(context_reduce="mean"), tokens(), ["pill", "nut", "pill"]
    context = model.compute_image_context(pictures(3, DOUBLE))
    found = embeddings(model, said, names, context)
    model.set_image_context(context.mean(0, keepdim=True))
    for image, name in enumerate(names):
        for state in range(2):
            torch.testing.assert_close(found[image, :, state], directions(model, said[name][state]))


@pytest.mark.parametrize("crossed", [False, True])
def test_a_map_is_the_mean_share_of_damage_over_levels(crossed: bool) -> None:
    model, said = make(), tokens()
    batch = Batch(pictures(2, DOUBLE), torch.zeros(2, 32, 32), torch.zeros(2, dtype=torch.int64), ["pill", "nut"])
    share, whole = anomaly_map(model, batch, said, image_cross_attention=crossed)
    context = model.compute_image_context(batch.images)
    states = embeddings(model, said, batch.class_names, context)
    if crossed:
        model.set_image_context(context)
        rows = torch.stack([torch.cat(said[name]) for name in batch.class_names])
        model.set_text_context(model.encode_text_intermediate(rows).flatten(1, 2))
    levels, detected = model(batch.images, use_cross_attention=crossed)
    coarse = [(100 * level @ states).mT.reshape(2, 2, 4, 4) for level in levels]
    fine = [F.interpolate(grid, (32, 32), mode="bilinear", align_corners=True).softmax(1)[:, 1] for grid in coarse]
    torch.testing.assert_close(share, torch.stack(fine).mean(0))
    torch.testing.assert_close(whole, (100 * torch.einsum("bd,bds->bs", detected, states)).softmax(1)[:, 1])
    model.clear_text_context()
    model.clear_image_context()
    other, _ = anomaly_map(model, replace(batch, images=batch.images.flip(0), class_names=["nut", "pill"]), said, cross_attention=True)
    if not crossed:
        torch.testing.assert_close(other.flip(0), share)  # images of a batch do not see each other


def folder(tmp_path: Path) -> list[Sample]:
    image: Any = pytest.importorskip("PIL.Image")
    found = []
    for index in range(4):
        image.new("RGB", (32, 32), (40 * index, 90, 30)).save(tmp_path / f"{index}.png")
        mask = None
        if index >= 2:
            mask = tmp_path / f"{index}_mask.png"
            marked = image.new("L", (32, 32))
            marked.paste(255, (8 * index - 16, 0, 8 * index, 32))
            marked.save(mask)
        found.append(Sample(tmp_path / f"{index}.png", mask, "pill", "good" if mask is None else "hole"))
    return found


LOADER = Loader(32, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("right", [1.0, 0.0])
def test_scores_are_areas_over_all_pixels_and_images(right: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    samples = folder(tmp_path)

    def told(model: Any, batch: Batch, said: Any, **how: Any) -> tuple[Tensor, Tensor]:
        return (batch.masks == right).float(), batch.labels.float() if right else 1.0 - batch.labels

    monkeypatch.setattr(evaluation, "anomaly_map", told)
    found = evaluate(make(), samples, LOADER, tokens(), batch_size=3)
    assert found.pixel_auroc == right
    assert found.image_auroc == right
    with pytest.raises(ArgumentError, match="has 2 images whose pixels are all alike"):
        evaluate(make(), samples[:2], LOADER, tokens())


def test_pictures_are_written_as_a_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image, mask = torch.zeros(3, 8, 8), torch.zeros(8, 8)
    drawing.heat_map(image, mask, {"one": mask, "two": mask}, LOADER, tmp_path / "map.png")
    drawing.word_attention(image, {"word": torch.rand(4, 4)}, LOADER, tmp_path / "words.png")
    drawing.losses({"text": [2.0, 1.0], "image": []}, tmp_path / "losses.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.png", "map.png", "words.png"]
    assert drawing.pixels_of(image, LOADER).max() == 0.5


def test_the_example_s_configuration_is_the_original_s() -> None:
    pytest.importorskip("yaml")
    found = read(ROOT / "examples" / "configs" / "clip_adapter.yaml", {"data": "there"})
    plan = (found.text_lr, found.text_batch, found.text_epochs, found.image_lr, found.image_batch, found.image_epochs)
    assert plan == (1e-5, 16, 5, 5e-4, 2, 20)
    assert (found.image_size, found.levels) == (518, (6, 12, 18, 24))
