"""Both stages of AA-CLIP's training: text adapters beside images, then image adapters beside text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from triton_attn import ArgumentError
from triton_attn.clip import checkpoints, pictures, sources
from triton_attn.clip.checkpoints import FILES
from triton_attn.clip.evaluation import Scores, area_under_curve, evaluate, set_text
from triton_attn.clip.folders import LAYOUTS, Batch, Loader, Sample
from triton_attn.clip.losses import image_loss, text_loss
from triton_attn.clip.prompts import States, embeddings, tokens_of
from triton_attn.clip.settings import Settings
from triton_attn.models import AdaptedCLIPWithCrossAttention

NAME = "train-clip-adapter"
LOSSES = "losses.png"
BETAS, MILESTONES = (0.5, 0.999), (16_000, 32_000)  # steps at which stage 2 halves its rate


class TrainingStopped(Exception):
    """The loss or a weight is no number any more."""


@dataclass(frozen=True)
class Step:
    """What is reported after a batch."""

    stage: str
    epoch: int
    batch: int
    batches: int
    loss: float


@dataclass(frozen=True)
class Epoch:
    """What is reported of an epoch: its mean loss."""

    stage: str
    epoch: int
    loss: float


@dataclass
class Run:
    """A model with what it learns from."""

    settings: Settings
    model: AdaptedCLIPWithCrossAttention
    loader: Loader
    samples: list[Sample]
    tokens: dict[str, States]
    device: torch.device
    losses: dict[str, list[float]]
    tests: list[Sample] = dataclasses.field(default_factory=list)  # of `test_data`

    def score(self, samples: list[Sample] | None = None) -> Scores:
        """Of these samples, or of those that it learns from, in the way it was trained."""
        chosen, told = self.samples if samples is None else samples, self.settings
        given = {"cross_attention": told.cross_attention, "image_cross_attention": told.image_cross_attention}
        return evaluate(self.model, chosen, self.loader, self.tokens, **given)


def build(settings: Settings) -> Run:
    """The model and the samples of these settings.

    Raises:
        ArgumentError: a setting or a file is wrong; the message names it.
        ModuleNotFoundError: a library that they ask for is not installed.
    """
    device = _device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    samples, tests = samples_of(settings, settings.data), _tests(settings)
    torch.manual_seed(settings.seed)
    source = sources.load(settings.clip, settings.image_size)
    model = _adapted(settings, source.clip).to(device)
    names = [sample.class_name for sample in (*samples, *tests)]
    found = tokens_of(names, source.tokenizer, settings.called)
    tokens = {name: (normal.to(device), abnormal.to(device)) for name, (normal, abnormal) in found.items()}
    return Run(settings, model, source.loader, samples, tokens, device, {"text": [], "image": []}, tests)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())[:100]
        raise ArgumentError(NAME, "device", f"is {name!r}, which torch does not have here ({said}); allowed: cpu, cuda") from error
    return device


def _tests(settings: Settings) -> list[Sample]:
    """What is scored at the end; what could go wrong then goes wrong before training."""
    if not settings.test_data:
        return []
    area_under_curve()
    found = samples_of(settings, settings.test_data)
    if not any(sample.label for sample in found):
        raise ArgumentError(
            NAME, "test_data", f"{settings.test_data} has {len(found)} images, none damaged; allowed: whole and damaged ones"
        )
    return found


def samples_of(settings: Settings, root: str) -> list[Sample]:
    """Of a folder in these settings' layout, split and classes."""
    split = settings.split or ("test" if settings.layout == "mvtec" else "all")
    found = LAYOUTS[settings.layout](Path(root), split, settings.classes or None)
    if not found:
        raise ArgumentError(NAME, "split", f"is {split!r}, of which {root} lists nothing")
    return found


def _adapted(settings: Settings, clip: Any) -> AdaptedCLIPWithCrossAttention:
    from triton_attn.models.clip_towers import towers_of

    towers = towers_of(clip)
    quarters = tuple(sorted({max(1, towers.vision_layers * part // 4) for part in range(1, 5)}))
    until = {"text": max(1, towers.text_layers // 4), "image": quarters[0]}
    return AdaptedCLIPWithCrossAttention(
        clip,
        settings.text_adapt_weight,
        settings.image_adapt_weight,
        until["text"] if settings.text_adapt_until is None else settings.text_adapt_until,
        until["image"] if settings.image_adapt_until is None else settings.image_adapt_until,
        settings.levels or quarters,
        settings.relu,
        settings.cross_attn_heads,
        settings.cross_attn_dropout,
        settings.cross_attn_weight,
        settings.cross_attn_weight,
        context_reduce=settings.context_reduce,
        normalize_context=settings.normalize_context,
    )


def train(
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    report: Callable[[Epoch], None] = lambda epoch: None,
    tick: Callable[[Step], None] = lambda step: None,
) -> Run:
    """Stage 1, stage 2 or both; after every epoch a checkpoint, written as a whole, and losses.png.

    Args:
        settings: of the run.
        folder: where checkpoints go.
        resume: go on from the last whole checkpoint; the result is that of a run that never stopped.
        report, tick: called after each epoch and each batch.

    Raises:
        ArgumentError: a setting, a file or a checkpoint is wrong; or stage 1 would go on under a stage 2 that stands on it; the
            message names it.
        FileExistsError: there are checkpoints, and nobody asked to go on.
        FileNotFoundError: there are none to go on from, or stage 2 alone finds none of stage 1.
        TrainingStopped: the loss or a weight is not finite; the last checkpoint stays.
    """
    stages = ("text", "image") if settings.stages == "both" else (settings.stages,)
    there = [folder / FILES[stage] for stage in stages if (folder / FILES[stage]).exists()]
    if there and not resume:
        raise FileExistsError(f"{there[0]} exists: go on with --resume, or choose another folder")
    if resume and not there:
        raise FileNotFoundError(f"{folder / FILES[stages[0]]} is no file: there is nothing to go on from")
    if "text" in stages:
        checkpoints.check_order(folder, settings.text_epochs)
    run = build(settings)
    folder.mkdir(parents=True, exist_ok=True)
    if settings.stages == "image":
        path = folder / FILES["text"]
        held = checkpoints.load(path, "text")
        checkpoints.check_settings(held, settings, "text", path, "stages", checkpoints.STAGE_2_ALONE)
        checkpoints.restore(run.model, held, "text", path)
    for stage in stages:
        _train_stage(run, stage, folder, report, tick)
    run.model.eval()
    return run


def _train_stage(run: Run, stage: str, folder: Path, report: Callable[[Epoch], None], tick: Callable[[Step], None]) -> None:
    settings, path = run.settings, folder / FILES[stage]
    crossed = stage == "image" and settings.image_cross_attention
    parts = checkpoints.parts_of(run.model, stage, crossed=crossed)
    rate, epochs = (settings.text_lr, settings.text_epochs) if stage == "text" else (settings.image_lr, settings.image_epochs)
    optimizer = torch.optim.Adam([x for part in parts.values() for x in part.parameters()], rate, BETAS)
    _seed(settings, stage)
    done = 0
    if path.exists():
        held = checkpoints.load(path, stage)
        checkpoints.check_settings(held, settings, stage, path)
        checkpoints.restore(run.model, held, stage, path)
        checkpoints.restore_optimizer(optimizer, held, stage, path)
        done, run.losses[stage] = held["epoch"], list(held.get("losses", ()))
        _set_random(held.get("random"), path)
    if stage == "text":
        run.model.expects_context = False  # while it learns, contexts are dropped without a word
    for epoch in range(done, epochs):
        run.model.eval()
        if stage == "text":
            run.model.text_cross_attn.train()
        else:
            run.model.image_cross_attn.train()
        loss = _epoch(run, stage, epoch, optimizer, rate, path, tick)
        wrong = checkpoints.not_finite(parts)
        if wrong is not None:
            said = f"{wrong} is not finite after stage {stage}, epoch {epoch}, with lr {rate}"
            raise TrainingStopped(f"{said}; {_kept(path)}")
        run.losses[stage].append(loss)
        held = {"epoch": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}
        held |= {f"{stage}_optimizer": optimizer.state_dict(), "settings": dataclasses.asdict(settings)}
        held |= {"random": _random(), "losses": list(run.losses[stage])}
        checkpoints.save(held, path)
        pictures.losses(run.losses, folder / LOSSES)
        report(Epoch(stage, epoch, loss))
    if stage == "text":
        learned = max(done, epochs) > 0
        run.model.expects_context = learned and checkpoints.beside_contexts(settings.cross_attention, settings.context_dropout)


def _kept(path: Path) -> str:
    return f"{path} holds the epoch before" if path.exists() else "no epoch was finished"


def _epoch(run: Run, stage: str, epoch: int, optimizer: Any, rate: float, path: Path, tick: Callable[[Step], None]) -> float:
    size = run.settings.text_batch if stage == "text" else run.settings.image_batch
    # of the seed, the stage and the epoch alone, so that nothing of it has to be kept
    generator = torch.Generator().manual_seed((run.settings.seed * 1_000_003 + epoch) * 2 + (stage == "image"))
    order: list[Tensor] = list(torch.randperm(len(run.samples), generator=generator).split(size))  # type: ignore[no-untyped-call]
    total = 0.0
    for index, batch in enumerate(_loaded(run, order)):
        if stage == "image":
            step = epoch * len(order) + index
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 ** sum(step >= milestone for milestone in MILESTONES)
        loss = text_step(run, batch) if stage == "text" else image_step(run, batch)
        value = loss.item()
        if not math.isfinite(value):
            where = f"stage {stage}, epoch {epoch}, batch {index}, with lr {rate}"
            raise TrainingStopped(f"the loss is {value} in {where}; {_kept(path)}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += value * len(batch.labels)
        tick(Step(stage, epoch, index, len(order), value))
    return total / len(run.samples)


def text_step(run: Run, batch: Batch) -> Tensor:
    """Stage 1's loss: the frozen image's patches against adapted text, which attends to the image unless its context is dropped."""
    told = run.settings
    dense = run.model.dense_features(batch.images)
    dropped = told.context_dropout > 0 and float(torch.rand(())) < told.context_dropout
    # the first level is the context: it was computed with the others
    context = dense[0] if told.cross_attention and not dropped else None
    states = embeddings(run.model, run.tokens, batch.class_names, context)
    return text_loss(dense, states, batch.masks, told.level_reduce, told.text_norm_weight)


def image_step(run: Run, batch: Batch) -> Tensor:
    """Stage 2's loss: adapted patches against the text of stage 1, which keeps its context."""
    told = run.settings
    with torch.no_grad():
        context = run.model.compute_image_context(batch.images) if told.cross_attention else None
        states = embeddings(run.model, run.tokens, batch.class_names, context)
    if told.image_cross_attention:
        set_text(run.model, run.tokens, batch.class_names, context)
    levels, detected = run.model(batch.images, use_cross_attention=told.image_cross_attention)
    run.model.clear_text_context()
    return image_loss(levels, detected, states, batch.masks, batch.labels, told.level_reduce)


class _Batches(Dataset[Batch | ArgumentError]):
    """Whole batches, for the loader's workers; an error comes as a value, because a raised one arrives with a traceback in its text."""

    def __init__(self, run: Run, order: list[Tensor]) -> None:
        self.samples, self.loader, self.order = run.samples, run.loader, [part.tolist() for part in order]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Batch | ArgumentError:
        try:
            return self.loader.load(self.samples[at] for at in self.order[index])
        except ArgumentError as error:
            return error


def _loaded(run: Run, order: list[Tensor]) -> Iterator[Batch]:
    # a generator of its own: the loader would draw from the one that dropout draws from
    given: Any = {"num_workers": run.settings.workers, "generator": torch.Generator(), "collate_fn": lambda batch: batch}
    for batch in DataLoader(_Batches(run, order), batch_size=None, **given):
        if isinstance(batch, ArgumentError):
            raise batch
        yield batch.to(run.device)


def _seed(settings: Settings, stage: str) -> None:
    torch.manual_seed(settings.seed * 2 + (stage == "image"))


def _random() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random(held: Any, path: Path) -> None:
    if held is None:
        return
    try:
        torch.set_rng_state(held["cpu"])
        if torch.cuda.is_available() and len(held["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(held["cuda"])
    except RuntimeError as error:
        raise ArgumentError(NAME, "checkpoint", f"{path} holds random that is no state of a generator ({error})") from error
