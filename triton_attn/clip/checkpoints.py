"""Checkpoints in AA-CLIP's format, with what a run needs to go on exactly beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from triton_attn import ArgumentError
from triton_attn.clip.settings import Settings
from triton_attn.models import AdaptedCLIPWithCrossAttention

NAME = "train-clip-adapter"
FILES = {"text": "text_adapter_cross_attn.pth", "image": "image_adapter_cross_attn.pth"}
# may change between a run and its continuation
FREE = {"data", "test_data", "device", "workers", "stages", "text_epochs", "image_epochs"}
ELSEWHERE = {"text": {"image_batch", "image_lr"}, "image": {"text_batch", "text_lr", "text_norm_weight", "context_dropout"}}


def parts_of(model: AdaptedCLIPWithCrossAttention, stage: str, *, crossed: bool) -> dict[str, torch.nn.Module]:
    """What a stage trains, under the names of its checkpoint: `crossed`, stage 2 with its cross-attention."""
    if stage == "text":
        return {"text_adapter": model.text_adapter, "text_cross_attn": model.text_cross_attn}
    found: dict[str, torch.nn.Module] = {"image_adapter": model.image_adapter}
    return {**found, "image_cross_attn": model.image_cross_attn} if crossed else found


def save(held: Mapping[str, Any], path: Path) -> None:
    """All of it or nothing: a killed process and a full disk leave the file that was there."""
    partial = path.with_suffix(".partial")
    torch.save(dict(held), partial)
    partial.replace(path)


def load(path: Path, stage: str) -> dict[str, Any]:
    """Tensors, numbers and names only; the original's files, too, which lack settings and the state of the generators.

    Raises:
        FileNotFoundError: there is none.
        ArgumentError: it is none of this stage, or cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; `triton-attn train-clip-adapter` writes it")
    allowed = f"what stage {stage} wrote"
    try:
        held = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ArgumentError(NAME, "checkpoint", f"{path} cannot be read ({type(error).__name__}); allowed: {allowed}") from error
    wanted = {"epoch", f"{stage}_adapter", f"{stage}_optimizer"} | ({"text_cross_attn"} if stage == "text" else set())
    missing = wanted - set(held if isinstance(held, dict) else ())
    if missing:
        raise ArgumentError(NAME, "checkpoint", f"{path} lacks {', '.join(sorted(missing))}; allowed: {allowed}")
    return dict(held)


def restore(model: AdaptedCLIPWithCrossAttention, held: Mapping[str, Any], stage: str, path: Path) -> None:
    """Put a checkpoint's adapters into the model.

    Raises:
        ArgumentError: they are of other widths or numbers; the message names the file and what does not fit.
    """
    for name, part in parts_of(model, stage, crossed="image_cross_attn" in held).items():
        try:
            part.load_state_dict(held[name])
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise ArgumentError(NAME, "checkpoint", f"{path} does not fit this model: {said[:400]}") from error
    if stage == "text":
        settings = held.get("settings")
        model.expects_context = True if settings is None else bool(settings["cross_attention"]) and settings["context_dropout"] == 0


def check_settings(held: Mapping[str, Any], settings: Settings, stage: str, path: Path) -> None:
    """That a run goes on as it began.

    Raises:
        ArgumentError: it has other settings; the message names them and the file.
    """
    if "settings" not in held:
        return
    now, then = dataclasses.asdict(settings), held["settings"]
    other = [key for key in now if key not in FREE | ELSEWHERE[stage] and now[key] != then.get(key)]
    if other:
        raise ArgumentError(NAME, "resume", f"finds other settings in {path}: {', '.join(other)}; allowed: those that it began with")
