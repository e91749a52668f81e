"""Checkpoints in AA-CLIP's format, with what a run needs to go on exactly beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_attn import ArgumentError
from triton_attn.clip.settings import Settings
from triton_attn.models import AdaptedCLIPWithCrossAttention

NAME = "train-clip-adapter"
FILES = {"text": "text_adapter_cross_attn.pth", "image": "image_adapter_cross_attn.pth"}
# may change between a run and its continuation
FREE = {"data", "test_data", "device", "workers", "stages", "text_epochs", "image_epochs"}
ELSEWHERE = {"text": {"image_batch", "image_lr"}, "image": {"text_batch", "text_lr", "text_norm_weight", "context_dropout"}}


# of settings: what stage 2 can do in another way than stage 1, on which it stands, was told
STAGE_2_ALONE = ELSEWHERE["image"] | {"image_cross_attention"}
MOMENTS, OPTIONS = {"step", "exp_avg", "exp_avg_sq"}, {"params", "lr", "betas", "eps"}


def _are_tensors(given: Any) -> bool:
    return isinstance(given, Mapping) and all(isinstance(name, str) and isinstance(x, Tensor) for name, x in given.items())


def _are_settings(given: Any) -> bool:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        return False
    return isinstance(given.get("cross_attention"), bool) and isinstance(given.get("context_dropout"), (int, float))


def _is_random(given: Any) -> bool:
    if not isinstance(given, Mapping) or not isinstance(given.get("cuda"), (list, tuple)):
        return False
    return all(isinstance(x, Tensor) and x.dtype == torch.uint8 for x in (given.get("cpu"), *given["cuda"]))


def _is_optimizer(given: Any) -> bool:
    if not isinstance(given, Mapping) or not isinstance(given.get("state"), Mapping) or not isinstance(given.get("param_groups"), list):
        return False
    states, groups = given["state"].values(), given["param_groups"]
    return all(isinstance(x, Mapping) and set(x) >= MOMENTS for x in states) and all(
        isinstance(x, Mapping) and set(x) >= OPTIONS for x in groups
    )


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": (lambda x: type(x) is int and x >= 0, "a whole number"),
    "adapter": (_are_tensors, "tensors by name"),
    "cross_attn": (_are_tensors, "tensors by name"),
    "optimizer": (_is_optimizer, "an Adam's state"),
    "settings": (_are_settings, "the settings of a run"),
    "random": (_is_random, "the state of generators"),
    "losses": (lambda x: isinstance(x, list) and all(type(loss) in (int, float) for loss in x), "a list of numbers"),
}


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
    for entry, value in held.items():
        right, wanted_kind = KINDS.get(entry.removeprefix(f"{stage}_") if isinstance(entry, str) else "", (None, ""))
        if right is not None and not right(value):
            raise ArgumentError(NAME, "checkpoint", f"{path} holds {entry} of a wrong kind ({_short(value)}); allowed: {wanted_kind}")
    return dict(held)


def _short(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


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
        # the original has always had one
        model.expects_context = settings is None or beside_contexts(settings["cross_attention"], settings["context_dropout"])


def beside_contexts(cross_attention: bool, context_dropout: float) -> bool:
    """Whether stage 1 learns beside contexts, of some batches if not of all."""
    return cross_attention and context_dropout < 1


def restore_optimizer(optimizer: torch.optim.Optimizer, held: Mapping[str, Any], stage: str, path: Path) -> None:
    """Put a checkpoint's state into the optimizer.

    Raises:
        ArgumentError: it is of other parameters; the message names the file.
    """
    entry = f"{stage}_optimizer"
    try:
        optimizer.load_state_dict(held[entry])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ArgumentError(NAME, "checkpoint", f"{path} holds {entry} that does not fit this model: {said[:400]}") from error
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[name]
            if not isinstance(moment, Tensor) or moment.shape != parameter.shape:
                wanted = tuple(parameter.shape)
                raise ArgumentError(NAME, "checkpoint", f"{path} holds {entry} whose {name} is of another shape; allowed: {wanted}")


def not_finite(parts: Mapping[str, torch.nn.Module]) -> str | None:
    """The name of a parameter with NaN or an infinity in it."""
    named = ((f"{part}.{name}", x) for part, module in parts.items() for name, x in module.named_parameters())
    return next((name for name, x in named if not x.isfinite().all()), None)


def check_order(folder: Path, text_epochs: int) -> None:
    """That stage 1 does not go on under a stage 2 which stands on it.

    Raises:
        ArgumentError: it would; the message says how many epochs of stage 1 there are.
    """
    text, image = folder / FILES["text"], folder / FILES["image"]
    if not image.exists():
        return
    done = load(text, "text")["epoch"] if text.exists() else 0
    if done < text_epochs:
        said = f"is {text_epochs}, but {image} was learned beside the {done} of stage 1 that {text} holds"
        raise ArgumentError(NAME, "text_epochs", f"{said}; allowed: {done}, or remove {image.name} to learn stage 2 again")


def check_settings(
    held: Mapping[str, Any], settings: Settings, stage: str, path: Path, argument: str = "resume", free: Collection[str] = ()
) -> None:
    """That a run goes on as it began.

    Args:
        held: of `load`.
        settings: of the run.
        stage, path: of the checkpoint.
        argument: that asks to go on, for the message.
        free: settings that may differ beside those that always may.

    Raises:
        ArgumentError: it has other settings; the message names them and the file.
    """
    if stage == "image" and settings.image_cross_attention is not ("image_cross_attn" in held):
        there = "has" if "image_cross_attn" in held else "lacks"
        said = f"is {settings.image_cross_attention}, but {path} {there} image_cross_attn"
        raise ArgumentError(NAME, "image_cross_attention", f"{said}; allowed: {not settings.image_cross_attention}")
    if "settings" not in held:
        return
    now, then = dataclasses.asdict(settings), held["settings"]
    other = [key for key in now if key not in FREE | ELSEWHERE[stage] | set(free) and now[key] != then.get(key)]
    if other:
        raise ArgumentError(NAME, argument, f"finds other settings in {path}: {', '.join(other)}; allowed: those that it began with")
