"""Everything that needs a GPU, in one process per step: correctness of every tile, tuning, peers. Results go to JSON.

Called by gpu.sh, which has checked what is installed. Each step writes as it goes, so that a cut-off run still leaves evidence.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import triton_attn
from triton_attn import CATALOG, bench, device, dispatch, tiles, verify
from triton_attn.mechanism import Case, Code, Kernel, Launch, Mechanism
from triton_attn.testing import inputs, numerics
from triton_attn.tuning import command
from triton_attn.tuning.tune import gpu_clock, precision, shortened

WHERE = torch.device("cuda", 0)
DTYPES = {"16bit": (torch.float16, torch.bfloat16), "float32": (torch.float32,), "tf32": (torch.float32,)}
JUDGED = (torch.float16, torch.bfloat16, torch.float32)
LONGER = {"m": 13, "n": 13, "l": 13}  # times as long as the catalogue's small cases: several tiles
REPEATS, TUNED = 250, "bfloat16"
SANITIZER = "compute-sanitizer"
Note = Callable[[dict[str, Any]], None]


def launches(row: Mechanism) -> Iterator[tuple[Kernel, Code, Launch]]:
    """What runs on this GPU."""
    for kernel in row.kernels:
        if not dispatch.capability_refusal(kernel, device.profile(0).capability):
            code = kernel.load()
            for launch in kernel.launches:
                yield kernel, code, launch


def longer(row: Mechanism, case: Case) -> Case:
    """A small case of the catalogue at a length of several tiles."""
    sizes = {axis: size * LONGER.get(axis, 1) for axis, size in case.sizes.items()}
    return replace(case, sizes=row.fitted(sizes, case.options))


def correctness(note: Note) -> None:
    """Every row, kernel, case and dtype with the tiles that calls get; every candidate tile; and what only a GPU can show."""
    for row in CATALOG.values():
        for kernel in dict.fromkeys(kernel for kernel, _, _ in launches(row)):
            for case in (*row.cases, *(longer(row, case) for case in row.cases)):
                for dtype in JUDGED:
                    if not kernel.refuses(*inputs.meta(row, case, dtype)):
                        _judge(note, row, kernel, case, dtype, None)
            for case in row.workloads["cuda"]:
                if not kernel.refuses(*inputs.meta(row, case, torch.float16)):
                    _behaves(note, row, kernel, shortened(row, case))
        for kernel, code, launch in launches(row):
            space = code.spaces[launch.name]
            for key in space.entries():
                for tile in space.of(device.profile(0).capability, key):
                    for probe in row.probes(key.width, key.plain):
                        dtype, case = DTYPES[key.operands][-1], shortened(row, probe)
                        if not kernel.refuses(*inputs.meta(row, case, dtype)):
                            with precision(key.operands):
                                _judge(note, row, kernel, case, dtype, {launch.name: tile}, tf32=key.operands == "tf32")
    large(note)
    sanitized(note)


def _judge(note: Note, row: Mechanism, kernel: Kernel, case: Case, dtype: torch.dtype, tile: Any, tf32: bool = False) -> None:
    said = _said(row, kernel, case, dtype) | {"tile": None if tile is None else {name: str(one) for name, one in tile.items()}}
    try:
        comparisons = verify.judge(row, case, verify.kernel_run(row, kernel.load(), tile), dtype=dtype, where=WHERE, tf32=tf32)
        worst = max(comparisons, key=lambda c: c.share)
        said |= {"share": worst.share, "worst": worst.name, "fault": "; ".join(c.fault for c in comparisons if c.fault)}
    except Exception as error:  # noqa: BLE001  out of resources is a result here, and has no base class of its own
        said |= {"share": None, "fault": f"{type(error).__name__}: {error}"[:300]}
    note(said)


def _said(row: Mechanism, kernel: Kernel, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return {"row": row.name, "kernel": kernel.name, "case": case.name, "sizes": dict(case.sizes), "dtype": str(dtype)}


def _behaves(note: Note, row: Mechanism, kernel: Kernel, case: Case) -> None:
    """The same bits again and again, from a CUDA graph, and on another stream."""
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

    for name, again in (("repeats", repeated), ("CUDA graph", captured), ("stream", on_a_stream)):
        said = _said(row, kernel, case, torch.float16) | {"check": name}
        try:
            first = [tensor.clone() for tensor in call()]
            differing = sum(not _same_bits(first, found) for found in again(call))
            said |= {"fault": f"{differing} runs gave other bits" if differing else ""}
        except Exception as error:  # noqa: BLE001  whatever it is, the next check is still to be made
            said |= {"fault": f"{type(error).__name__}: {error}"[:300]}
        note(said)


Again = Callable[[], Sequence[Tensor]]


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


def large(note: Note, *, heads: int = 70_000, length: int = 1 << 20, far: int = 1 << 23) -> None:
    """More heads than a grid's second axis has, a million tokens, elements beyond 2^31: each against the same call on a part of it."""
    make = partial(torch.randn, dtype=torch.float16, device=WHERE)

    def check(name: str, whole: Callable[[], Tensor], part: Callable[[], Tensor]) -> None:
        try:
            found, expected = whole(), part()
            worst = float((found - expected).abs().max())
            fault = "" if worst <= 2e-3 * float(expected.abs().max()) else f"differs by {worst}"
        except Exception as error:  # noqa: BLE001  out of memory is one of many
            worst, fault = float("nan"), f"{type(error).__name__}: {error}"[:300]
        note({"row": "attention", "check": name, "worst": None if fault else worst, "fault": fault})
        if WHERE.type == "cuda":
            torch.cuda.empty_cache()

    q, k, v = (make(1, heads, 16, 16) for _ in range(3))
    check(f"{heads} heads", lambda: triton_attn.attention(q, k, v)[:, -8:], lambda: triton_attn.attention(q[:, -8:], k[:, -8:], v[:, -8:]))
    q, k, v = (make(1, 1, length, 64) for _ in range(3))
    last = slice(length - 512, length)
    local = partial(triton_attn.local_global_attention, window=256)
    check(f"{length} tokens", lambda: local(q, k, v)[:, :, -256:], lambda: local(q[:, :, last], k[:, :, last], v[:, :, last])[:, :, -256:])
    # one row of keys, held once, seen as many: the last query lies beyond 2^31 elements
    q, k, v = make(1, 1, far, 320)[..., :64], make(1, 1, 128, 64), make(1, 1, 128, 64)
    check(
        "beyond 2^31 elements",
        lambda: triton_attn.attention(q, k, v)[:, :, -64:],
        lambda: triton_attn.attention(q[:, :, -64:].clone(), k, v),
    )


def tune(note: Note, seconds: float, out: Path) -> None:
    """`triton-attn tune` for every mechanism; the table is copied to where the package ships it."""
    before = time.perf_counter()
    lost = command.run(list(CATALOG.values()), WHERE, out, dtypes=(TUNED,), budget=seconds, clock=gpu_clock)
    table = out / f"{tiles.slug(device.profile(0).name)}.json"
    if table.exists():
        shutil.copy(table, tiles.SHIPPED / table.name)
        print(f"wrote {tiles.SHIPPED / table.name}")
    note({"tuned": str(table.name), "seconds": time.perf_counter() - before, "fault": "a key has no tile that is right" if lost else ""})


def small(note: Note) -> None:
    """A few calls of every kernel, as few as a tool that slows each of them by a hundred leaves time for."""
    for row in CATALOG.values():
        for kernel in dict.fromkeys(kernel for kernel, _, _ in launches(row)):
            served = [case for case in row.cases if not kernel.refuses(*inputs.meta(row, case, torch.float16))]
            for case in sorted(served, key=lambda case: sum(case.sizes.values()))[:2]:
                _judge(note, row, kernel, case, torch.float16, None)


def sanitized(note: Note, *, seconds: float = 150.0) -> None:
    """`small` under compute-sanitizer, where that is on PATH: accesses out of bounds, and races in shared memory."""
    tool = shutil.which(SANITIZER)
    if tool is None:
        note({"check": SANITIZER, "not run": "not on PATH"})
        return
    # torch hands out parts of large blocks: without its allocator a block ends where a tensor ends
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        watched = [tool, "--tool", check, "--target-processes", "all", "--error-exitcode", "9", "--print-limit", "5"]
        with tempfile.TemporaryDirectory() as folder:
            command_line = [*watched, sys.executable, __file__, "small", "--out", folder]
            said = {"check": f"{SANITIZER} {check}"}
            try:
                done = subprocess.run(command_line, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
            except subprocess.TimeoutExpired:
                note({**said, "not run": f"did not end within {seconds:.0f} s"})
                continue
        found = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        note({**said, "fault": "; ".join(found[:3])[:300] or done.stderr[-300:] if done.returncode else ""})


def peers(note: Note) -> None:
    """Every GPU workload beside every peer that runs, forward and forward + backward, with the ratio that is aimed at."""
    from benchmarks.peers import beside, performer, target

    def noted(row: dict[str, Any]) -> None:
        aim = target(row["mechanism"], row["case"], row["direction"], row["peer"])
        reached = {} if aim is None else {"target": aim, "reached": row["ratio"] >= aim}
        said = "" if aim is None else f", target {aim:.2f} (on an H200){'' if row['ratio'] >= aim else ': missed'}"
        print(f"{row['mechanism']} {row['case']}, {row['direction']}, beside {row['peer']}: {row['ratio']:.2f}{said}", flush=True)
        note(row | reached)

    for row in map(beside, CATALOG.values()):
        for case in row.workloads["cuda"]:
            for peer in row.peers:
                for direction in (bench.FORWARD, bench.BOTH):
                    try:
                        noted(asdict(bench.time_beside(row, case, peer, direction, WHERE, torch.bfloat16, seconds=2.0)))
                    except Exception as error:  # noqa: BLE001  a peer that cannot is a row that says so
                        said = {"mechanism": row.name, "case": case.name, "peer": peer, "direction": direction}
                        note(said | {"not run": f"{type(error).__name__}: {error}"[:200]})
    try:
        for found in performer(WHERE):
            noted(found)
    except Exception as error:  # noqa: BLE001  the peer's, whatever it is
        note({"mechanism": "performer_attention", "peer": "performer-pytorch", "not run": f"{type(error).__name__}: {error}"[:200]})


def main() -> int:
    """Run one step and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("correctness", "tune", "peers", "small"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=420.0)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"{tiles.slug(device.profile(0).name)}-{chosen.step}.json"
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        if row.get("fault") or row.get("not run"):
            print(json.dumps(row), flush=True)
        path.write_text(json.dumps({"machine": device.describe(), "policy": numerics.__doc__, "rows": rows}, indent=1))

    if chosen.step == "correctness":
        correctness(note)
    elif chosen.step == "tune":
        tune(note, chosen.seconds, chosen.out)
    elif chosen.step == "small":
        small(note)
    else:
        peers(note)
    wrong = sum(bool(row.get("fault")) for row in rows)
    print(f"{chosen.step}: {len(rows)} rows, {wrong} wrong, written to {path}")
    return int(chosen.step in ("correctness", "small") and wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
