"""What every command takes and checks: mechanisms, device, targets, time; and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from triton_attn import CATALOG, device
from triton_attn.mechanism import Mechanism

if TYPE_CHECKING:
    from triton_attn.report.parts import Log

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

Names = Annotated[list[str] | None, typer.Argument(metavar="[MECHANISM]", help="Names from `triton-attn list`; none: all of them.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N; by default the GPU if there is one.")]
Seconds = Annotated[float, typer.Option(help="Stop after about so long; every mechanism gets its share of it.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per line and nothing else.")]
Targets = Annotated[str, typer.Option("--target", help="GPUs by capability, like sm_80,sm_90.")]


class BadArgument(Exception):
    """What was given and what is allowed, in one line."""


def known(names: Sequence[str] | None) -> list[Mechanism]:
    for name in names or ():
        if name not in CATALOG:
            raise BadArgument(f"mechanism is {name!r}; allowed: {', '.join(CATALOG)}")
    return [CATALOG[name] for name in dict.fromkeys(names or CATALOG)]


def where_of(name: str | None) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    allowed = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in allowed:
        raise BadArgument(f"device is {name!r}; allowed on this machine: {', '.join(allowed)}")
    return torch.device(name)


def targets_of(text: str) -> list[str]:
    targets = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for target in targets:
        try:
            device.capability(target)
        except ValueError as error:
            raise BadArgument(str(error)) from error
    return targets


def duration(seconds: float, option: str = "seconds") -> float:
    if not seconds >= 0:
        raise BadArgument(f"{option} is {seconds}; allowed: 0 and more")
    return seconds


def exit_code(log: Log, faults: Sequence[str]) -> int:
    from triton_attn.report.terminal import FAILED, complain

    for text in (*log.left_out, *(FAILED + line for line in log.failed)):
        complain(text)
    return int(bool(faults or log.failed))
