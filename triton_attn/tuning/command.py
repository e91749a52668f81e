"""triton-attn tune."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from triton_attn import device, tiles
from triton_attn.command_line import BadArgument, Device, Json, Names, Targets, duration, known, targets_of, where_of
from triton_attn.mechanism import Case, Mechanism

if TYPE_CHECKING:
    from triton_attn.tuning.tune import Clock, Task

EVERY = 7  # with --check, of the keys of a table
PREDICTED = "Predicted order beside others, Spearman's rank correlation"


def tune(
    names: Names = None,
    size: Annotated[
        list[str] | None, typer.Option("--size", "--sizes", help="Size of an axis of every workload, like n=4096; may be repeated.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16, float32 or tf32; may be repeated.")] = None,
    budget: Annotated[float, typer.Option(help="Begin no further tile after so many seconds.", show_default=False)] = math.inf,
    resume: Annotated[bool, typer.Option("--resume/--anew", help="Keep what an earlier run has tried, or begin again.")] = True,
    folder: Annotated[
        Path | None, typer.Option(help="Where table and trials go; by default where calls look for the user's tables.")
    ] = None,
    device_name: Device = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Without a GPU: the first tile that compiles, fits and does not spill.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="With --offline: write nothing; say whether the tables still hold.")] = False,
    rank: Annotated[
        bool, typer.Option("--rank", help="With --offline: write no table; order every candidate by the time that a model predicts.")
    ] = False,
    target: Targets = "sm_80,sm_90",
    jobs: Annotated[int, typer.Option(min=1, help="With --offline: how many processes compile.")] = 1,
    as_json: Json = False,
) -> int:
    """Choose tiles: on a GPU every candidate is judged, then timed; with --offline compiled. Calls take them from the table written."""
    mechanisms, wanted = known(names), duration(budget, "budget")
    if not device.triton_version():
        raise BadArgument("triton is not installed: there is nothing to tune")
    if device.interpreting():
        raise BadArgument("TRITON_INTERPRET=1 is set, which replaces the compiler; unset it")
    if dtype:
        from triton_attn.tuning.tune import DTYPES

        for one in dtype:
            if one not in DTYPES:
                raise BadArgument(f"dtype is {one!r}; allowed: {', '.join(DTYPES)}")
    if rank and (check or not offline):
        raise BadArgument("--rank is given " + ("with --check, which writes nothing either" if check else "without --offline"))
    if rank:
        place, asked = _place(folder), (size or (), dtype or ("bfloat16",))
        return show_ranks(mechanisms, targets_of(target), place, *asked, jobs=jobs, budget=wanted, resume=resume, as_json=as_json)
    if offline:
        return _offline(mechanisms, targets_of(target), folder or tiles.SHIPPED, jobs, check=check, anew=not resume, as_json=as_json)
    if check:
        raise BadArgument("--check is given without --offline")
    where = where_of(device_name)
    if where.type != "cuda":
        raise BadArgument("no GPU is here, so nothing can be timed; --offline chooses by what the compiler says")
    from triton_attn.tuning.tune import gpu_clock

    return run(
        mechanisms,
        where,
        _place(folder),
        sizes=size or (),
        dtypes=dtype or ("bfloat16",),
        budget=wanted,
        resume=resume,
        as_json=as_json,
        clock=gpu_clock,
    )


def _place(folder: Path | None) -> Path:
    place = folder or device.user_tables()
    if place is None:
        raise BadArgument("folder is not given, TRITON_ATTN_TILES is not set and platformdirs is not installed")
    if place.is_file():
        raise BadArgument(f"folder is {place}, which is a file; allowed: a folder")
    return place


def _planned(mechanisms: Sequence[Mechanism], sizes: Sequence[str], dtypes: Sequence[str], profile: device.Profile) -> list[Task]:
    """The tasks of the workloads at the sizes given."""
    from triton_attn.report import calls
    from triton_attn.tuning import tune as tuner

    def cases(row: Mechanism) -> Iterable[Case]:
        for case in row.workloads["cuda"]:
            # of several mechanisms, each takes the sizes of the axes that it has
            given = [text for text in sizes if text.partition("=")[0] in case.sizes or len(mechanisms) == 1]
            yield calls.sized(row.name, case, given)

    try:
        return tuner.plan(mechanisms, cases, dtypes, profile)
    except ValueError as error:
        raise BadArgument(str(error)) from error


def run(
    mechanisms: Sequence[Mechanism],
    where: torch.device,
    folder: Path,
    *,
    clock: Clock,
    sizes: Sequence[str] = (),
    dtypes: Sequence[str] = ("bfloat16",),
    budget: float = math.inf,
    resume: bool = True,
    as_json: bool = False,
) -> int:
    """Tune a device's workloads; 1 if some key has no tile that is right."""
    from triton_attn.report import terminal, tile_tables
    from triton_attn.tuning import ranking
    from triton_attn.tuning import tune as tuner
    from triton_attn.tuning.ledger import Ledger

    profile = device.profile(where.index or 0)
    tasks = _planned(mechanisms, sizes, dtypes, profile)
    ledger = Ledger(folder, profile, anew=not resume)
    gone = list[str]()
    found: list[tuple[Task, list[tuner.Trial]]] = []
    with terminal.progress(len(tasks), json=as_json) as (tick, step):
        options: dict[str, Any] = {"known": ledger.known, "tried": ledger.keep, "seconds": budget, "tick": tick}
        try:
            for task, trials in tuner.tune(tasks, where, profile=profile, clock=clock, **options):
                ledger.note(task, trials)
                found.append((task, trials))
                step(len(found))
                if as_json:
                    for trial in trials:
                        print(json.dumps(asdict(trial)), flush=True)
        except tuner.DeviceLost as error:
            gone.append(str(error))
    lost = gone + [f"{task.name} {task.key}: no tile is right" for task, trials in found if tuner.winner(trials) is None]
    if not as_json:
        tried = [trial for _, trials in found for trial in trials]
        terminal.show(tile_tables.tuned(tried))
        terminal.show(tile_tables.correlations(ranking.of_trials(tried)), PREDICTED)
        terminal.conclude(len(found), "keys tuned", lost)
        terminal.say(str(ledger.table))
    if len(found) < len(tasks):
        terminal.complain(f"{len(tasks) - len(found)} keys had no time: the same command goes on with them")
    return int(bool(lost))


def show_ranks(
    mechanisms: Sequence[Mechanism],
    targets: Sequence[str],
    folder: Path,
    sizes: Sequence[str],
    dtypes: Sequence[str],
    *,
    jobs: int = 1,
    budget: float = math.inf,
    resume: bool = True,
    as_json: bool = False,
) -> int:
    """Every candidate of the workloads' keys by predicted time, how far this order agrees with others; 1 if no tile of a key may run."""
    from triton_attn.report import terminal, tile_tables
    from triton_attn.tuning import ranking, roofline

    lost, count, trials = [], 0, ranking.measured_in(folder)
    correlated: list[ranking.Correlation] = []
    for target in targets:
        profile = device.Profile(target, device.capability(target))
        try:
            roofline.peaks_of(profile)
        except ValueError as error:
            raise BadArgument(str(error)) from error
        tasks, begun = _planned(mechanisms, sizes, dtypes, profile), count
        with terminal.progress(len(tasks), json=as_json) as (tick, step):
            for task, ranked in ranking.rank(tasks, target, folder, jobs=jobs, anew=not resume, seconds=budget, tick=tick):
                count += 1
                step(count - begun)
                beside = list(ranking.correlations(task, ranked, trials))
                correlated += beside
                if all(row.fault for row in ranked):
                    lost.append(f"{task.name} {target} {task.key}: no tile may run")
                records = [*map(asdict, ranked), *map(asdict, beside)]
                for record in records if as_json else ():
                    print(json.dumps(record), flush=True)
                if not as_json:
                    terminal.show(tile_tables.ranked(ranked), f"{task.name} {target} {task.key}, {ranked[0].sizes}")
        if count - begun < len(tasks):
            terminal.complain(f"{target}: {len(tasks) - count + begun} keys had no time: the same command goes on with them")
    if not as_json:
        terminal.show(tile_tables.correlations(correlated), PREDICTED)
        terminal.conclude(count, "keys ranked by a model that no GPU has confirmed", lost)
    return int(bool(lost))


def _offline(
    mechanisms: Sequence[Mechanism], targets: Sequence[str], folder: Path, jobs: int, *, check: bool, anew: bool, as_json: bool
) -> int:
    """Tables of GPUs that need not be here; with `check` whether a sample of their entries still compiles, fits and is not stale."""
    from triton_attn.report import terminal
    from triton_attn.tuning import without_gpu

    faults, looked = [], 0
    for target in targets:
        path = folder / f"{target}.json"
        before = {} if anew or not path.exists() else tiles.read(path)
        with terminal.progress(None, json=as_json) as (tick, _):
            if check:
                entries = without_gpu.recheck(mechanisms, target, before, every=EVERY, jobs=jobs, tick=tick)
                faults += [f"{path.name}: {fault}" for fault in entries if fault]
                looked += len(entries)
                continue
            chosen = without_gpu.choose_tiles(mechanisms, target, start=before, jobs=jobs, tick=tick)
        folder.mkdir(parents=True, exist_ok=True)
        tiles.write(path, {**(tiles.read(path) if path.exists() else {}), **chosen}, {"by": "triton-attn tune --offline"})
        terminal.say(str(path))
    if check and as_json:
        print(json.dumps({"checked": looked, "wrong": faults}))
    elif check:
        terminal.conclude(looked, "entries compiled again", faults)
    return int(bool(faults))
