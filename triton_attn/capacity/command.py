"""triton-attn capacity."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from triton_attn import ArgumentError, device
from triton_attn.command_line import BadArgument, Json

if TYPE_CHECKING:
    from triton_attn.capacity.memory import Peak
    from triton_attn.capacity.training import Setup
    from triton_attn.report.tables import Table

UNITS = {"MB": 1e6, "GB": 1e9, "MIB": 2.0**20, "GIB": 2.0**30}
CHUNK = 65536


def capacity(
    params: Annotated[list[str] | None, typer.Option(help="125M, 350M, 1.3B or tiny; may be repeated.")] = None,
    attention: Annotated[list[str] | None, typer.Option(help="dilated or dense; may be repeated.")] = None,
    component: Annotated[str, typer.Option(help="model, multihead (one module) or attention (the call alone).")] = "model",
    memory: Annotated[str, typer.Option(help="What the step may hold, like 80GB.")] = "80GB",
    dtype: Annotated[str, typer.Option(help="bf16 (all of it), amp (float32 parameters, autocast) or float32.")] = "bf16",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit (torchao's) or none.")] = "adamw",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute blocks again in the backward pass; a model's.")] = False,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens through a model's MLP at a time; a sixteenth of them through the logits.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 1,
    ladder: Annotated[bool, typer.Option("--ladder", help="A model plain, then with each saving added: what bought what.")] = False,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Count at this length instead of searching; may be repeated.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw memory against length there: .png or .svg.")] = None,
    as_json: Json = False,
) -> int:
    """The longest sequence that a training step fits into memory, counted on tensors without numbers; needs no GPU."""
    if not device.triton_version():
        raise BadArgument("triton is not installed: kernels cannot be asked what they allocate")
    from triton_attn import capacity as room
    from triton_attn.report import terminal

    allowed = _bytes(memory)
    if ladder and component != "model":
        raise BadArgument(f"ladder is given with component {component!r}; allowed: with 'model' alone, which has what it adds")
    try:
        setups = [
            setup
            for name in params or ["125M"]
            for kind in attention or ["dilated"]
            for setup in _steps(
                room.Setup(name, kind, component, dtype, optimizer, checkpointing, chunk, batch), ladder=ladder, chunk=chunk or CHUNK
            )
        ]
        found: list[Peak] = []
        counted: list[Peak] = []
        with terminal.progress(None, json=as_json) as (tick, _):

            def noted(peak: Peak) -> None:
                counted.append(peak)
                tick(f"{_named(peak.setup)}: {peak.length} tokens, {room.readable(peak.bytes)}")

            for setup in setups:
                if length:
                    found += list(room.growth(setup, length, tick=noted))
                elif (best := room.longest(setup, allowed, tick=noted)) is not None:
                    found.append(best)
                else:
                    found.append(replace(counted[-1], length=0))
    except ArgumentError as error:
        raise BadArgument(str(error)) from error
    if plot is not None:
        from triton_attn.capacity import plot as drawing

        drawing.draw(counted, allowed, plot, _named)
    if as_json:
        for peak in found:
            print(json.dumps(asdict(peak)))
    else:
        terminal.show(_table(found))
        if plot is not None:
            terminal.say(str(plot))
    return 0


def _steps(setup: Setup, *, ladder: bool, chunk: int) -> Iterator[Setup]:
    yield setup
    if ladder:
        for changes in ({"checkpointing": True}, {"chunk": chunk}, {"optimizer": "adamw8bit"}):
            setup = replace(setup, **changes)
            yield setup


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", text)
    if found is None or found[2].upper() not in UNITS or not float(found[1]):
        raise BadArgument(f"memory is {text!r}; allowed: a number and one of MB, GB, MiB, GiB, like 80GB")
    return float(found[1]) * UNITS[found[2].upper()]


def _named(setup: Setup) -> str:
    savings = [
        *(["checkpointing"] if setup.checkpointing else []),
        *([f"chunks of {setup.chunk}"] if setup.chunk else []),
        *([setup.optimizer] if setup.component != "attention" else []),
    ]
    return ", ".join([f"{setup.params} {setup.attention} {setup.component}", setup.dtype, *savings])


def _table(peaks: Sequence[Peak]) -> Table:
    from triton_attn.capacity.memory import KINDS, readable
    from triton_attn.report.tables import Table

    titles = ("step", "tokens>", "bytes>", *(f"{kind}>" for kind in KINDS))
    return Table(titles, [(_named(peak.setup), _tokens(peak), *map(readable, (peak.bytes, *peak.parts.values()))) for peak in peaks])


def _tokens(peak: Peak) -> str:
    return f"{peak.length:,}" if peak.length else "none fits"
