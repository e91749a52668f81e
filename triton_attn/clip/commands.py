"""triton-attn train-clip-adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from triton_attn.clip.settings import Settings
    from triton_attn.clip.training import Epoch, Run, Step


def _flag(text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=text, show_default=False)
    return option


def train_clip_adapter(
    output_dir: Annotated[Path, typer.Option(help="Where checkpoints and losses.png go.")],
    config: Annotated[Path | None, _flag("A YAML file of settings; flags come over it.")] = None,
    data: Annotated[str | None, _flag("The folder of classes to learn from.")] = None,
    layout: Annotated[str | None, _flag("mvtec (default) or visa.")] = None,
    split: Annotated[str | None, _flag("train, test or all; by default test for mvtec, all for visa.")] = None,
    test_data: Annotated[str | None, _flag("A folder in the same layout, to print scores of at the end.")] = None,
    clip: Annotated[str | None, _flag("tiny (default), transformers:NAME, open_clip:MODEL[:PRETRAINED].")] = None,
    image_size: Annotated[int | None, _flag("Side of the images; by default the CLIP's own.")] = None,
    device: Annotated[str | None, _flag("cpu or cuda; by default the GPU if there is one.")] = None,
    workers: Annotated[int | None, _flag("Processes that read images (0).")] = None,
    stages: Annotated[str | None, _flag("both (default), text or image.")] = None,
    text_epochs: Annotated[int | None, _flag("Of stage 1 (5).")] = None,
    text_batch: Annotated[int | None, _flag("Of stage 1 (16).")] = None,
    text_lr: Annotated[float | None, _flag("Adam's in stage 1 (1e-5).")] = None,
    image_epochs: Annotated[int | None, _flag("Of stage 2 (20).")] = None,
    image_batch: Annotated[int | None, _flag("Of stage 2 (2).")] = None,
    image_lr: Annotated[float | None, _flag("Adam's in stage 2 (5e-4).")] = None,
    level_reduce: Annotated[str | None, _flag("sum (default), or last: the last level's loss alone, as the original.")] = None,
    context_dropout: Annotated[float | None, _flag("Share of stage 1's batches without a context (0.1).")] = None,
    context_reduce: Annotated[str | None, _flag("mean: the batch's mean context for all, as the original.")] = None,
    cross_attention: Annotated[bool | None, typer.Option(help="Text attends to images (on).", show_default=False)] = None,
    image_cross_attention: Annotated[bool | None, typer.Option(help="Images attend to text in stage 2 (off).", show_default=False)] = None,
    seed: Annotated[int | None, _flag("Of weights, order and dropout (0).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint, as if it had never stopped.")] = False,
) -> int:
    """Train AA-CLIP's adapters on images with masks of defects: text beside images (stage 1), images beside text (stage 2)."""
    flags = {key: value for key, value in locals().items() if key not in ("output_dir", "config", "resume")}
    from triton_attn import ArgumentError
    from triton_attn.clip import settings, training

    try:
        chosen = settings.read(config, flags)
        run = _with_progress(chosen, output_dir, resume)
        if chosen.test_data:
            _print_scores(run)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except training.TrainingStopped as error:
        typer.echo(f"triton-attn: {error}", err=True)
        return 1
    return 0


def _with_progress(chosen: Settings, output_dir: Path, resume: bool) -> Run:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from triton_attn.clip import training

    # on standard error, so that what is printed can be kept
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None, loss=float("nan"))

        def tick(step: Step) -> None:
            said = f"{step.stage} adapters, epoch {step.epoch + 1}"
            bar.update(task, description=said, completed=step.batch + 1, total=step.batches, loss=step.loss)

        def line(epoch: Epoch) -> None:
            print(f"{epoch.stage} adapters, epoch {epoch.epoch + 1}: loss {epoch.loss:.4f}", flush=True)

        return training.train(chosen, output_dir, resume=resume, report=line, tick=tick)


def _print_scores(run: Run) -> None:
    scores = run.score(run.tests)
    print(f"{run.settings.test_data}: {len(run.tests)} images, pixel AUROC {scores.pixel_auroc:.4f}, image AUROC {scores.image_auroc:.4f}")
