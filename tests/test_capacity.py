"""Memory counted on shapes is memory allocated with numbers; the search finds what fits; the command says it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton_attn import ArgumentError, cli, device, operators, use_backend
from triton_attn.capacity import Peak, Setup, growth, longest, peak_of, readable, step_of, workspace
from triton_attn.capacity.memory import Held

TINY = Setup("tiny", dtype="float32", attention="dense")


# counting


def test_what_is_held_is_counted_until_nobody_holds_it() -> None:
    kept = torch.zeros(100)
    with Held() as held:
        held.note("parameters", [kept])
        x = kept + 1
        y = x.view(10, 10)[2:]  # no memory of its own
        y.add_(1)
        assert held.now == {"parameters": 400, "activations": 400}
        z = x * 2
        del x, y, z
        assert held.now.total() == 400
        again = torch.zeros(10)
        held.note("gradients", [again])
    assert held.now == {"parameters": 400, "activations": 0, "gradients": 40}
    assert held.most == 1200
    assert held.worst == {"parameters": 400, "activations": 800}


def test_a_kernel_counts_with_what_it_allocates_for_itself() -> None:
    from triton_attn import CATALOG

    operator = operators.operator(CATALOG["attention"])
    x = torch.empty(2, 3, 40, 16)
    out, lse = torch.empty_like(x), torch.empty(2, 3, 40)
    options = ["", 0.25, 0.0]
    assert workspace(operator.forward, (x, x, x, None, None, None, *options)) == 0
    # of each query the sum over out * grad, in float32
    backward = (x, None, x, x, x, None, None, None, out, lse, *options, [True] * 3)
    assert workspace(operator.backward, backward) == 4 * lse.numel()


def allocated(step: Any) -> int:
    """What torch's allocator says of a real step, in bytes above what was there."""
    from torch._C._profiler import _EventType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        first = torch.empty(1)
        step.run()
    found = []

    def walk(events: Any) -> None:
        for event in events:
            if event.tag == _EventType.Allocation:
                found.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
            walk(event.children)

    walk(profile.profiler.kineto_results.experimental_event_tree())
    _, total, size = min(found)
    assert size >= first.nbytes
    return int(max(total for _, total, _ in found) - (total - size))


@pytest.mark.skipif(not device.interpreting(), reason="the real step's kernels run in Triton's interpreter: TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("setup", "length"),
    [
        (TINY, 40),
        (replace(TINY, checkpointing=True, chunk=16), 40),
        pytest.param(replace(TINY, component="attention", attention="dilated"), 48, marks=pytest.mark.slow),
    ],
    ids=["model", "saving model", "dilated attention"],
)
def test_a_real_step_allocates_what_was_predicted(setup: Setup, length: int) -> None:
    step = step_of(setup, length)
    given = [*step.made, *(tensor for module in step.modules for tensor in (*module.parameters(), *module.buffers()))]
    if step.optimizer is not None:
        with use_backend("portable"):
            step.run()  # after it there are states
        given += [tensor for state in step.optimizer.state.values() for tensor in state.values()]
    with use_backend("triton"):
        measured = allocated(step) + sum(tensor.nbytes for tensor in given)
    # a CPU's operators allocate a little inside of themselves, which is much of so small a step
    assert peak_of(setup, length).bytes == pytest.approx(measured, rel=0.05)


def test_parts_are_the_whole_and_each_saving_saves() -> None:
    plain = replace(TINY, dtype="bf16", attention="dilated")
    setups = [plain, replace(plain, checkpointing=True), replace(plain, checkpointing=True, chunk=4096)]
    peaks = [peak_of(setup, 16384) for setup in setups]
    for peak in peaks:
        assert sum(peak.parts.values()) == peak.bytes
        assert peak.parts["parameters"] > 0
        assert peak.parts["optimizer"] >= 2 * peak.parts["parameters"]
    assert peaks[0].bytes > peaks[1].bytes > peaks[2].bytes


def test_eight_bit_states_are_torchao_s_own() -> None:
    pytest.importorskip("torchao")
    plain = replace(TINY, dtype="float32")
    states = [peak_of(replace(plain, optimizer=name), 64).parts["optimizer"] for name in ("adamw", "adamw8bit", "none")]
    assert states[2] == 0
    assert 3.0 < states[0] / states[1] < 4.0  # parameters of a few numbers stay as they are


def test_torchao_is_imported_for_its_own_optimiser_alone() -> None:
    code = """
import sys
from triton_attn.capacity import Setup, peak_of
assert peak_of(Setup("tiny", component="attention", optimizer="none"), 64).bytes > 0
assert "torchao" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("attention", ["dilated", "dense"])
@pytest.mark.parametrize("component", ["attention", "multihead", "model"])
def test_memory_grows_in_proportion_to_length(attention: str, component: str) -> None:
    setup = replace(TINY, attention=attention, component=component, optimizer="none", dtype="bf16")
    short, long = (peak.bytes for peak in growth(setup, [16384, 131072]))
    assert 6 < long / short < 8.2


# the search


def linear(setup: Setup, length: int) -> Peak:
    return Peak(setup, length, 1_000_000 + 3000 * length + 7_000_000 * (length // 5000))


@pytest.mark.parametrize("memory", [1e7, 3e8, 5e9, 8e10])
def test_the_longest_that_fits_fits_and_hardly_more_would(memory: float) -> None:
    asked: list[Peak] = []
    best = longest(TINY, memory, measure=linear, tick=asked.append)
    assert best is not None
    assert best.bytes <= memory
    assert best.length % 1024 == 0
    assert best.bytes > 0.98 * memory or linear(TINY, best.length + max(1024, best.length // 40)).bytes > memory
    assert len(asked) < 30


def test_nothing_fits_and_everything_fits() -> None:
    assert longest(TINY, 1e6, measure=linear) is None
    best = longest(TINY, 1e6, measure=lambda setup, length: Peak(setup, length, 1))
    assert best is not None
    assert best.length == 1 << 26


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (80e9, "80 GB"), (1.5e16, "1.5e+04 TB")])
def test_bytes_are_readable(count: float, text: str) -> None:
    assert readable(count) == text


# arguments and the command


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"params": "7B"}, "params is '7B'; allowed: 125M, 350M, 1.3B, tiny"),
        ({"attention": "flash"}, "attention is 'flash'; allowed: dilated, dense"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; allowed: bf16, amp, float32"),
        ({"chunk": 0}, "chunk is 0; allowed: 1 and more"),
        ({"component": "attention", "checkpointing": True}, "checkpointing is True with component 'attention'; allowed: with 'model'"),
        ({"component": "multihead", "chunk": 64}, "chunk is 64 with component 'multihead'; allowed: with 'model' alone"),
    ],
)
def test_a_wrong_setup_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        replace(TINY, **changes)
    assert said in str(raised.value)


def run(*given: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["capacity", *given])
    return int(stopped.value.code or 0)


def test_the_command_counts_draws_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "memory.svg"
    assert run("--params", "tiny", "--length", "64", "--length", "128", "--json", "--plot", str(picture)) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["length"] for row in rows] == [64, 128]
    assert rows[0]["setup"]["attention"] == "dilated"
    assert "<svg" in picture.read_text()


def test_the_command_shows_a_ladder(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    assert run("--params", "tiny", "--attention", "dense", "--length", "2048", "--ladder", "--chunk", "1024") == 0
    shown = capsys.readouterr().out
    assert shown.count("tiny dense model") == 4
    assert "chunks of 1024, adamw8bit" in " ".join(shown.split())


def test_the_command_searches(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--params", "tiny", "--memory", "40MB", "--json") == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["length"] >= 1024
    assert 0.9 * 40e6 < row["bytes"] <= 40e6
    assert run("--params", "tiny", "--memory", "1MB") == 0
    assert "none fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--memory", "much"], "memory is 'much'; allowed: a number and one of MB, GB"),
        (["--memory", "0GB"], "memory is '0GB'"),
        (["--params", "7B"], "params is '7B'"),
        (["--component", "attention", "--ladder"], "ladder is given with component 'attention'; allowed: with 'model' alone"),
        (["--component", "multihead", "--checkpointing"], "checkpointing is True with component 'multihead'"),
        (["--optimizer", "sgd"], "optimizer is 'sgd'; allowed: adamw, adamw8bit, none"),
    ],
)
def test_the_command_says_what_is_wrong(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*given) == 2
    assert said in capsys.readouterr().err
