"""Training that ends the same whether it was interrupted or not: checkpoints hold all that the next epoch depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import ArgumentError, arguments
from triton_attn.models import VisionTransformer
from triton_attn.vit.images import DATASETS, Images, shifted

LAST, BEST = "last.pt", "best.pt"
WARM_UP, CLIP, SMOOTHING = 0.1, 1.0, 0.1


@dataclass(frozen=True)
class Settings:
    """What a run depends on; two runs of equal settings on one machine are equal."""

    attention_type: str = "ripple"
    dataset: str = "digits"
    epochs: int = 25
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    patch_size: int = 2
    dim: int = 64
    depth: int = 4
    heads: int = 4
    dim_head: int = 16
    dropout: float = 0.0
    ripple_stages: int = 1
    hydra_branches: int = 4
    seed: int = 0

    name = "vit"

    def __post_init__(self) -> None:
        arguments.choice(self, "dataset", self.dataset, tuple(DATASETS))
        for argument in ("epochs", "batch_size"):
            arguments.whole(self, argument, getattr(self, argument), 1)
        for argument in ("lr", "weight_decay"):
            if arguments.finite(self, argument, getattr(self, argument)) < 0:
                raise ArgumentError(self.name, argument, f"is {getattr(self, argument)}; allowed: 0 and more")


@dataclass(frozen=True)
class Epoch:
    """What is reported of one: the mean loss, the share of test images that are right."""

    epoch: int
    loss: float
    accuracy: float


class TrainingStopped(Exception):
    """The loss is no number any more."""


def build(settings: Settings, images: Images) -> VisionTransformer:
    """The model of these settings, for these images."""
    return VisionTransformer(
        images.side,
        settings.patch_size,
        images.classes,
        settings.dim,
        settings.depth,
        settings.heads,
        2 * settings.dim,
        settings.attention_type,
        settings.dropout,
        settings.dropout,
        settings.dim_head,
        settings.ripple_stages,
        settings.hydra_branches,
        channels=images.channels,
    )


def train(settings: Settings, folder: Path, *, resume: bool = False, report: Callable[[Epoch], None] = lambda epoch: None) -> list[Epoch]:
    """AdamW, warm-up and cosine, clipped gradients, smoothed labels. Writes `last.pt` after every epoch and `best.pt`, each as a whole.

    Raises:
        ArgumentError: a setting is wrong, or the checkpoint to go on from has other settings.
        FileNotFoundError: there is no checkpoint to go on from.
        FileExistsError: there is one, and nobody asked to go on.
        TrainingStopped: the loss is not finite; the last checkpoint stays.
    """
    images = DATASETS[settings.dataset]()
    torch.manual_seed(settings.seed)
    model = build(settings, images)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)
    history: list[Epoch] = []
    last = folder / LAST
    if resume:
        held = load(last)
        if held["settings"] != asdict(settings):
            other = [key for key, given in asdict(settings).items() if held["settings"].get(key) != given]
            raise ArgumentError("vit", "resume", f"finds other settings in {last}: {', '.join(other)}; allowed: those that it began with")
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        torch.set_rng_state(held["random"])
        history = [Epoch(**row) for row in held["history"]]
    elif last.exists():
        raise FileExistsError(f"{last} exists: go on with --resume, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in range(len(history), settings.epochs):
        loss = _epoch(model, optimizer, settings, images, epoch, last)
        history.append(Epoch(epoch, loss, accuracy(model, images)))
        held = {
            "settings": asdict(settings),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "history": [asdict(row) for row in history],
        }
        if history[-1].accuracy > max((row.accuracy for row in history[:-1]), default=-1.0):
            save(held, folder / BEST)
        save(held, last)
        report(history[-1])
    return history


def _epoch(model: VisionTransformer, optimizer: torch.optim.Optimizer, settings: Settings, images: Images, epoch: int, last: Path) -> float:
    # of the seed and the epoch alone, so that nothing of it has to be kept
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    batches = torch.randperm(len(images.train), generator=generator).split(settings.batch_size)  # type: ignore[no-untyped-call]
    whole, total = settings.epochs * len(batches), 0.0
    model.train()
    for i, chosen in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate((epoch * len(batches) + i + 1) / whole)
        loss = F.cross_entropy(model(shifted(images.train[chosen], generator)), images.train_labels[chosen], label_smoothing=SMOOTHING)
        if not math.isfinite(loss.item()):
            kept = f"{last} holds the epoch before" if last.exists() else "no epoch was finished"
            raise TrainingStopped(f"the loss is {loss.item()} in epoch {epoch}, batch {i}, with lr {settings.lr}; {kept}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        total += loss.item() * len(chosen)
    return total / len(images.train)


def rate(done: float) -> float:
    """Share of the learning rate after a share of the steps: up in a line, down as a cosine."""
    return done / WARM_UP if done < WARM_UP else 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))


@torch.no_grad()
def accuracy(model: VisionTransformer, images: Images) -> float:
    """The share of the test images that are right."""
    model.eval()
    guessed: list[Tensor] = [model(part).argmax(1) for part in images.test.split(256)]  # type: ignore[no-untyped-call]
    return torch.cat(guessed).eq(images.test_labels).float().mean().item()


def evaluate(path: Path) -> float:
    """Test accuracy of a checkpoint that `train` wrote."""
    held = load(path)
    settings = Settings(**held["settings"])
    images = DATASETS[settings.dataset]()
    model = build(settings, images)
    model.load_state_dict(held["model"])
    return accuracy(model, images)


def load(path: Path) -> dict[str, Any]:
    """Tensors, numbers and names only.

    Raises:
        FileNotFoundError: there is none.
        ArgumentError: it is not one of ours, such as one that pickles a class.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; `triton-attn vit train` writes it")
    try:
        held = torch.load(path, weights_only=True)
    except Exception as error:
        raise ArgumentError(
            "vit", "checkpoint", f"{path} cannot be read ({type(error).__name__}); allowed: what `vit train` wrote"
        ) from error
    missing = {"settings", "model", "optimizer", "random", "history"} - set(held if isinstance(held, dict) else ())
    if missing:
        raise ArgumentError("vit", "checkpoint", f"{path} lacks {', '.join(sorted(missing))}; allowed: what `vit train` wrote")
    return dict(held)


def save(held: dict[str, Any], path: Path) -> None:
    """All of it or nothing: a killed process and a full disk leave the file that was there."""
    partial = path.with_suffix(".partial")
    torch.save(held, partial)
    partial.replace(path)
