"""Training that ends the same whether it was interrupted or not: checkpoints hold all that the next epoch depends on."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn import ArgumentError
from triton_attn.models import VisionTransformer
from triton_attn.vit import augmentation, checkpoints, processes
from triton_attn.vit.checkpoints import BEST, LAST, LOG
from triton_attn.vit.images import DATASETS, Images
from triton_attn.vit.settings import Settings, build


@dataclass(frozen=True)
class Epoch:
    """What is logged of one: the mean loss, the share of test images that are right; and, of no account when compared, the time."""

    epoch: int
    loss: float
    accuracy: float
    seconds: float = field(default=0.0, compare=False)
    step_ms: float = field(default=0.0, compare=False)


class TrainingStopped(Exception):
    """The loss or its gradient is no number any more."""


class Run:
    """One training: the model, its optimizer, what was logged, and where it is kept."""

    def __init__(self, given: Settings, folder: Path, images: Images, group: processes.Group) -> None:
        if group.count > given.batch_size:
            raise ArgumentError("vit", "batch_size", f"is {given.batch_size} for {group.count} processes; allowed: {group.count} and more")
        self.given, self.folder, self.images, self.group = given, folder, images, group
        torch.manual_seed(given.seed)
        self.model: VisionTransformer = build(given, images).to(group.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), given.lr, weight_decay=given.weight_decay)
        self.history: list[Epoch] = []
        if group.rank:  # dropout differs between processes, parameters do not
            torch.manual_seed(given.seed * 1_000_003 + group.rank)

    def resume(self) -> None:
        """Take up what `last.pt` holds."""
        last = self.folder / LAST
        held = checkpoints.load(last)
        if held["settings"] != asdict(self.given):
            other = [key for key, given in asdict(self.given).items() if held["settings"].get(key) != given]
            raise ArgumentError("vit", "resume", f"finds other settings in {last}: {', '.join(other)}; allowed: those that it began with")
        if held["optimizer"] is None:
            raise ArgumentError("vit", "resume", f"finds no optimizer in {last}, which was converted; allowed: what `vit train` wrote")
        if len(held["random"]) != self.group.count:
            count = len(held["random"])
            raise ArgumentError("vit", "resume", f"finds {count} processes in {last}, and there are {self.group.count}; allowed: {count}")
        fits(last, held, self.images)
        self.model.load_state_dict(held["model"])
        self.optimizer.load_state_dict(held["optimizer"])
        set_random(held["random"][self.group.rank], self.group.device)
        self.history = [Epoch(**row) for row in held["history"]]

    def keep(self) -> None:
        """Write `last.pt`, the log, and `best.pt` if this epoch is the best."""
        states = self.group.gather(random_state(self.group.device))
        if self.group.first:
            held = {
                "settings": asdict(self.given),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": states,
                "history": [asdict(row) for row in self.history],
            }
            if self.history[-1].accuracy > max((row.accuracy for row in self.history[:-1]), default=-1.0):
                checkpoints.save(held, self.folder / BEST)
            checkpoints.save(held, self.folder / LAST)
            checkpoints.write("".join(json.dumps(asdict(row)) + "\n" for row in self.history), self.folder / LOG)
        self.group.wait()

    def epochs(self, report: Callable[[Epoch], None], tick: Callable[[int, int], None]) -> None:
        """All that are left."""
        network = self.group.wrapped(self.model)
        if self.given.compiler != "none":
            network.compile(backend=self.given.compiler)  # in place, so that the state's names stay
        for epoch in range(len(self.history), self.given.epochs):
            start = time.perf_counter()
            loss, step = self._epoch(network, epoch, lambda done, of, epoch=epoch: tick(epoch * of + done, self.given.epochs * of))  # type: ignore[misc]
            right = accuracy(self.model, self.images, self.group, self.given.precision)
            self.history.append(Epoch(epoch, loss, right, time.perf_counter() - start, 1e3 * step))
            self.keep()
            report(self.history[-1])

    def _epoch(self, network: nn.Module, epoch: int, tick: Callable[[int, int], None]) -> tuple[float, float]:
        given, images, group = self.given, self.images, self.group
        # of the seed and the epoch alone, so that nothing of it has to be kept
        generator = torch.Generator().manual_seed(given.seed * 1_000_003 + epoch)
        order = torch.randperm(len(images.train), generator=generator)
        batches = [batch for batch in order.split(given.batch_size) if len(batch) >= group.count]  # type: ignore[no-untyped-call]
        whole, total, times = given.epochs * len(batches), 0.0, []
        network.train()
        for i, chosen in enumerate(batches):
            start = time.perf_counter()
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = given.lr * rate((epoch * len(batches) + i + 1) / whole, given.warm_up)
            part = group.part(len(chosen))
            pixels = images.ready(augmentation.augmented(images.train[chosen], given.augment, generator, part), group.device)
            labels = images.train_labels[chosen[part]].to(group.device)
            with cast(group.device, given.precision):
                logits = network(pixels)
            # a sum over this process's part: its share of the batch's mean, whatever the parts' sizes
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=given.smoothing, reduction="sum") / len(chosen)
            value = group.sum(loss.item())
            self._finite("loss", value, epoch, i)
            self.optimizer.zero_grad()
            (loss * group.count).backward()  # type: ignore[no-untyped-call]  # the group takes means
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), given.clip)
            self._finite("gradient's norm", norm.item(), epoch, i)  # or the last batch would spoil what is kept
            self.optimizer.step()
            total += value * len(chosen)
            times.append(time.perf_counter() - start)
            tick(i + 1, len(batches))
        return total / sum(map(len, batches)), statistics.median(times)

    def _finite(self, what: str, value: float, epoch: int, batch: int) -> None:
        if not math.isfinite(value):
            last = self.folder / LAST
            kept = f"{last} holds the epoch before" if last.exists() else "no epoch was finished"
            raise TrainingStopped(
                f"the {what} is {value} in epoch {epoch}, batch {batch}, with lr {self.given.lr}; {kept}; try a smaller --lr"
            )


def train(
    given: Settings,
    folder: Path,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    device: str | None = None,
    report: Callable[[Epoch], None] = lambda epoch: None,
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> list[Epoch]:
    """AdamW, warm-up and cosine, clipped gradients, smoothed labels. Writes `last.pt`, `log.jsonl` and `best.pt`, each as a whole.

    Under torchrun its processes share every batch; the first one writes and reports.

    Raises:
        ArgumentError: a setting is wrong, or the checkpoint to go on from has other settings.
        FileNotFoundError: there is no checkpoint to go on from, or no dataset.
        FileExistsError: there is one, and nobody asked to go on.
        OSError: a checkpoint cannot be written; the one before stays.
        TrainingStopped: the loss or its gradient is not finite; the last checkpoint stays.
    """
    if not resume and (folder / LAST).exists():
        raise FileExistsError(f"{folder / LAST} exists: go on with --resume, or choose another folder")
    if resume:
        checkpoints.load(folder / LAST)  # before the images, which take long
    images = DATASETS[given.dataset](data_dir)
    with processes.group(device) as group:
        run = Run(given, folder, images, group)
        if resume:
            run.resume()
        folder.mkdir(parents=True, exist_ok=True)
        group.wait()
        silent = not group.first
        run.epochs((lambda epoch: None) if silent else report, (lambda done, of: None) if silent else tick)
    return run.history


def cast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16, or nothing for float32."""
    return contextlib.nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def rate(done: float, warm_up: float = 0.1) -> float:
    """Share of the learning rate after a share of the steps: up in a line, down as a cosine."""
    return done / warm_up if done < warm_up else 0.5 + 0.5 * math.cos(math.pi * (done - warm_up) / (1 - warm_up))


@torch.no_grad()
def accuracy(model: VisionTransformer, images: Images, group: processes.Group, precision: str = "float32") -> float:
    """The share of the test images that are right."""
    model.eval()
    part = group.part(len(images.test))
    right = 0
    for pixels, labels in zip(images.test[part].split(256), images.test_labels[part].split(256), strict=True):  # type: ignore[no-untyped-call]
        with cast(group.device, precision):
            logits: Tensor = model(images.ready(pixels, group.device))
        right += int(logits.argmax(1).cpu().eq(labels).sum())
    return group.sum(right) / len(images.test)


def restored(path: Path, data_dir: Path | None = None) -> tuple[Settings, VisionTransformer, Images]:
    """A checkpoint's settings, its model, and the images that it was trained on.

    Raises:
        ArgumentError: it is no checkpoint of ours, or of other classes than the dataset has.
        FileNotFoundError: there is none, or no dataset.
    """
    held = checkpoints.load(path)
    given = Settings(**held["settings"])
    images = DATASETS[given.dataset](data_dir)
    fits(path, held, images)
    model = build(given, images)
    model.load_state_dict(held["model"])
    return given, model.eval(), images


def evaluate(path: Path, data_dir: Path | None = None, device: str | None = None) -> float:
    """Test accuracy of a checkpoint that `train` or `convert` wrote. Raises as `restored` does."""
    given, model, images = restored(path, data_dir)
    with processes.group(device) as group:
        return accuracy(model.to(group.device), images, group, given.precision)


def fits(path: Path, held: dict[str, Any], images: Images) -> None:
    """Whether the checkpoint's head has as many classes as the images."""
    classes = len(held["model"]["mlp_head.1.bias"])
    if classes != images.classes:
        raise ArgumentError("vit", "dataset", f"has {images.classes} classes, {path} has {classes}; they must be as many")


def random_state(device: torch.device) -> Tensor:
    """Of the generator that dropout draws from on this device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random(state: Tensor, device: torch.device) -> None:
    """The reverse."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
