"""Rank the candidates of launches by the model of `roofline`, without a GPU: what was compiled is kept in a file and not compiled again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from triton_attn import device, offline, tiles
from triton_attn.mechanism import Case, Mechanism
from triton_attn.offline import Part
from triton_attn.tuning import roofline
from triton_attn.tuning.ledger import read_trials
from triton_attn.tuning.tune import Task, Trial, plan

HAND = "hand order"


@dataclass(frozen=True)
class Built:
    """One tile of one task, compiled for one target: a line of `<target>.compiled.jsonl`."""

    launch: str
    key: str
    call: str  # its sizes and options
    tile: str
    target: str
    triton: str
    hash: str
    parts: tuple[Part, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class Ranked:
    """A candidate: its place by the prediction and in the kernel's own list, both from 1. `fault` says why it may not run."""

    launch: str
    key: str
    sizes: str
    target: str
    tile: str
    place: int
    listed: int
    milliseconds: float | None  # predicted
    bound: str
    registers: int | None
    spilled: int | None
    shared: int | None
    blocks: int
    fault: str = ""


@dataclass(frozen=True)
class Correlation:
    """How far two orders of a launch's tiles agree: 1 the same, 0 unrelated, -1 reversed; None of fewer than three tiles."""

    launch: str
    key: str
    target: str
    beside: str  # the hand order, or the device whose times these are
    tiles: int
    spearman: float | None


def rank(
    tasks: Sequence[Task],
    target: str,
    folder: Path,
    *,
    jobs: int = 1,
    anew: bool = False,
    seconds: float = math.inf,
    tick: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Task, list[Ranked]]]:
    """Each task with all of its candidates, the fastest by the prediction first. Past `seconds` no further key begins."""
    path, start = folder / f"{target}.compiled.jsonl", time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    if anew:
        path.unlink(missing_ok=True)
    known = {_name(built): built for built in read_built(path)}
    wanted = [
        (task, [_empty(task, tile, target, task_hash) for tile in task.space.of(device.capability(target), task.key)])
        for task, task_hash in ((task, task.hash) for task in tasks)
    ]
    missing = [(task, built) for task, group in wanted for built in group if _name(built) not in known]
    compiled = offline.shared_out(_compile, [_packed(*pair) for pair in missing], jobs)
    with path.open("a", encoding="utf-8") as file:
        for task, group in wanted:
            if time.perf_counter() - start > seconds:
                return
            for built in group:
                if _name(built) not in known:
                    tick(f"{task.name} {target} {task.key} {built.tile}")
                    _, known[_name(built)] = next(compiled)
                    file.write(f"{json.dumps(asdict(known[_name(built)]), allow_nan=False)}\n")
                    file.flush()
            yield task, ordered(task, [known[_name(built)] for built in group], target)


def kept(rows: Sequence[Mechanism], target: str, folder: Path) -> Iterator[tuple[Task, list[Built]]]:
    """Of the rows' workloads the tasks of which a folder has every candidate, of these sources and this compiler."""
    known = {_name(built): built for built in read_built(folder / f"{target}.compiled.jsonl")}
    launches, profile = {name[0] for name in known}, device.Profile(target, device.capability(target))
    named = [row for row in rows if any(name.startswith(f"{row.name}/") for name in launches)]
    for task in plan(named, lambda row: row.workloads["cuda"], ("bfloat16",), profile):
        if task.name in launches:
            task_hash = task.hash
            wanted = [_name(_empty(task, tile, target, task_hash)) for tile in task.space.of(profile.capability, task.key)]
            if all(name in known for name in wanted):
                yield task, [known[name] for name in wanted]


def differs(task: Task, built: Built) -> str:
    """Compile a candidate again: what is not as it was, or an empty string."""
    found = _compile(_packed(task, replace(built, parts=(), fault="")))
    return "" if found == built else f"{built.launch} {built.target} {built.key} {built.tile}: compiled to something else than is kept"


def ordered(task: Task, compiled: Sequence[Built], target: str) -> list[Ranked]:
    """Candidates in the kernel's own order -> by prediction; what may not run comes last, and equal ones keep the kernel's order."""
    profile = device.Profile(target, device.capability(target))
    limits, found = device.LIMITS[profile.capability], []
    for listed, built in enumerate(compiled, 1):
        tile = tiles.Tile.parse(built.tile)
        guess = roofline.predict_tile(task.row, task.launch, task.case, task.key.operands, tile, built.parts, profile)
        used = max((part.usage for part in built.parts), key=lambda used: (used.spilled, used.registers, used.shared), default=None)
        fault = built.fault or next(filter(None, (tiles.illegal(part.usage, limits) for part in built.parts)), "")
        found.append((math.inf if fault else guess.milliseconds, listed, built, guess.bound, used, fault))
    sizes = " ".join(f"{axis}={size}" for axis, size in task.case.sizes.items())
    return [
        Ranked(
            built.launch,
            built.key,
            sizes,
            target,
            built.tile,
            place,
            listed,
            time if math.isfinite(time) else None,
            bound,
            used.registers if used else None,
            used.spilled if used else None,
            used.shared if used else None,
            tiles.blocks_per_multiprocessor(used, limits) if used else 0,
            fault,
        )
        for place, (time, listed, built, bound, used, fault) in enumerate(sorted(found, key=lambda each: each[:2]), 1)
    ]


def correlations(task: Task, ranked: Sequence[Ranked], trials: Sequence[Trial] = ()) -> Iterator[Correlation]:
    """The predicted order beside the hand order, and beside the times of each device of the target that has measured them."""
    times = {row.tile: row.milliseconds for row in ranked if row.milliseconds is not None}
    target = ranked[0].target if ranked else ""
    listed = {row.tile: float(row.listed) for row in ranked}
    yield _beside(task.name, str(task.key), target, HAND, times, listed)
    same = [
        trial for trial in trials if (trial.launch, trial.key, trial.hash, trial.target) == (task.name, str(task.key), task.hash, target)
    ]
    for name in dict.fromkeys(trial.device for trial in same):
        measured = {trial.tile: trial.milliseconds for trial in same if trial.device == name and not trial.fault}
        yield _beside(task.name, str(task.key), target, name, times, measured)


def of_trials(trials: Sequence[Trial]) -> list[Correlation]:
    """The same of what was tried on a GPU: each launch and key's predicted times beside the measured ones."""
    groups: dict[tuple[str, str, str, str], list[Trial]] = {}
    for trial in trials:
        if trial.target:
            groups.setdefault((trial.launch, trial.key, trial.target, trial.device), []).append(trial)
    return [
        _beside(
            *names, {trial.tile: trial.predicted for trial in group}, {trial.tile: trial.milliseconds for trial in group if not trial.fault}
        )
        for names, group in groups.items()
    ]


def _beside(
    launch: str, key: str, target: str, beside: str, one: Mapping[str, float | None], other: Mapping[str, float | None]
) -> Correlation:
    pairs = [(time, other[tile]) for tile, time in one.items() if time is not None and other.get(tile) is not None]
    times, others = [float(pair[0]) for pair in pairs], [float(pair[1] or 0.0) for pair in pairs]
    return Correlation(launch, key, target, beside, len(pairs), roofline.spearman(times, others))


def measured_in(folder: Path) -> list[Trial]:
    """Every trial that lies in a folder, of whatever device."""
    return [trial for path in sorted(folder.glob("*.trials.jsonl")) for trial in read_trials(path)]


def read_built(path: Path) -> list[Built]:
    """What was compiled, by a file. A line that is none is passed over: a killed run may have left half of one."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            parts = tuple(Part(int(part["programs"]), tiles.Usage(**part["usage"])) for part in record["parts"])
            found.append(Built(**{**record, "parts": parts}))
        except (ValueError, TypeError, KeyError):
            continue
    return found


def _name(built: Built) -> tuple[str, ...]:
    return (built.launch, built.key, built.call, built.tile, built.target, built.triton, built.hash)


def _empty(task: Task, tile: tiles.Tile, target: str, source_hash: str) -> Built:
    call = json.dumps([dict(task.case.sizes), dict(task.case.options)], sort_keys=True, default=str)
    return Built(task.name, str(task.key), call, str(tile), target, device.triton_version(), source_hash)


Packed = tuple[str, str, str, Case, str, Built]  # row, kernel, launch by their names: a process has its own catalogue


def _packed(task: Task, built: Built) -> Packed:
    return task.row.name, task.kernel.name, task.launch.name, task.case, task.key.operands, built


def _compile(packed: Packed) -> Built:
    from triton_attn.catalog import CATALOG

    name, kernel_name, launch_name, case, operands, built = packed
    row: Mechanism = CATALOG[name]
    kernel = next(kernel for kernel in row.kernels if kernel.name == kernel_name)
    launch = next(launch for launch in kernel.launches if launch.name == launch_name)
    try:
        parts = offline.parts(row, kernel, launch, operands, tiles.Tile.parse(built.tile), device.capability(built.target), case)
    except Exception as error:  # noqa: BLE001  the compiler's own errors have no common base, and a tile that does not compile is a result
        said = str(error).strip().splitlines()
        return replace(built, fault=f"does not compile: {type(error).__name__}: {said[0] if said else ''}"[:300])
    return replace(built, parts=tuple(parts), fault="" if parts else "the kernel refuses such calls")
