"""Where a trained model sees damage, and how often it is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_attn import ArgumentError
from triton_attn.clip.folders import Batch, Loader, Sample
from triton_attn.clip.losses import TEMPERATURE, similarity_map
from triton_attn.clip.prompts import States, check_classes, embeddings
from triton_attn.models import AdaptedCLIPWithCrossAttention

NAME = "train-clip-adapter"


@dataclass(frozen=True)
class Scores:
    """Areas under the receiver operating characteristic, 0.5 is chance: of pixels, and of images (NaN if all or none are damaged).

    An image's score is the mean of its worst pixel's and of the whole image's.
    """

    pixel_auroc: float
    image_auroc: float


@torch.no_grad()
def anomaly_map(
    model: AdaptedCLIPWithCrossAttention,
    batch: Batch,
    tokens: Mapping[str, States],
    *,
    cross_attention: bool = True,
    image_cross_attention: bool = False,
) -> tuple[Tensor, Tensor]:
    """((B, height, width), (B,)) in 0 to 1: each pixel's share of damage, the mean over the levels; each image's.

    Args:
        model: in evaluation mode.
        batch: images, of which masks and labels are not looked at.
        tokens: of `prompts.tokens_of`.
        cross_attention: text attends to each image.
        image_cross_attention: images attend to text.
    """
    context = model.compute_image_context(batch.images) if cross_attention else None
    states = embeddings(model, tokens, batch.class_names, context)
    if image_cross_attention:
        set_text(model, tokens, batch.class_names, context)
    levels, detected = model(batch.images, use_cross_attention=image_cross_attention)
    model.clear_text_context()
    height, width = batch.images.shape[2:]
    share = torch.stack([similarity_map(level, states, (height, width))[:, 1] for level in levels]).mean(0)
    whole = (TEMPERATURE * (detected[:, None] @ states)[:, 0]).softmax(1)[:, 1]
    return share, whole


@torch.no_grad()
def set_text(
    model: AdaptedCLIPWithCrossAttention, tokens: Mapping[str, States], class_names: Sequence[str], context: Tensor | None
) -> None:
    """Set what images attend to: all sentences of each image's class after block 0, (B, P T, width)."""
    check_classes(tokens, class_names)
    rows = torch.stack([torch.cat(tokens[name]) for name in class_names])
    if context is not None:
        model.set_image_context(context.mean(0, keepdim=True) if model.context_reduce == "mean" else context)
    model.set_text_context(model.encode_text_intermediate(rows).flatten(1, 2))
    model.clear_image_context()


def batches(samples: Sequence[Sample], loader: Loader, size: int, device: torch.device | str) -> Iterator[Batch]:
    """In order."""
    for start in range(0, len(samples), size):
        yield loader.load(samples[start : start + size]).to(device)


def area_under_curve() -> Any:
    """scikit-learn's function.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ModuleNotFoundError:
        raise ModuleNotFoundError("scores come from scikit-learn: pip install 'triton-attn[examples]'") from None
    return roc_auc_score


def evaluate(
    model: AdaptedCLIPWithCrossAttention,
    samples: Sequence[Sample],
    loader: Loader,
    tokens: Mapping[str, States],
    *,
    cross_attention: bool = True,
    image_cross_attention: bool = False,
    batch_size: int = 8,
) -> Scores:
    """Both scores over all pixels and images of the samples.

    Raises:
        ArgumentError: there is no image, or no pixel is damaged, or all are.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    roc_auc_score = area_under_curve()
    if not samples:
        raise ArgumentError(NAME, "data", "has no images; allowed: whole and damaged ones")
    model.eval()
    device = next(model.parameters()).device
    found: list[tuple[Any, ...]] = []
    for batch in batches(samples, loader, batch_size, device):
        share, whole = anomaly_map(model, batch, tokens, cross_attention=cross_attention, image_cross_attention=image_cross_attention)
        scores = (whole + share.flatten(1).amax(1)) / 2
        found.append((share.flatten().cpu(), batch.masks.flatten().cpu(), scores.cpu(), batch.labels.cpu()))
    shares, mask, worst, labels = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    if mask.min() == mask.max():
        raise ArgumentError(NAME, "data", f"has {len(samples)} images whose pixels are all alike; allowed: whole and damaged ones")
    image = roc_auc_score(labels, worst) if labels.min() != labels.max() else float("nan")
    return Scores(float(roc_auc_score(mask, shares)), float(image))
