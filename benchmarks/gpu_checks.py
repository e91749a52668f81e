"""What is checked on a GPU: every kernel, case and tile against float64, the same bits again and again, sizes beyond what integers hold."""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import triton_attn
from benchmarks.evidence import Check
from triton_attn import CATALOG, device, dispatch, tiles, verify
from triton_attn.mechanism import Case, Code, Kernel, Launch, Mechanism
from triton_attn.testing import inputs
from triton_attn.tuning.tune import precision, shortened

WHERE = torch.device("cuda", 0)
DTYPES = {"16bit": (torch.float16, torch.bfloat16), "float32": (torch.float32,), "tf32": (torch.float32,)}
JUDGED = (torch.float16, torch.bfloat16, torch.float32)
LONGER = {"m": 13, "n": 13, "l": 13}  # times as long as the catalogue's small cases: several tiles
REPEATS = 250
SANITIZER, PATIENCE = "compute-sanitizer", 110.0
Row = dict[str, Any]


def correctness() -> Iterator[Check]:
    """What calls get first: cases, shipped tiles, bits, sizes; then the sanitizer, and the tiles that only a tuner would try."""
    yield from of_cases()
    yield from of_tiles(shipped=True)
    yield from of_behaviour()
    yield from of_sizes()
    yield from of_the_sanitizer()
    yield from of_tiles(shipped=False)


def launches(row: Mechanism) -> Iterator[tuple[Kernel, Code, Launch]]:
    """What runs on this GPU."""
    for kernel in row.kernels:
        if not dispatch.capability_refusal(kernel, device.profile(0).capability):
            code = kernel.load()
            for launch in kernel.launches:
                yield kernel, code, launch


def kernels(row: Mechanism) -> list[Kernel]:
    """The kernels that run on this GPU."""
    return list(dict.fromkeys(kernel for kernel, _, _ in launches(row)))


def sources(row: Mechanism) -> str:
    """A hash of all that a mechanism's kernels are made of: its forward may be one's and its backward another's."""
    modules = {module for kernel in row.kernels for space in kernel.load().spaces.values() for module in space.modules}
    return _hash_of(tuple(sorted(modules, key=lambda module: module.__name__)))


@functools.cache
def _hash_of(modules: tuple[ModuleType, ...]) -> str:
    return tiles.source_hash(modules)


def longer(row: Mechanism, case: Case) -> Case:
    """A small case of the catalogue at a length of several tiles."""
    sizes = {axis: size * LONGER.get(axis, 1) for axis, size in case.sizes.items()}
    return replace(case, sizes=row.fitted(sizes, case.options))


def of_cases() -> Iterator[Check]:
    """Every row, kernel, case and dtype, short and long, with the tiles that calls get."""
    for row in CATALOG.values():
        for kernel in kernels(row):
            for length, case in [("", case) for case in row.cases] + [(", longer", longer(row, case)) for case in row.cases]:
                for dtype in JUDGED:
                    if not kernel.refuses(*inputs.meta(row, case, dtype)):
                        name = f"{row.name}/{kernel.name} {case.name}{length} {_short(dtype)}"
                        yield Check(name, sources(row), partial(judged, row, kernel, case, dtype))


def of_tiles(*, shipped: bool) -> Iterator[Check]:
    """Every candidate of every launch and key: those that a shipped table names, or all others."""
    capability = device.profile(0).capability
    for row in CATALOG.values():
        for kernel, code, launch in launches(row):
            space, full = code.spaces[launch.name], f"{row.name}/{kernel.name}/{launch.name}"
            for key in space.entries():
                named = shipped_tiles(full, key)
                for tile in dict.fromkeys([*named, *space.of(capability, key)]):
                    if (tile in named) != shipped:
                        continue
                    for place, probe in enumerate(row.probes(key.width, key.plain)):
                        dtype, case = DTYPES[key.operands][-1], shortened(row, probe)
                        if not kernel.refuses(*inputs.meta(row, case, dtype)):
                            tf32 = key.operands == "tf32"
                            run = partial(judged, row, kernel, case, dtype, {launch.name: tile}, operands=key.operands, tf32=tf32)
                            yield Check(f"{full} {key} {tile}, probe {place}", sources(row), run)


def shipped_tiles(launch: str, key: tiles.Key) -> list[tiles.Tile]:
    """What the shipped tables of this device and of its capability name."""
    profile, found = device.profile(0), list[tiles.Tile]()
    for stem in (tiles.slug(profile.name), device.architecture(profile.capability)):
        path = tiles.SHIPPED / f"{stem}.json"
        entries = tiles.read(path).get(launch, {"tiles": {}})["tiles"] if path.exists() else {}
        found += [tile for text, tile in entries.items() if tiles.Key.parse(text).anywhere == key.anywhere]
    return found


def judged(
    row: Mechanism,
    kernel: Kernel,
    case: Case,
    dtype: torch.dtype,
    tile: dict[str, tiles.Tile] | None = None,
    *,
    operands: str = "float32",
    tf32: bool = False,
) -> Row:
    """Outputs and gradients against the reference in float64."""
    said = _said(row, kernel, case, dtype) | {"tile": None if tile is None else {name: str(one) for name, one in tile.items()}}
    try:
        with precision(operands):
            comparisons = verify.judge(row, case, verify.kernel_run(row, kernel.load(), tile), dtype=dtype, where=WHERE, tf32=tf32)
    except Exception as error:  # noqa: BLE001  out of resources is a result here, and has no base class of its own
        return said | {"share": None, "fault": _complaint(error)}
    worst = max(comparisons, key=lambda c: c.share)
    share = worst.share if math.isfinite(worst.share) else None
    return said | {"share": share, "worst": worst.name, "fault": "; ".join(c.fault for c in comparisons if c.fault)}


def _said(row: Mechanism, kernel: Kernel, case: Case, dtype: torch.dtype) -> Row:
    return {"row": row.name, "kernel": kernel.name, "case": case.name, "sizes": dict(case.sizes), "dtype": str(dtype)}


def of_behaviour() -> Iterator[Check]:
    """The same bits again and again, from a CUDA graph, and on another stream."""
    for row in CATALOG.values():
        for kernel in kernels(row):
            for case in row.workloads["cuda"]:
                if not kernel.refuses(*inputs.meta(row, case, torch.float16)):
                    for name, again in (("repeats", repeated), ("CUDA graph", captured), ("stream", on_a_stream)):
                        run = partial(behaves, row, kernel, shortened(row, case), name, again)
                        yield Check(f"{row.name}/{kernel.name} {case.name}: {name}", sources(row), run)


Again = Callable[[], Sequence[Tensor]]


def behaves(row: Mechanism, kernel: Kernel, case: Case, name: str, again: Callable[[Again], Iterator[Sequence[Tensor]]]) -> Row:
    """Whether a forward and a backward pass give the bits of the first run in each run of `again`."""
    said = _said(row, kernel, case, torch.float16) | {"check": name}
    try:
        tensors, options = inputs.draw(row, case, dtype=torch.float16, device=WHERE)
        options = {**row.defaults, **options}
        grads: list[Tensor | None] = []

        def call() -> list[Tensor]:
            code = kernel.load()
            outputs = code.forward(**tensors, **options, **{row.more: True})
            if not grads:
                grads.extend([torch.randn_like(outputs[0]), *(None for _ in outputs[1:])])
            needs = tuple(tensors[name] is not None for name in row.differentiable)
            backward = row.kernels[-1].load().backward
            gradients = backward(*grads, **tensors, **dict(zip(row.outputs, outputs, strict=True)), **options, needs=needs)
            return [*outputs, *(gradient for gradient, need in zip(gradients, needs, strict=True) if need)]

        first = [tensor.clone() for tensor in call()]
        differing = sum(not _same_bits(first, found) for found in again(call))
    except Exception as error:  # noqa: BLE001  whatever it is, the next check is still to be made
        return said | {"fault": _complaint(error)}
    return said | {"fault": f"{differing} runs gave other bits" if differing else ""}


def repeated(call: Again) -> Iterator[Sequence[Tensor]]:
    """Many runs."""
    for _ in range(REPEATS):
        yield call()


def captured(call: Again) -> Iterator[Sequence[Tensor]]:
    """A capture, replayed twice."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for _ in range(2):
        for output in outputs:
            output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        yield outputs


def on_a_stream(call: Again) -> Iterator[Sequence[Tensor]]:
    """A run on a stream that is not the current one."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = call()
    torch.cuda.current_stream().wait_stream(stream)
    yield outputs


def _same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True) if a.numel())


def of_sizes(*, heads: int = 70_000, length: int = 1 << 20, far: int = 1 << 23) -> Iterator[Check]:
    """More heads than a grid's second axis has, a million tokens, elements beyond 2^31: each against the same call on a part of it."""
    make = partial(torch.randn, dtype=torch.float16, device=WHERE)

    def many_heads() -> tuple[Tensor, Tensor]:
        q, k, v = (make(1, heads, 16, 16) for _ in range(3))
        last = slice(heads - 8, heads)
        return triton_attn.attention(q, k, v)[:, last], triton_attn.attention(q[:, last], k[:, last], v[:, last])

    def many_tokens() -> tuple[Tensor, Tensor]:
        q, k, v = (make(1, 1, length, 64) for _ in range(3))
        last, local = slice(length - 512, length), partial(triton_attn.local_global_attention, window=256)
        return local(q, k, v)[:, :, -256:], local(q[:, :, last], k[:, :, last], v[:, :, last])[:, :, -256:]

    def far_away() -> tuple[Tensor, Tensor]:
        # rows wider than they are looked at: the last query lies beyond 2^31 elements
        q, k, v = make(1, 1, far, 320)[..., :64], make(1, 1, 128, 64), make(1, 1, 128, 64)
        return triton_attn.attention(q, k, v)[:, :, -64:], triton_attn.attention(q[:, :, -64:].clone(), k, v)

    of = {name: sources(triton_attn.CATALOG[name]) for name in ("attention", "local_global_attention")}
    yield Check(f"{heads} heads", of["attention"], partial(alike, "attention", f"{heads} heads", many_heads))
    local = "local_global_attention"
    yield Check(f"{length} tokens", of[local], partial(alike, local, f"{length} tokens", many_tokens))
    yield Check("beyond 2^31 elements", of["attention"], partial(alike, "attention", "beyond 2^31 elements", far_away))


def alike(row: str, name: str, both: Callable[[], tuple[Tensor, Tensor]]) -> Row:
    """Whether what two calls give differs by no more than rounding."""
    try:
        found, expected = both()
        worst = float((found - expected).abs().max())
        fault = "" if worst <= 2e-3 * float(expected.abs().max()) else f"differs by {worst}"
    except Exception as error:  # noqa: BLE001  out of memory is one of many
        worst, fault = math.nan, _complaint(error)
    if WHERE.type == "cuda":
        torch.cuda.empty_cache()
    return {"row": row, "check": name, "worst": None if fault else worst, "fault": fault}


def of_the_sanitizer() -> Iterator[Check]:
    """`few` under compute-sanitizer, where that is on PATH: accesses out of bounds, and races in shared memory."""
    tool = shutil.which(SANITIZER)
    for check in ("memcheck", "racecheck"):
        of = "".join(sources(row) for row in CATALOG.values()) if tool else "absent"
        yield Check(f"{SANITIZER} {check}", of, partial(sanitized, tool, check))


def sanitized(tool: str | None, check: str, *, seconds: float | None = None) -> Row:
    """One of its tools over a few calls of every kernel."""
    said, seconds = {"check": f"{SANITIZER} {check}"}, PATIENCE if seconds is None else seconds
    if tool is None:
        return {**said, "not run": "not on PATH"}
    # torch hands out parts of large blocks: without its allocator a block ends where a tensor ends
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watched = [tool, "--tool", check, "--target-processes", "all", "--error-exitcode", "9", "--print-limit", "5"]
    with tempfile.TemporaryDirectory() as folder:
        command_line = [*watched, sys.executable, str(Path(__file__).with_name("on_gpu.py")), "small", "--out", folder]
        try:
            done = subprocess.run(command_line, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {**said, "not run": f"did not end within {seconds:.0f} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    return {**said, "fault": "; ".join(found[:3])[:300] or done.stderr[-300:] if done.returncode else ""}


def few() -> Iterator[Check]:
    """A few calls of every kernel, as few as a tool that slows each of them by a hundred leaves time for."""
    for row in CATALOG.values():
        for kernel in kernels(row):
            served = [case for case in row.cases if not kernel.refuses(*inputs.meta(row, case, torch.float16))]
            for case in sorted(served, key=lambda case: sum(case.sizes.values()))[:2]:
                yield Check(f"{row.name}/{kernel.name} {case.name}", sources(row), partial(judged, row, kernel, case, torch.float16))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _complaint(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
