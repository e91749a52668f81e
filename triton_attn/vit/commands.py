"""triton-attn vit {train,evaluate}."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train and evaluate vision transformers.", no_args_is_help=True)
Resume = Annotated[bool, typer.Option("--resume", help="Go on from last.pt; the result is that of a run that never stopped.")]


@app.command()
def train(
    output_dir: Annotated[Path, typer.Option(help="Where last.pt and best.pt go.")],
    attention_type: Annotated[str, typer.Option(help="ripple, hydra, baseline, or a mechanism.")] = "ripple",
    dataset: Annotated[str, typer.Option(help="digits.")] = "digits",
    epochs: int = 25,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    patch_size: int = 2,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    dim_head: int = 16,
    dropout: float = 0.0,
    ripple_stages: int = 1,
    hydra_branches: int = 4,
    seed: int = 0,
    resume: Resume = False,
) -> int:
    """Train; one line for each epoch."""
    given = {key: value for key, value in locals().items() if key not in ("output_dir", "resume")}
    from triton_attn import ArgumentError
    from triton_attn.vit import training

    def line(epoch: training.Epoch) -> None:
        print(f"epoch {epoch.epoch + 1}: loss {epoch.loss:.4f}, test accuracy {100 * epoch.accuracy:.2f} %", flush=True)

    try:
        training.train(training.Settings(**given), output_dir, resume=resume, report=line)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except training.TrainingStopped as error:
        typer.echo(f"triton-attn: {error}", err=True)
        return 1
    return 0


@app.command()
def evaluate(checkpoint: Annotated[Path, typer.Option(help="A last.pt or best.pt.")]) -> int:
    """Print the test accuracy of a checkpoint."""
    from triton_attn import ArgumentError
    from triton_attn.vit import training

    try:
        print(f"test accuracy {100 * training.evaluate(checkpoint):.2f} %")
    except (ArgumentError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    return 0
