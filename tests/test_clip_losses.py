"""AA-CLIP's losses by hand, and two defects of the original's: a loop that kept the last level, a penalty that came four times."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from triton_attn import ArgumentError
from triton_attn.clip import losses
from triton_attn.clip.prompts import ABNORMAL, NORMAL, TEMPLATES, sentences, tokens_of

torch.manual_seed(0)
LEVELS = [F.normalize(torch.randn(3, 9, 5, dtype=torch.float64), dim=-1) for _ in range(4)]
STATES = F.normalize(torch.randn(3, 5, 2, dtype=torch.float64), dim=1)
MASK = (torch.rand(3, 6, 6) > 0.7).double()


def test_maps_are_shares_of_states_over_the_image() -> None:
    found = losses.similarity_map(LEVELS[0], STATES, (3, 3))
    expected = (100 * LEVELS[0] @ STATES).softmax(2).mT.reshape(3, 2, 3, 3)
    torch.testing.assert_close(found, expected)
    large = losses.similarity_map(LEVELS[0], STATES, (6, 7))
    assert large.shape == (3, 2, 6, 7)
    torch.testing.assert_close(large.sum(1), torch.ones(3, 6, 7, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="have 8 patches; allowed: a square number"):
        losses.similarity_map(LEVELS[0][:, :8], STATES, (3, 3))


def test_losses_by_hand() -> None:
    shares = torch.rand(3, 6, 6, dtype=torch.float64)
    both = torch.stack((1 - shares, shares), 1)
    right = torch.where(MASK == 1, shares, 1 - shares)
    torch.testing.assert_close(losses.focal_loss(both, MASK), -((1 - right) ** 2 * right.log()).mean(), rtol=1e-3, atol=1e-5)
    dice = [1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1) for a, b in zip(shares, MASK, strict=True)]
    torch.testing.assert_close(losses.dice_loss(shares, MASK), torch.stack(dice).mean())
    perfect = torch.stack((1 - MASK, MASK), 1)
    assert losses.segmentation_loss(perfect, MASK) < 1e-4
    assert losses.segmentation_loss(1 - perfect, MASK) > 2
    assert losses.segmentation_loss(1 - perfect, MASK).isfinite()


def test_every_level_counts_once_and_so_does_the_penalty() -> None:
    single = [losses.segmentation_loss(losses.similarity_map(level, STATES, (6, 6)), MASK) for level in LEVELS]
    penalty = (STATES[:, :, 0] * STATES[:, :, 1]).sum(1).mean() ** 2
    torch.testing.assert_close(losses.text_loss(LEVELS, STATES, MASK, "sum", 0.1), sum(single) + 0.1 * penalty)
    torch.testing.assert_close(losses.text_loss(LEVELS, STATES, MASK, "last", 0.1), single[-1] + 0.1 * penalty)


def test_stage_2_adds_whether_there_is_a_defect() -> None:
    detected, label = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 1, 1])
    scores = torch.einsum("bd,bds->bs", detected, STATES)
    entropy = -(scores - scores.logsumexp(1, keepdim=True))[torch.arange(3), label].mean()
    level = losses.level_loss(LEVELS, STATES, MASK, "sum")
    torch.testing.assert_close(losses.image_loss(LEVELS, detected, STATES, MASK, label, "sum"), entropy + level)


def test_gradients_stay_finite_where_a_state_is_certain() -> None:
    level = torch.zeros(1, 4, 2, dtype=torch.float64, requires_grad=True)
    states = torch.tensor([[[30.0, -30.0], [0.0, 0.0]]], dtype=torch.float64)
    with torch.no_grad():
        level[:, :, 0] = 1.0
    losses.level_loss([level], states, torch.ones(1, 4, 4, dtype=torch.float64), "sum").backward()  # type: ignore[no-untyped-call]
    assert level.grad is not None
    assert level.grad.isfinite().all()
    assert math.isfinite(level.grad.sum().item())


def test_six_sentences_of_the_whole_and_ten_of_the_damaged() -> None:
    normal, abnormal = sentences("metal nut")
    assert (len(normal), len(abnormal)) == (6, 10) == (len(NORMAL) * len(TEMPLATES), len(ABNORMAL) * len(TEMPLATES))
    assert "a photo of a damaged metal nut." in abnormal
    assert "metal nut." in normal
    said: list[str] = []

    def tokenizer(given: list[str]) -> torch.Tensor:
        said.extend(given)
        return torch.zeros(len(given), 3, dtype=torch.int64)

    found = tokens_of(["metal_nut", "pill", "pill"], tokenizer, {"pill": "oval white pill"})
    assert [part.shape[0] for part in found["pill"]] == [6, 10]
    assert "a metal nut." in said
    assert "a broken oval white pill." in said
    assert len(said) == 32
