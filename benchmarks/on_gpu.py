"""Everything that needs a GPU, in one process per step: correctness of every tile, tuning, peers. Results go to JSON.

Called by gpu.sh, which has checked what is installed. A step ends with 0 if it found everything right, 1 if something is wrong,
3 if the GPU answers no more (gpu.sh starts it again), 4 if its time is over and a later start has something left to do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, targets
from benchmarks.evidence import Check, Outcome, finish
from triton_attn import CATALOG, bench, device, tiles
from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import numerics
from triton_attn.tuning import command
from triton_attn.tuning.ledger import Ledger
from triton_attn.tuning.tune import answers, gpu_clock, plan

WHERE = torch.device("cuda", 0)
TUNED = "bfloat16"
STEPS: dict[str, Callable[[], Iterator[Check]]] = {
    "correctness": gpu_checks.correctness,
    "small": gpu_checks.few,
    "peers": lambda: peers(),
}


def tune(seconds: float, out: Path) -> Outcome:
    """`triton-attn tune` for every mechanism: the table and its evidence lie in `out`, where a later start finds them."""
    before, rows = time.perf_counter(), list(CATALOG.values())
    lost = command.run(rows, WHERE, out, dtypes=(TUNED,), budget=seconds, clock=gpu_clock)
    profile, done = device.profile(0), time.perf_counter() - before
    ledger = Ledger(out, profile)
    fault = "a key has no tile that is right" if lost else ""
    outcome = Outcome([{"tuned": ledger.table.name, "seconds": done, "fault": fault}], lost=not answers(WHERE))
    for task in plan(rows, lambda row: row.workloads["cuda"], (TUNED,), profile):
        outcome.left += not ledger.known(task).keys() >= set(map(str, task.space.of(profile.capability, task.key)))
    return outcome


def peers() -> Iterator[Check]:
    """Every GPU workload beside every peer that runs, forward and forward + backward, with the ratio that is aimed at."""
    from benchmarks import compositions
    from benchmarks import peers as others

    for row in (*map(others.beside, CATALOG.values()), *compositions.ROWS):
        for case in row.workloads["cuda"]:
            for peer in row.peers:
                for direction in (bench.FORWARD, bench.BOTH):
                    name = f"{row.name} {case.name}, {direction}, beside {peer}"
                    yield Check(name, gpu_checks.sources(row), partial(_beside, row, case, peer, direction))


def _beside(row: Mechanism, case: Case, peer: str, direction: str) -> dict[str, Any]:
    said = {"mechanism": row.name, "case": case.name, "peer": peer, "direction": direction}
    try:
        return _aimed(asdict(bench.time_beside(row, case, peer, direction, WHERE, torch.bfloat16, seconds=2.0)))
    except Exception as error:  # noqa: BLE001  a peer that cannot is a row that says so
        return said | {"not run": f"{type(error).__name__}: {error}"[:200]}


def _aimed(row: dict[str, Any]) -> dict[str, Any]:
    name = row["mechanism"], row["case"], row["direction"]
    aim, most = targets.ratio(*name, row["peer"]), targets.TIMES.get(name)
    reached, said = {}, ""
    if aim is not None:
        reached = {"target": aim, "reached": row["ratio"] >= aim}
        said = f", target {aim:.2f} (on an H200){'' if row['ratio'] >= aim else ': missed'}"
    if most is not None:
        reached |= {"most_milliseconds": most, "in_time": row["milliseconds"] <= most}
        said += f"; {row['milliseconds']:.3f} ms of at most {most} (on an H200){'' if row['milliseconds'] <= most else ': missed'}"
    print(f"{row['mechanism']} {row['case']}, {row['direction']}, beside {row['peer']}: {row['ratio']:.2f}{said}", flush=True)
    return row | reached


def run(checks: Iterable[Check], path: Path, seconds: float) -> Outcome:
    """The checks that `path` does not hold yet."""

    def tell(row: dict[str, Any]) -> None:
        if row.get("fault") or row.get("not run"):
            print(json.dumps(row), flush=True)

    machine = device.describe()
    made = f"{device.profile(0).name}, torch {machine['torch']}, triton {machine['triton']}, driver {machine['driver']}"
    return finish(checks, path, made=made, seconds=seconds, alive=partial(answers, WHERE), tell=tell)


def main() -> int:
    """Run one step and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("tune", *STEPS))
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seconds", type=float, default=360.0, help="past them nothing more begins")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"{tiles.slug(device.profile(0).name)}-{chosen.step}.json"
    if chosen.step == "tune":
        outcome = tune(chosen.seconds, chosen.out)
    else:
        outcome = run(STEPS[chosen.step](), path.with_suffix(".jsonl"), chosen.seconds)
    said = {"machine": device.describe(), "policy": numerics.__doc__, "left": outcome.left, "rows": outcome.rows}
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    partial_file.replace(path)
    print(f"{chosen.step}: {len(outcome.rows)} rows, {outcome.wrong} wrong, {outcome.left} left, written to {path}")
    return outcome.ended


if __name__ == "__main__":
    sys.exit(main())
