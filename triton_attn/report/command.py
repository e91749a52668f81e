"""triton-attn report."""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Annotated

import typer

from triton_attn import __version__, device
from triton_attn.command_line import BadArgument, Device, Json, Names, Targets, duration, known, targets_of, where_of


def report(
    names: Names = None,
    folder: Annotated[Path, typer.Option("--folder", "--out", help="Where the page, its rows and its pictures go.")] = Path("report"),
    seconds_per_mechanism: Annotated[float, typer.Option(help="Times the mechanisms: how long to check, compile and time.")] = 8.0,
    target: Targets = "sm_80,sm_90",
    device_name: Device = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two report.json: say what became slower or wronger, and which faults are caught no more."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check, compile, time and explain everything, and write a page about it."""
    mechanisms, where, targets = known(names), where_of(device_name), targets_of(target)
    duration(seconds_per_mechanism, "seconds-per-mechanism")
    if compare is not None:
        return _compare(*compare, as_json=as_json)
    from triton_attn.report import folder as pages
    from triton_attn.report import gather, tables, terminal

    # what cannot be written had better be known before minutes have gone by
    folder.mkdir(parents=True, exist_ok=True)
    (folder / pages.PAGE).open("a", encoding="utf-8").close()
    budget = min(seconds_per_mechanism * len(mechanisms), gather.LONGEST)
    machine = {
        "triton_attn": __version__,
        **device.describe(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    catalog, whole, start = {row.name: row for row in mechanisms}, math.ceil(budget), time.perf_counter()
    with terminal.progress(whole, json=as_json) as (tick, step):

        def note(text: str) -> None:
            tick(text)
            step(min(whole, int(time.perf_counter() - start)))

        results = gather.gather(catalog, machine, targets=targets, device=str(where), seconds=budget, tick=note)
    page = pages.write(results, folder)
    if as_json:
        print(json.dumps({"page": str(page), "wrong": results.wrong, "left_out": results.notes, "seconds": round(results.seconds, 1)}))
    else:
        terminal.show(tables.summary(catalog, results.calls, results.verdicts, results.compiled, results.timings))
        counted = f"checks, {len(results.compiled)} kernels compiled, {len(results.timings)} timings"
        terminal.conclude(len(results.verdicts), counted, results.wrong)
        terminal.say(str(page))
    return int(bool(results.wrong))


def _compare(before: Path, after: Path, *, as_json: bool) -> int:
    from triton_attn.report import comparison, tables, terminal

    try:
        changes = comparison.changes(comparison.read(before), comparison.read(after))
    except ValueError as error:
        raise BadArgument(str(error)) from error
    worse = [change for change in changes if change.worse]
    if as_json:
        print(json.dumps({"worse": [change.text for change in worse], "better": [change.text for change in changes if not change.worse]}))
    else:
        terminal.show(tables.changes(changes))
        terminal.conclude(len(changes), "changes beyond the noise of the two runs", [change.text for change in worse])
    return int(bool(worse))
