"""Everything that needs a GPU, in one process per step: correctness of every tile, tuning, peers. Results go to JSON.

Called by gpu.sh, which has checked what is installed. Each step writes as it goes, so that a cut-off run still leaves evidence.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from triton_attn import CATALOG, bench, device, dispatch, tiles, verify
from triton_attn.mechanism import Case, Code, Kernel, Launch, Mechanism
from triton_attn.testing import inputs, numerics

WHERE = torch.device("cuda", 0)
DTYPES = {"16bit": (torch.float16, torch.bfloat16), "float32": (torch.float32,), "tf32": (torch.float32,)}
WIDTHS = (16, 32, 64, 80, 96, 128, 256)
TIMED_WIDTHS = (64, 128, 256)
JUDGED = (torch.float16, torch.bfloat16, torch.float32)
TUNED, LONG = torch.bfloat16, 4096
UNEVEN = {"m": 200, "n": 300}  # no multiple of any tile


def cases(row: Mechanism, width: int) -> Iterator[Case]:
    """The row's own cases at a length of several tiles and one width."""
    for case in row.cases:
        longer = {axis: size * 13 if axis in "mn" else size for axis, size in case.sizes.items()}
        yield replace(case, sizes={**longer, "d": width, "e": width})


def launches(row: Mechanism) -> Iterator[tuple[Kernel, Code, Launch]]:
    """What runs on this GPU."""
    for kernel in row.kernels:
        if not dispatch.capability_refusal(kernel, device.profile(0).capability):
            code = kernel.load()
            for launch in kernel.launches:
                yield kernel, code, launch


def correctness(note: Callable[[dict[str, Any]], None]) -> None:
    """Every row, kernel, case, dtype and width with the tiles that calls get, then every tile of the tables on one case."""
    for row in CATALOG.values():
        for kernel in dict.fromkeys(kernel for kernel, _, _ in launches(row)):
            for width in WIDTHS:
                for case in cases(row, width):
                    for dtype in JUDGED:
                        if not kernel.refuses(*inputs.meta(row, case, dtype)):
                            _judge(note, row, kernel, case, dtype, None)
        for kernel, code, launch in launches(row):
            for key in code.spaces[launch.name].entries():
                for tile in code.spaces[launch.name].of(device.profile(0).capability, key):
                    for probe in row.probes(key.width, key.plain):
                        causal = {"causal": "bottom_right"} if "causal" in probe.options else {}
                        case = Case("probe", {**probe.sizes, "b": 1, **UNEVEN}, {**probe.options, **causal})
                        dtype = DTYPES[key.operands][-1]
                        if not kernel.refuses(*inputs.meta(row, case, dtype)):
                            with precision(key):
                                _judge(note, row, kernel, case, dtype, {launch.name: tile}, tf32=key.operands == "tf32")


class precision:
    """float32 products as the key says."""

    def __init__(self, key: tiles.Key) -> None:
        self.wanted = "high" if key.operands == "tf32" else "highest"

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.wanted)

    def __exit__(self, *error: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def _judge(
    note: Callable[[dict[str, Any]], None], row: Mechanism, kernel: Kernel, case: Case, dtype: torch.dtype, tile: Any, tf32: bool = False
) -> bool:
    said: dict[str, Any] = {"row": row.name, "kernel": kernel.name, "case": case.name, "sizes": dict(case.sizes), "dtype": str(dtype)}
    said["tile"] = None if tile is None else {name: str(one) for name, one in tile.items()}
    try:
        comparisons = verify.judge(row, case, verify.kernel_run(row, kernel.load(), tile), dtype=dtype, where=WHERE, tf32=tf32)
        worst = max(comparisons, key=lambda c: c.share)
        said |= {"share": worst.share, "worst": worst.name, "fault": "; ".join(c.fault for c in comparisons if c.fault)}
    except Exception as error:  # noqa: BLE001  out of resources is a result here, and has no base class of its own
        said |= {"share": None, "fault": f"{type(error).__name__}: {error}"[:300]}
    note(said)
    return not said["fault"]


def tune(note: Callable[[dict[str, Any]], None], seconds: float) -> None:
    """Time every candidate of the 16-bit keys on a long call; only one that is numerically right may win. Writes the GPU's table."""
    from triton.testing import do_bench

    start, profile = time.perf_counter(), device.profile(0)
    path = tiles.SHIPPED / f"{tiles.slug(profile.name)}.json"
    entries: dict[str, Any] = {}
    for row in CATALOG.values():
        for kernel, code, launch in launches(row):
            full, space = f"{row.name}/{kernel.name}/{launch.name}", code.spaces[launch.name]
            winners: dict[str, tiles.Tile] = {}
            for key in (tiles.Key("16bit", width, plain) for width in TIMED_WIDTHS for plain in (True, False)):
                times: list[tuple[float, tiles.Tile]] = []
                options = {"causal": "top_left"} if key.plain else {"causal": "top_left", "key_padding_mask": "suffix", "dropout_p": 0.1}
                sizes = {"b": 2, "h": 16, "g": 16, "m": LONG, "n": LONG, "d": key.width, "e": key.width}
                large, small = Case("tune", sizes, options), Case("check", {**sizes, "b": 1, "h": 2, "g": 2, **UNEVEN}, options)
                if kernel.refuses(*inputs.meta(row, large, TUNED)):
                    continue
                for tile in space.of(profile.capability, key):
                    if time.perf_counter() - start > seconds:
                        break
                    chosen = {launch.name: tile}
                    if not _judge(note, row, kernel, small, TUNED, chosen):
                        continue
                    call = _launch_call(row, code, launch, large, chosen)
                    milliseconds = float(do_bench(call, warmup=10, rep=40, return_mode="median"))
                    note({"tuned": full, "key": str(key), "tile": str(tile), "milliseconds": milliseconds})
                    times.append((milliseconds, tile))
                if times:
                    winners[str(key)] = min(times)[1]
            if winners:
                evidence = f"tuned on {profile.name}, triton {device.triton_version()}"
                entries[full] = {"hash": tiles.source_hash(space.modules), "evidence": evidence, "tiles": winners}
                tiles.write(path, entries, device.describe())
    print(f"wrote {path}")


def _launch_call(row: Mechanism, code: Code, launch: Launch, case: Case, chosen: dict[str, tiles.Tile]) -> Callable[[], Any]:
    tensors, options = inputs.draw(row, case, dtype=TUNED, device=WHERE)
    if not launch.gradients:
        return lambda: code.forward(**tensors, **options, tile=chosen)
    outputs = code.forward(**tensors, **options, **{row.more: True})
    named = dict(zip(row.outputs, outputs, strict=True))
    grads = [torch.randn_like(outputs[0]), *(None for _ in outputs[1:])]
    needs = tuple(name in launch.gradients for name in row.differentiable)
    return lambda: code.backward(*grads, **tensors, **named, **options, needs=needs, tile=chosen)


def peers(note: Callable[[dict[str, Any]], None]) -> None:
    """Every GPU workload beside every peer that runs, forward and forward + backward."""
    from benchmarks.peers import beside

    for row in map(beside, CATALOG.values()):
        for case in row.workloads["cuda"]:
            for peer in row.peers:
                for direction in (bench.FORWARD, bench.BOTH):
                    try:
                        note(asdict(bench.time_beside(row, case, peer, direction, WHERE, torch.bfloat16, seconds=2.0)))
                    except Exception as error:  # noqa: BLE001  a peer that cannot is a row that says so
                        note({"case": case.name, "peer": peer, "direction": direction, "not run": f"{type(error).__name__}: {error}"[:200]})


def main() -> int:
    """Run one step and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("correctness", "tune", "peers"))
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
        tune(note, chosen.seconds)
    else:
        peers(note)
    wrong = sum(bool(row.get("fault")) for row in rows)
    print(f"{chosen.step}: {len(rows)} rows, {wrong} wrong, written to {path}")
    return int(chosen.step == "correctness" and wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
