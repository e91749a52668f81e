"""The strict interpreter beside the plain one on dense attention, and how many examples of a property it checks in a minute.

python -m pytest benchmarks/bench_testing.py --benchmark-enable --benchmark-only -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

# interpreting is decided when triton is imported: each in a process of its own
BESIDE = """
import contextlib, json, statistics, time, torch
from triton_attn import attention, use_backend
from triton_attn.testing import strict_interpreter
torch.set_num_threads(1)
leaves = [torch.randn(2, 2, 33, 16, requires_grad=True) for _ in range(3)]
times = {{"plain": [], "strict": []}}
for turn in range(7):
    for name, switch in (("plain", contextlib.nullcontext), ("strict", strict_interpreter)):
        start = time.perf_counter()
        with switch(), use_backend("triton"):
            out = attention(*leaves)
            if {both}:
                torch.autograd.grad(out.sum(), leaves)
        if turn:
            times[name].append(time.perf_counter() - start)
print(json.dumps({{name: statistics.median(spent) for name, spent in times.items()}}))
"""
EXAMPLES = """
import json, random, time, torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from triton_attn import CATALOG, verify
from triton_attn.testing import numerics, strategies, strict_interpreter
from triton_attn.tiles import Tile
torch.set_num_threads(1)
row = CATALOG["attention"]
run = verify.kernel_run(row, row.kernels[-1].load(), Tile(16, 16, 4, 1))
seen, start = [], time.perf_counter()

@settings(max_examples=10**6, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(case=strategies.cases(row), seed=strategies.seeds)
def holds(case, seed):
    if time.perf_counter() - start > {seconds}:
        raise StopIteration
    with strict_interpreter():
        verdict = verify.judge(row, case, run, dtype=torch.float16, where=torch.device("cpu"), seed=seed)
    numerics.assert_right(verdict, case)
    seen.append(case)

try:
    holds()
except StopIteration:
    pass
print(json.dumps(60 * len(seen) / (time.perf_counter() - start)))
"""


def interpreted(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("both", [False, True], ids=["forward", "forward + backward"])
def test_strict_is_no_slower_than_plain(benchmark: Any, both: bool) -> None:
    times = told(interpreted(BESIDE.format(both=both)))
    benchmark.extra_info.update(times)
    benchmark.pedantic(lambda: None)
    print(f"\nstrict {1e3 * times['strict']:.0f} ms, plain {1e3 * times['plain']:.0f} ms: {times['strict'] / times['plain']:.2f}")
    assert times["strict"] < times["plain"]


def test_examples_a_minute(benchmark: Any) -> None:
    """Forward and backward of dense attention, sizes under 48, three tiers, strict; two processes at a time."""
    rates = [told(process) for process in [interpreted(EXAMPLES.format(seconds=30)) for _ in range(2)]]
    benchmark.extra_info.update(rates=rates)
    benchmark.pedantic(lambda: None)
    print(f"\n{sum(rates):.0f} examples a minute in two processes")
