"""Run the lot: each part in a process of its own, because Triton's interpreter and its compiler cannot share one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triton_attn.bench import Timing
from triton_attn.mechanism import Mechanism
from triton_attn.offline import Compiled
from triton_attn.report import Results
from triton_attn.report.calls import Call
from triton_attn.report.rows import AnyRow, from_json
from triton_attn.verify import Verdict

PREFIX = "triton-attn: "  # of the lines that a part says on stderr
_PATIENCE = 60.0  # for imports, and for the one case that was under way when the time ended
_LONGEST = 24 * 3600.0
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
    with ThreadPoolExecutor(2) as threads:
        checked = threads.submit(_part, Verdict, ["verify", *names, "--device", device], shared, results, tick)
        built = threads.submit(_part, Compiled, ["compile", *names, "--target", joined], shared, results, tick)
        results.verdicts, results.compiled = checked.result(), built.result()
    results.timings = _part(Timing, ["bench", *names, "--device", device], apart, results, tick)
    results.calls = _part(Call, ["explain", *names, "--device", device, "--target", joined], None, results, tick)
    results.seconds = time.perf_counter() - start
    return results


def _part(
    kind: type[AnyRow], arguments: Sequence[str], seconds: float | None, results: Results, tick: Callable[[str], None]
) -> list[AnyRow]:
    """Rows of one part as they come; what it leaves out and how it fails goes into `results`."""
    command = [sys.executable, "-m", "triton_attn", *arguments, "--json"]
    if seconds is not None:
        command += ["--seconds", str(seconds)]
    rows: list[AnyRow] = []
    part, tail = arguments[0], ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8")
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            process.kill()

        timer = threading.Timer(min((seconds or 0.0) + _PATIENCE, _LONGEST), stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    rows.append(from_json(kind, line))
                except ValueError as error:
                    results.faults.append(f"{part} printed what is no result: {error}")
                tick(f"{part}: {rows[-1].mechanism if rows else ''}, {len(rows)} results")
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        said.seek(0)
        for line in filter(None, map(str.strip, said)):
            tail = line
            if line.startswith(PREFIX) and code in (0, 1):
                results.notes.append(f"{part}: {line.removeprefix(PREFIX)}")
    if stopped.is_set():
        results.faults.append(f"{part} did not end in time and was stopped")
    elif code and not (code == 1 and any(getattr(row, "fault", "") for row in rows)):
        results.faults.append(f"{part} ended with exit code {code}: {tail.removeprefix(PREFIX)}")
    return rows
