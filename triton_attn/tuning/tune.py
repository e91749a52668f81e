"""Tune on the GPU that is here: every tile of a call's launches, judged against the reference first and timed only if it is right.

What is tuned is a *task*: one launch of one kernel for one key, at the sizes of one call. What is found is a row of evidence per
tile, a `Trial`; the fastest right one wins.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from triton_attn import device, dispatch, offline, tiles, verify
from triton_attn.mechanism import Case, Kernel, Launch, Mechanism
from triton_attn.testing import inputs
from triton_attn.tuning import roofline

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
# lengths of the call on which a tile is judged: several tiles and a ragged rest of any, and float64 stays cheap
JUDGED_AT: Mapping[str, int] = {"m": 200, "n": 300, "l": 200, "k": 40, "p": 6}
MOST_COPIES = 8


@dataclass(frozen=True)
class Task:
    """One launch to be tuned for one key, at the sizes of one call."""

    row: Mechanism
    kernel: Kernel
    launch: Launch
    case: Case
    dtype: str  # of DTYPES
    key: tiles.Key

    @property
    def name(self) -> str:
        """As the tables name the launch."""
        return f"{self.row.name}/{self.kernel.name}/{self.launch.name}"

    @property
    def space(self) -> tiles.Space:
        """The launch's tiles."""
        return self.kernel.load().spaces[self.launch.name]  # type: ignore[no-any-return]

    @property
    def hash(self) -> str:
        """Of the kernel's sources."""
        return tiles.source_hash(self.space.modules)


@dataclass(frozen=True)
class Trial:
    """One tile of one task. `fault` says why it may not win: wrong, illegal, or not to be launched; empty if it may."""

    launch: str
    key: str
    tile: str
    sizes: str
    dtype: str
    device: str
    triton: str
    hash: str
    milliseconds: float | None = None  # median
    spread: float | None = None  # between the 20th and the 80th of 100 runs, as share of the median
    share: float | None = None  # the worst error, as share of its bound
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    blocks: int | None = None  # resident on one multiprocessor
    fault: str = ""
    target: str = ""  # the device's capability
    predicted: float | None = None  # milliseconds by `roofline`, which knows of no time


class DeviceLost(RuntimeError):
    """The GPU answers no more, as after an access out of bounds: whatever this process tried next would fail, right or wrong."""


class Clock(Protocol):
    """Times calls that do the same work on different inputs."""

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
        """(median in milliseconds, spread as share of it)."""


def gpu_clock(calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
    """Triton's own benchmark, which also empties the second-level cache before each run."""
    from triton.testing import do_bench

    turns = itertools.cycle(calls)
    low, median, high = do_bench(lambda: next(turns)(), warmup=10, rep=60, quantiles=[0.2, 0.5, 0.8])
    return float(median), float((high - low) / median)


class precision:
    """float32 products inside as a dtype's name says: "tf32" rounds them, "float32" does not."""

    def __init__(self, dtype: str) -> None:
        self.wanted = "high" if dtype == "tf32" else "highest"

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.wanted)

    def __exit__(self, *error: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def plan(
    rows: Iterable[Mechanism], cases: Callable[[Mechanism], Iterable[Case]], dtypes: Sequence[str], profile: device.Profile
) -> list[Task]:
    """The tasks of some calls on a device, each launch and key once: the first call that needs it stands for the others."""
    found: dict[tuple[str, str], Task] = {}
    for row in rows:
        for case, dtype in itertools.product(cases(row), dtypes):
            for task in tasks_of(row, case, dtype, profile):
                found.setdefault((task.name, str(task.key)), task)
    return list(found.values())


def tasks_of(row: Mechanism, case: Case, dtype: str, profile: device.Profile) -> Iterator[Task]:
    """What one call launches, forward and backward, by every kernel that serves it on this device."""
    tensors, options = inputs.meta(row, case, DTYPES[dtype])
    options = {**row.defaults, **options}
    for kernel in row.kernels:
        if dispatch.capability_refusal(kernel, profile.capability) or kernel.refuses(tensors, options):
            continue
        with precision(dtype):
            key = kernel.load().key(tensors, options)
        for launch in kernel.launches:
            yield Task(row, kernel, launch, case, dtype, key)


def tune(
    tasks: Sequence[Task],
    where: torch.device,
    *,
    profile: device.Profile,
    clock: Clock = gpu_clock,
    known: Callable[[Task], Mapping[str, Trial]] = lambda task: {},
    seconds: float = math.inf,
    judged_at: Mapping[str, int] = JUDGED_AT,
    tick: Callable[[str], None] = lambda text: None,
    tried: Callable[[Trial], object] = lambda trial: None,
) -> Iterator[tuple[Task, list[Trial]]]:
    """Each task with the trials of all of its tiles; `known` are those of an earlier run, and `tried` is told of each new one.

    Past `seconds` no new tile begins. DeviceLost if the GPU answers no more.
    """
    start = time.perf_counter()
    for task in tasks:
        earlier = known(task)
        trials = []
        for tile in task.space.of(profile.capability, task.key):
            trial = earlier.get(str(tile))
            if trial is None:
                if time.perf_counter() - start > seconds:
                    return
                tick(f"{task.name} {task.key} {tile}")
                trial = try_tile(task, tile, where, profile=profile, clock=clock, judged_at=judged_at)
                tried(trial)
                if trial.fault and not answers(where):
                    raise DeviceLost(f"{task.name} {task.key} {tile}: {trial.fault}: the GPU answers no more")
            trials.append(trial)
        yield task, trials


def answers(where: torch.device) -> bool:
    """Whether a device still does what it is asked to."""
    try:
        if where.type == "cuda":
            torch.cuda.synchronize(where)
    except RuntimeError:
        return False
    return True


def try_tile(
    task: Task, tile: tiles.Tile, where: torch.device, *, profile: device.Profile, clock: Clock, judged_at: Mapping[str, int] = JUDGED_AT
) -> Trial:
    """Judge one tile on a small call; if it is right and legal, time it on the task's own."""
    sizes = " ".join(f"{axis}={size}" for axis, size in task.case.sizes.items())
    target = device.architecture(profile.capability)
    trial = Trial(task.name, str(task.key), str(tile), sizes, task.dtype, profile.name, device.triton_version(), task.hash, target=target)
    try:
        with precision(task.dtype):
            trial = _judged(trial, task, tile, where, profile, judged_at)
            if trial.fault:
                return trial
            calls = _calls(task, tile, where)
            trial = replace(trial, predicted=_predicted(task, tile, calls[0], profile))
            median, spread = clock(calls)
    except Exception as error:  # noqa: BLE001  out of resources, out of memory, a compiler's error: no common base, and all say "not this one"
        said = str(error).strip().splitlines()
        return replace(trial, fault=f"{type(error).__name__}: {said[0] if said else ''}"[:300])
    return replace(trial, milliseconds=median, spread=spread)


def winner(trials: Iterable[Trial]) -> Trial | None:
    """The fastest that has no fault."""
    return min((trial for trial in trials if trial.milliseconds is not None and not trial.fault), key=_time, default=None)


def _time(trial: Trial) -> float:
    return math.inf if trial.milliseconds is None else trial.milliseconds


def _judged(
    trial: Trial, task: Task, tile: tiles.Tile, where: torch.device, profile: device.Profile, judged_at: Mapping[str, int]
) -> Trial:
    small = shortened(task.row, task.case, judged_at)
    run = verify.kernel_run(task.row, task.kernel.load(), {task.launch.name: tile})
    compared = verify.judge(task.row, small, run, dtype=DTYPES[task.dtype], where=where, tf32=task.dtype == "tf32")
    share = max(comparison.share for comparison in compared)
    trial = replace(trial, share=share if math.isfinite(share) else None, fault="; ".join(c.fault for c in compared if c.fault))
    limits = device.LIMITS[profile.capability]
    alone = _call(replace(task, case=small), tile, where, seed=0)
    with offline.recording() as launched:
        alone()
    used = [offline.usage(each.kernel) for each in launched]
    if used:  # the interpreter compiles nothing
        worst = max(used, key=lambda usage: (usage.spilled, usage.registers, usage.shared))
        blocks = tiles.blocks_per_multiprocessor(worst, limits)
        illegal = next(filter(None, (tiles.illegal(usage, limits) for usage in used)), "")
        trial = replace(trial, registers=worst.registers, spilled=worst.spilled, shared=worst.shared, blocks=blocks)
        trial = replace(trial, fault=trial.fault or illegal)
    return trial


def _predicted(task: Task, tile: tiles.Tile, call: Callable[[], Any], profile: device.Profile) -> float | None:
    """What the roofline says of the call's launches; None where nothing is compiled, or nobody knows the device's peaks."""
    with offline.recording() as launched:
        call()
    if not launched or profile.capability not in device.PEAKS:
        return None
    parts = [offline.Part(each.programs, offline.usage(each.kernel)) for each in launched]
    guess = roofline.predict_tile(task.row, task.launch, task.case, task.key.operands, tile, parts, profile)
    return guess.milliseconds if math.isfinite(guess.milliseconds) else None


def shortened(row: Mechanism, case: Case, most: Mapping[str, int] = JUDGED_AT) -> Case:
    """The same call with shorter lengths."""
    sizes = {axis: min(size, most.get(axis, size)) for axis, size in case.sizes.items()}
    return Case("judged", row.fitted(sizes, case.options), case.options)


def _calls(task: Task, tile: tiles.Tile, where: torch.device) -> list[Callable[[], Any]]:
    """The launch on so many inputs that none is still in the second-level cache when its turn comes again."""
    calls = [_call(task, tile, where, seed=0)]
    tensors, _ = inputs.meta(task.row, task.case, DTYPES[task.dtype])
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values() if tensor is not None)
    copies = min(MOST_COPIES, -(-2 * device.cache_size(where) // max(held, 1)))
    return calls + [_call(task, tile, where, seed=seed) for seed in range(1, copies)]


def _call(task: Task, tile: tiles.Tile, where: torch.device, *, seed: int) -> Callable[[], Any]:
    row, code, chosen = task.row, task.kernel.load(), {task.launch.name: tile}
    tensors, options = inputs.draw(row, task.case, dtype=DTYPES[task.dtype], device=where, seed=seed)
    options = {**row.defaults, **options}
    if not task.launch.gradients:
        return lambda: code.forward(**tensors, **options, tile=chosen)
    outputs = code.forward(**tensors, **options, **{row.more: True})
    named = dict(zip(row.outputs, outputs, strict=True))
    grads = [torch.randn_like(outputs[0]), *(None for _ in outputs[1:])]
    needs = tuple(name in task.launch.gradients and tensors[name] is not None for name in row.differentiable)
    return lambda: code.backward(*grads, **tensors, **named, **options, needs=needs, tile=chosen)
