"""Run the lot: each part in a process of its own, because Triton's interpreter and its compiler cannot share one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triton_attn import device as here
from triton_attn.bench import Timing
from triton_attn.mechanism import Mechanism
from triton_attn.offline import Compiled
from triton_attn.report import Results, candidates, caught, earlier
from triton_attn.report.calls import Call
from triton_attn.report.earlier import Earlier
from triton_attn.report.rows import AnyRow, from_json
from triton_attn.report.terminal import FAILED, PREFIX, complain
from triton_attn.tiles import slug
from triton_attn.tuning.ledger import read_trials
from triton_attn.tuning.tune import Trial
from triton_attn.verify import Verdict

_running: set[subprocess.Popen[str]] = set()
_PATIENCE = 60.0  # for imports, and for the one case that was under way when the time ended
LONGEST = 24 * 3600.0
LENGTHS = (256, 512, 1024, 2048)
_TIMED_APART = 0.4  # of the budget: timing shares the machine with nothing, checks and compiler share it


def gather(
    catalog: Mapping[str, Mechanism],
    machine: Mapping[str, Any],
    *,
    targets: Sequence[str],
    device: str,
    seconds: float,
    tick: Callable[[str], None] = lambda text: None,
) -> Results:
    """All result rows within about `seconds`."""
    start = time.perf_counter()
    results = Results(catalog, machine, targets)
    joined, names = ",".join(targets), list(catalog)
    shared, apart = (1 - _TIMED_APART) * seconds, _TIMED_APART * seconds
    uncompiled = "triton is not installed" if not machine["triton"] else "TRITON_INTERPRET=1 is set" if machine["interpreter"] else ""
    if uncompiled:
        results.notes.append(f"compile: {uncompiled}")
    with ThreadPoolExecutor(2) as threads:
        checked = threads.submit(_part, Verdict, ["verify", *names, "--device", device], shared, results, tick)
        compiling = ["compile", *names, "--target", joined]
        built = None if uncompiled else threads.submit(_part, Compiled, compiling, shared, results, tick)
        try:
            results.verdicts, results.compiled = checked.result(), built.result() if built else []
        except BaseException:  # an interrupt reaches this thread only, and no process of another session
            for process in list(_running):
                _kill(process)
            raise
    lengths = [part for length in LENGTHS for part in ("--length", str(length))]
    results.timings = _part(Timing, ["bench", *names, *lengths, "--device", device], apart, results, tick)
    explain = ["explain", *names, "--device", device, "--target", joined, "--workloads"]
    results.explained = _part(Call, explain, None, results, tick)
    results.trials = _tried(device)
    _caught(results)
    if not uncompiled:
        results.candidates, changed = candidates.find(list(catalog.values()), targets, tick=tick)
        results.faults += changed
    try:
        found = earlier.find()
        results.earlier = Earlier(found.said, [row for row in found.timings if row.mechanism in catalog])
    except (ValueError, OSError) as error:
        results.faults.append(str(error))
    results.seconds = time.perf_counter() - start
    return results


def _caught(results: Results) -> None:
    """What is kept of seeded faults; without triton nobody can say whether a kernel has changed since."""
    try:
        results.kept = caught.read(caught.KEPT) if caught.KEPT.is_file() else {}
    except (ValueError, OSError) as error:
        results.faults.append(str(error))
    if results.machine["triton"]:
        kernels = {f"{row.name}/{kernel.name}": kernel for row in results.catalog.values() for kernel in row.kernels}
        results.stale = frozenset(
            name for name, entry in results.kept.items() if name in kernels and entry.hash != caught.hash_of(kernels[name])
        )


def _tried(where: str) -> list[Trial]:
    """What the tuner has tried on this device, if it is a GPU."""
    folder = here.user_tables()
    if folder is None or not where.startswith("cuda"):
        return []
    name = here.profile(int(where.partition(":")[2] or 0)).name
    return read_trials(folder / f"{slug(name)}.trials.jsonl")


def _part(
    kind: type[AnyRow], arguments: Sequence[str], seconds: float | None, results: Results, tick: Callable[[str], None]
) -> list[AnyRow]:
    """Rows of one part as they come; what it leaves out and how it fails goes into `results`."""
    part, rows = arguments[0], list[AnyRow]()
    command = [sys.executable, "-m", "triton_attn", *arguments, "--json"]
    if seconds is not None:
        command += ["--seconds", str(seconds)]
    stopped = threading.Event()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as process,
    ):

        def stop() -> None:
            stopped.set()
            _kill(process)

        timer = threading.Timer(min((seconds or 0.0) + _PATIENCE, LONGEST), stop)
        timer.start()
        _running.add(process)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    rows.append(from_json(kind, line))
                except ValueError as error:
                    results.faults.append(f"{part} printed what is no result: {error}")
                tick(f"{part}: {rows[-1].mechanism if rows else ''}, {len(rows)} results")
            code = process.wait()
        except BaseException:
            _kill(process)
            raise
        finally:
            timer.cancel()
            _running.discard(process)
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    told = [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
    failed = [line for line in told if line.startswith(FAILED)]
    results.faults += [f"{part} {line}" for line in failed]
    if stopped.is_set():
        results.faults.append(f"{part} did not end in time and was stopped")
    elif code > 1 or code < 0 or (code == 1 and not failed and not any(getattr(row, "fault", "") for row in rows)):
        results.faults.append(f"{part} ended with exit code {code}: {lines[-1].removeprefix(PREFIX) if lines else 'no word said'}")
    else:
        results.notes += [f"{part}: {line}" for line in told if line not in failed]
    return rows


def _kill(process: subprocess.Popen[str]) -> None:
    """End a part that has not ended yet, and with it the process that `verify` may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def again(*arguments: str, seconds: float, as_json: bool) -> int:
    """A command in a process where triton is yet to be imported, with this one's output as its own; its exit code."""
    command, patience = [sys.executable, "-m", "triton_attn", *arguments, *(["--json"] if as_json else [])], LONGEST
    if seconds < LONGEST:
        command += ["--seconds", str(seconds)]
        patience = 2 * seconds + _PATIENCE
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, timeout=patience, check=False).returncode
    except subprocess.TimeoutExpired:
        complain(f"{arguments[0]} did not end within {patience:.0f} s and was stopped")
        return 1
