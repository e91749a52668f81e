"""Linear-ViT's own checkpoints, which pickle a class: their tensors are read, and nothing of what they name is looked up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_attn import ArgumentError
from triton_attn.vit import checkpoints
from triton_attn.vit.images import DATASETS
from triton_attn.vit.settings import Settings, model

STATE = "model_state_dict"
CHANNELS = {"digits": 1}


class _Unread:
    """Stands for every class that a checkpoint names: takes whatever comes, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Unread:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def convert(path: Path, output: Path, dataset: str = "cifar100", heads: int | None = None) -> Settings:
    """Write the tensors of a checkpoint of Linear-ViT as one that `evaluate` reads. Settings come from the tensors' shapes.

    Args:
        path: a file that torch.save wrote, with `model_state_dict`.
        output: where the result goes.
        dataset: what it was trained on.
        heads: of a baseline, whose tensors do not tell; 64 wide each where nobody says.

    Raises:
        ArgumentError: it holds no such state, or one that fits no model; the message names the file.
        FileNotFoundError: there is no such file.
        OSError: the result cannot be written.
    """
    if dataset not in DATASETS:
        raise ArgumentError("vit", "dataset", f"is {dataset!r}; allowed: {', '.join(DATASETS)}")
    state = tensors(path)
    try:
        given, side, classes, channels = described(state, dataset, heads)
        built = model(given, side, classes, channels)
        built.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ArgumentError("vit", "checkpoint", f"{path} fits no model: {said}; allowed: Linear-ViT's VisionTransformer") from error
    held: dict[str, Any] = {"settings": asdict(given), "model": built.state_dict(), "optimizer": None, "random": [], "history": []}
    checkpoints.save(held, output)
    return given


def tensors(path: Path) -> dict[str, Tensor]:
    """The model's state of a checkpoint, whatever else that pickles.

    Raises:
        ArgumentError: it cannot be read without running what it names, or holds no state.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    named: list[str] = []
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Unread, name) for name in named]):
            held = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        # not torch's own words, which advise to run whatever the file names
        said = f" beside what it names, {', '.join(sorted(named))[:200]}" if named else ""
        raise ArgumentError(
            "vit", "checkpoint", f"{path} cannot be read{said}; allowed: what torch.save wrote, with a plain class"
        ) from error
    state = held.get(STATE) if isinstance(held, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ArgumentError("vit", "checkpoint", f"{path} has no tensors under '{STATE}'; allowed: a checkpoint of Linear-ViT")
    return {str(name).removeprefix("module."): x for name, x in state.items()}  # DataParallel's prefix


def described(state: Mapping[str, Tensor], dataset: str, heads: int | None) -> tuple[Settings, int, int, int]:
    """(settings, side, classes, channels) of the model that has these tensors. A ripple of the original has its arithmetic."""
    channels = CHANNELS.get(dataset, 3)
    dim = state["cls_token"].shape[-1]
    patch = round((state["to_patch_embedding.1.weight"].shape[0] / channels) ** 0.5)
    side = patch * round((state["pos_embedding"].shape[1] - 1) ** 0.5)
    found: dict[str, Any] = {"dataset": dataset, "patch_size": patch, "dim": dim}
    found["depth"] = len({name.split(".")[1] for name in state if name.startswith("transformer.")})
    found["mlp_dim"] = state["transformer.0.ff.net.0.weight"].shape[0]
    block = "transformer.0.attn"
    inner = state[f"{block}.to_out.0.weight"].shape[1]
    if f"{block}.to_qkv.weight" in state:
        found |= {"attention_type": "baseline", "dim_head": inner // (heads or max(1, inner // 64))}
    elif f"{block}.branch_queries.0.weight" in state:
        branches = sum(name.startswith(f"{block}.branch_queries.") for name in state)
        found |= {"attention_type": "hydra", "hydra_branches": branches}
        found["dim_head"] = state[f"{block}.branch_transforms.0.0.weight"].shape[0]
    else:
        stages = sum(name.startswith(f"{block}.pool_layers.") and name.endswith(".0.weight") for name in state)
        found |= {"attention_type": "ripple", "ripple_stages": stages, "ripple_variant": "v1"}
        found["dim_head"] = state[f"{block}.pool_layers.0.0.weight"].shape[0]
    found["heads"] = inner // found["dim_head"]
    return Settings(**found), side, state["mlp_head.1.weight"].shape[0], channels
