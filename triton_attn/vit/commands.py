"""triton-attn vit {train,evaluate,compare,sweep,speed,visualize,convert}."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triton_attn.vit.flags import with_settings

if TYPE_CHECKING:
    from triton_attn.vit.comparison import Row
    from triton_attn.vit.training import Epoch

app = typer.Typer(help="Train, evaluate, compare and draw vision transformers.", no_args_is_help=True)
Resume = Annotated[bool, typer.Option("--resume", help="Go on from last.pt; the result is that of a run that never stopped.")]
OutputDir = Annotated[Path, typer.Option(help="Where what is written goes.")]
DataDir = Annotated[Path | None, typer.Option(help="The folder that holds the dataset; digits need none.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file of settings by their names; flags override it.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")]
Types = Annotated[list[str] | None, typer.Option("--attention-type", help="May be repeated; by default ripple, hydra, baseline.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each, of seeds 0, 1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line and nothing else.")]
COMPARED = ("ripple", "hydra", "baseline")


class _Stopped(Exception):
    """Something went wrong that no other argument would mend."""


@contextlib.contextmanager
def _complaints() -> Iterator[None]:
    """What goes wrong, in one line."""
    from triton_attn import ArgumentError
    from triton_attn.vit.training import TrainingStopped

    try:
        yield
    except (ArgumentError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except TrainingStopped as error:
        typer.echo(f"triton-attn: {error}", err=True)
        raise _Stopped from error


def _settings(config: Path | None, given: dict[str, Any]) -> Any:
    from triton_attn.vit.settings import settings

    return settings(given, config)


@app.command()
@with_settings()
def train(
    output_dir: OutputDir,
    data_dir: DataDir = None,
    config: Config = None,
    resume: Resume = False,
    device: Device = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log to output-dir/tensorboard too.")] = False,
    **given: Any,
) -> int:
    """Train; one line for each epoch. Under torchrun, on all of its processes."""
    from triton_attn.vit import bars, training
    from triton_attn.vit.tensorboard import board

    try:
        with _complaints(), bars.bar() as tick, board(output_dir / "tensorboard", tensorboard) as log:

            def line(epoch: Epoch) -> None:
                print(f"epoch {epoch.epoch + 1}: loss {epoch.loss:.4f}, test accuracy {100 * epoch.accuracy:.2f} %", flush=True)
                log(epoch)

            options: dict[str, Any] = {"data_dir": data_dir, "resume": resume, "device": device, "report": line, "tick": tick}
            training.train(_settings(config, given), output_dir, **options)
    except _Stopped:
        return 1
    return 0


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Option(help="A last.pt or best.pt, or what `convert` wrote.")],
    data_dir: DataDir = None,
    device: Device = None,
) -> int:
    """Print the test accuracy of a checkpoint."""
    from triton_attn.vit import training

    with _complaints():
        print(f"test accuracy {100 * training.evaluate(checkpoint, data_dir, device):.2f} %")
    return 0


@app.command()
@with_settings("attention_type", "seed")
def compare(
    output_dir: OutputDir,
    attention_type: Types = None,
    seeds: Seeds = 3,
    data_dir: DataDir = None,
    config: Config = None,
    device: Device = None,
    as_json: Json = False,
    **given: Any,
) -> int:
    """Train several attention types on the same data, seeds and steps. Finished runs in output-dir are kept, cut ones go on."""
    from triton_attn.vit.comparison import Variant

    variants = [Variant(kind, {"attention_type": kind}) for kind in attention_type or COMPARED]
    return _compared(output_dir, variants, seeds, data_dir, config, device, as_json, given)


@app.command()
@with_settings("seed")
def sweep(
    over: Annotated[str, typer.Option(help="A setting of whole numbers: ripple-stages, hydra-branches, depth, ...")],
    value: Annotated[list[int], typer.Option(help="Of that setting; repeat it.")],
    output_dir: OutputDir,
    seeds: Seeds = 3,
    data_dir: DataDir = None,
    config: Config = None,
    device: Device = None,
    as_json: Json = False,
    **given: Any,
) -> int:
    """Train one attention type with several values of one setting, everything else equal."""
    from triton_attn import ArgumentError
    from triton_attn.vit.comparison import Variant
    from triton_attn.vit.settings import SWEPT

    name = over.replace("-", "_")
    with _complaints():
        if name not in SWEPT:
            raise ArgumentError("vit", "over", f"is {over!r}; allowed: {', '.join(SWEPT)}")
        owner = {"ripple_stages": "ripple", "hydra_branches": "hydra"}.get(name)
        if owner and given.get("attention_type") is None:
            given["attention_type"] = owner
    variants = [Variant(f"{over} {number}", {name: number}) for number in dict.fromkeys(value)]
    return _compared(output_dir, variants, seeds, data_dir, config, device, as_json, given)


def _compared(
    output_dir: Path,
    variants: list[Any],
    seeds: int,
    data_dir: Path | None,
    config: Path | None,
    device: str | None,
    as_json: bool,
    given: dict[str, Any],
) -> int:
    from triton_attn.vit import bars, comparison

    try:
        with _complaints():
            base = _settings(config, given)
            with bars.bar() as tick:
                rows: list[Row] = comparison.compare(base, variants, output_dir, seeds=seeds, data_dir=data_dir, device=device, tick=tick)
    except _Stopped:
        return 1
    if as_json:
        for row in rows:
            print(json.dumps(comparison.as_dict(row)))
    else:
        bars.show(comparison.titles(), comparison.cells(rows))
    return 0


@app.command()
@with_settings("attention_type", "dataset", "seed")
def speed(
    output_dir: OutputDir,
    side: Annotated[list[int], typer.Option(min=1, help="Pixels of an image's side; repeat it.")],
    attention_type: Types = None,
    config: Config = None,
    device: Device = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Of rounds for each size and direction; three rounds at least.")] = None,
    as_json: Json = False,
    **given: Any,
) -> int:
    """Time forward and training steps of whole models in turns, one image of three channels, and write speeds.json."""
    from triton_attn.vit import bars, comparison
    from triton_attn.vit.comparison import Variant

    variants = [Variant(kind, {"attention_type": kind}) for kind in attention_type or COMPARED]
    with _complaints():
        rows = comparison.speeds(_settings(config, given), variants, output_dir, side, device, seconds)
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        bars.show(comparison.SPEED_TITLES, comparison.speed_cells(rows))
    return 0


@app.command()
def visualize(
    output_dir: OutputDir,
    run: Annotated[list[Path], typer.Option(help="A folder that train, compare or sweep wrote; may be repeated.")],
    data_dir: DataDir = None,
    maps: Annotated[int, typer.Option(min=0, help="Test images to draw the class token's attention of, where a run has a best.pt.")] = 4,
) -> int:
    """Draw accuracy, loss, speed against tokens and attention maps, as PNG and SVG, from what was logged and nothing else."""
    from triton_attn.vit import pictures

    with _complaints():
        for path in pictures.draw(run, output_dir, data_dir, maps):
            print(path)
    return 0


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint of Linear-ViT, which pickles its configuration's class.")],
    output: Annotated[Path, typer.Option(help="Where the result goes; `vit evaluate` reads it.")],
    dataset: Annotated[str, typer.Option(help="What it was trained on.")] = "cifar100",
    heads: Annotated[int | None, typer.Option(min=1, help="Of a baseline, whose tensors do not tell.")] = None,
) -> int:
    """Read the tensors, and only those, of one of Linear-ViT's own checkpoints, and write a checkpoint of ours."""
    from triton_attn.vit import conversion

    with _complaints():
        given = conversion.convert(checkpoint, output, dataset, heads)
    print(f"{output}: {given.attention_type}, width {given.dim}, {given.depth} blocks, {given.heads} heads")
    return 0
