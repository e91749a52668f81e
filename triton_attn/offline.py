"""Compile any kernel for a GPU that is not here, through its ordinary launcher, and read what it would use.

Triton compiles without a GPU; only its launcher asks a driver which GPU it is. A stub answers, and tensors on the meta device
stand for the arguments. The interpreter must be off: it accepts what the compiler rejects, and the other way round.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from triton_attn import device, tiles
from triton_attn.mechanism import Case, Kernel, Launch, Mechanism
from triton_attn.testing import inputs
from triton_attn.tiles import Usage

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class CompileError(RuntimeError):
    """A kernel that the compiler rejects; the message is the compiler's."""


class _Driver:
    """What Triton's launcher asks of a driver before it compiles."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.code = capability[0] * 10 + capability[1]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.code, 32)

    def get_current_device(self) -> int:
        # never a real device's number, so that no compiled kernel is taken for one
        return -self.code

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@dataclass(frozen=True)
class Launched:
    """A compiled kernel, and how many programs it was launched with."""

    kernel: Any
    programs: int


def _programs(grid: Any, options: dict[str, Any]) -> int:
    return math.prod(grid(options) if callable(grid) else grid)


@contextlib.contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[list[Launched]]:
    """Inside, a launch compiles for `capability` and does not run; yields the list of what was launched so far."""
    if device.interpreting():
        raise CompileError("TRITON_INTERPRET=1 is set: interpreter and compiler cannot share a process")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Launched] = []
    launch = JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(Launched(launch(self, *args, grid=grid, warmup=True, **options), _programs(grid, options)))
        return compiled[-1].kernel

    active = driver._active  # `driver.active` would look for a GPU
    driver.set_active(_Driver(capability))
    JITFunction.run = warm
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        driver.set_active(active)


@contextlib.contextmanager
def recording() -> Iterator[list[Launched]]:
    """Inside, launches run as ever; yields the list of them. The interpreter compiles none, and none is listed."""
    from triton.runtime.jit import JITFunction

    compiled: list[Launched] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
        compiled.append(Launched(launch(self, *args, grid=grid, **options), _programs(grid, options)))
        return compiled[-1].kernel

    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = launch


def usage(kernel: Any) -> Usage:
    """Registers, spills, shared memory and instructions of one compiled kernel."""
    assembly = kernel.asm["ptx"]
    registers, stack = _resources(kernel.asm["cubin"])
    launched = re.search(r"\.(?:req|max)ntid\s+(\d+)", assembly)
    return Usage(
        registers=registers,
        spilled=stack,
        shared=kernel.metadata.shared,
        warps=int(launched[1]) // 32 if launched else kernel.metadata.num_warps,
        tensor_core=assembly.count("wgmma.mma_async") + len(re.findall(r"\bmma\.sync", assembly)),
        asynchronous=assembly.count("cp.async.c") + assembly.count("cp.async.bulk.tensor"),
        atomics=len(re.findall(r"\b(?:atom|red)\.", assembly)),
        specialised="setmaxnreg" in assembly,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise CompileError(f"cuobjdump said {said!r}")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Compiled:
    """One launch compiled with one tile for one target. `fault` says why the tile may not be used; empty if it may."""

    mechanism: str
    kernel: str
    launch: str
    target: str
    key: str
    tile: str
    usage: Usage | None
    blocks: int  # resident on one multiprocessor
    seconds: float
    fault: str = ""


REPRESENTATIVE = (tiles.Key("16bit", 64), tiles.Key("16bit", 128))


def representative(space: tiles.Space) -> tuple[tiles.Key, ...]:
    """A few keys of a space, for a quick look."""
    known = tuple(space.entries())
    return tuple(key for key in REPRESENTATIVE if key in known) or known[:1]


DTYPES = {"16bit": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}


def compile_rows(
    rows: Sequence[Mechanism],
    targets: Sequence[str],
    *,
    tables: bool = False,
    every: bool = False,
    seconds: float = float("inf"),
    jobs: int = 1,
    tick: Callable[[str], None] = lambda text: None,
) -> Iterator[Compiled]:
    """Compile launches for targets: representative keys with the tile a call would get, `tables` for every key, `every` for all
    candidate tiles. Past `seconds` the rest waits; `jobs` processes share the work."""
    tasks = []
    for row, target in product(rows, targets):
        for kernel, launch, space in launches_of(row, device.capability(target)):
            for key in space.entries() if tables or every else representative(space):
                full = f"{row.name}/{kernel.name}/{launch.name}"
                nominal = device.Profile(target, device.capability(target))
                candidates = space.of(nominal.capability, key) if every else (tiles.look_up(full, space, key, nominal).tile,)
                tasks += [(row.name, kernel.name, launch.name, key, (tile,), target) for tile in candidates]
    start = time.perf_counter()
    for task, result in shared_out(first_legal, tasks, jobs):
        tick(f"{task[0]}/{task[1]}/{task[2]} {task[-1]} {task[3]}")
        if result is not None:
            yield result
        if time.perf_counter() - start > seconds:
            return


Task = tuple[str, str, str, tiles.Key, tuple[tiles.Tile, ...], str]  # row, kernel, launch, key, candidates, target


def shared_out(run: Callable[[Asked], Answer], tasks: Sequence[Asked], jobs: int) -> Iterator[tuple[Asked, Answer]]:
    """Run tasks in order, in this process or in several."""
    if jobs == 1:
        yield from ((task, run(task)) for task in tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, task) for task in tasks]
        try:
            yield from ((task, future.result()) for task, future in zip(tasks, futures, strict=True))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def first_legal(task: Task) -> Compiled | None:
    """The first candidate that compiles, fits and does not spill; else the last; None where the kernel refuses such calls."""
    from triton_attn.catalog import CATALOG

    name, kernel_name, launch_name, key, candidates, target = task
    row = CATALOG[name]
    kernel = next(kernel for kernel in row.kernels if kernel.name == kernel_name)
    launch = next(launch for launch in kernel.launches if launch.name == launch_name)
    result = None
    for tile in candidates:
        result = compile_tile(row, kernel, launch, key, tile, target)
        if result.usage is None and not result.fault:
            return None
        if not result.fault:
            break
    return result


def launches_of(row: Mechanism, capability: tuple[int, int]) -> Iterator[tuple[Kernel, Launch, tiles.Space]]:
    for kernel in row.kernels:
        if capability in kernel.capabilities:
            spaces = kernel.load().spaces
            for launch in kernel.launches:
                yield kernel, launch, spaces[launch.name]


def compile_tile(row: Mechanism, kernel: Kernel, launch: Launch, key: tiles.Key, tile: tiles.Tile, target: str) -> Compiled:
    """Compile one launch with one tile: the row's most demanding calls for this key, the worst of which counts."""
    capability, start = device.capability(target), time.perf_counter()
    limits = device.LIMITS[capability]
    worst, fault = None, ""
    try:
        for case in row.probes(key.width, key.plain):
            for used in (part.usage for part in parts(row, kernel, launch, key.operands, tile, capability, case)):
                fault = fault or tiles.illegal(used, limits)
                worst = used if worst is None else max(worst, used, key=_demand)
    except Exception as error:  # noqa: BLE001  the compiler's own errors have no common base
        fault = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    blocks = tiles.blocks_per_multiprocessor(worst, limits) if worst else 0
    spent = time.perf_counter() - start
    return Compiled(row.name, kernel.name, launch.name, target, str(key), str(tile), worst, blocks, spent, fault)


@dataclass(frozen=True)
class Part:
    """One kernel of a launch: how many programs its grid has, and what each takes."""

    programs: int
    usage: Usage


def parts(
    row: Mechanism, kernel: Kernel, launch: Launch, operands: str, tile: tiles.Tile, capability: tuple[int, int], case: Case
) -> list[Part]:
    """Compile one call: every kernel that it launches; none where the kernel refuses it."""
    tensors, options = inputs.meta(row, case, DTYPES[operands])
    code = kernel.load()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if operands == "float32" else "high")
    try:
        if kernel.refuses(tensors, options):
            return []
        with compiling_for(capability) as compiled:
            if not launch.gradients:
                code.forward(**tensors, **options, tile={launch.name: tile})
            else:
                made = {
                    name: torch.empty(
                        inputs.shape(given.axes, case.sizes),
                        dtype=torch.float32 if given.dtype == "float32" else DTYPES[operands],
                        device="meta",
                    )
                    for name, given in row.outputs.items()
                }
                first, *others = made.values()
                needs = tuple(name in launch.gradients for name in row.differentiable)
                code.backward(first, *(None for _ in others), **tensors, **made, **options, needs=needs, tile={launch.name: tile})
    finally:
        torch.set_float32_matmul_precision(precision)
    return [Part(each.programs, usage(each.kernel)) for each in compiled]


def _demand(used: Usage) -> tuple[int, int, int]:
    return used.spilled, used.registers, used.shared
