"""Mamba beside what people have on a CPU: scans of others, dense attention, Hugging Face's model; and how time and memory grow.

    python -m pytest benchmarks/bench_mamba.py --benchmark-enable --benchmark-only -s

prints the numbers of docs/selective_scan.md; the assertions are what the project promises on a CPU. mambapy is timed if installed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import peers
from triton_attn import CATALOG, bench, selective_scan
from triton_attn.nn import MambaLayer

CPU = torch.device("cpu")
PEERS = peers.of_selective_scan()
LEAST = {bench.FORWARD: 6.0, bench.BOTH: 5.0}

# 131072 tokens through a layer, forward and backward, in a process of its own: what it took beyond the start, in MiB.
# getrusage would tell the parent's peak, which a process inherits
LONG = """
import re, torch
from triton_attn.nn import MambaLayer
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.manual_seed(0)
layer, x = MambaLayer(64, dropout=0.0), torch.randn(1, {length}, 64)
layer(x[:, :256]).sum().backward()
start = peak()
out = layer(x)
out.square().mean().backward()
assert out.isfinite().all() and all(parameter.grad.isfinite().all() for parameter in layer.parameters())
print((peak() - start) // 1024)
"""


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", [bench.FORWARD, bench.BOTH])
def test_scan_beside_others(benchmark: Any, peer: str, direction: str) -> None:
    """(1, 1536, 2048), state 16, with everything: a layer of Mamba 130M. The loop's backward pass, quadratic in time, gets 256 steps."""
    row = replace(CATALOG["selective_scan"], peers=PEERS)
    case = row.workloads["cpu"][0]
    if peer == "transformers' loop" and direction == bench.BOTH:
        case = replace(case, sizes=row.fitted({**case.sizes, "l": 256}, case.options))
    timing = bench.time_beside(row, case, peer, direction, CPU, torch.float32, seconds=10.0)
    benchmark.extra_info.update(ratio=timing.ratio, milliseconds=timing.milliseconds, peer_milliseconds=timing.peer_milliseconds)
    benchmark.pedantic(lambda: None)
    beside = f"{timing.milliseconds:.0f} | {timing.peer_milliseconds:.0f} | {timing.ratio:.1f}"
    print(f"\n| {peer} | {direction}, {case.sizes['l']} steps | {beside} |")
    assert timing.ratio > LEAST[direction]


@pytest.mark.parametrize(("causal", "least"), [(False, 5.0), (True, 2.5)], ids=["all keys", "causal"])
def test_layer_beside_dense_attention(benchmark: Any, causal: bool, least: float) -> None:
    """32768 tokens, 768 wide, forward: torch's multi-head attention with 12 heads."""
    length, width = 32768, 768
    x, layer = torch.randn(1, length, width), MambaLayer(width).eval()
    dense = torch.nn.MultiheadAttention(width, 12, batch_first=True).eval()

    def attend() -> None:
        query, key, value = (
            part.view(1, length, 12, 64).transpose(1, 2)
            for part in torch.nn.functional.linear(x, dense.in_proj_weight, dense.in_proj_bias).chunk(3, -1)
        )
        heads = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        dense.out_proj(heads.transpose(1, 2).flatten(2))

    with torch.no_grad():
        ours, theirs = bench.interleave(lambda: layer(x), attend, CPU, seconds=1.0, least=2)
    mine, peer = statistics.median(ours), statistics.median(theirs)
    benchmark.extra_info.update(ratio=peer / mine)
    benchmark.pedantic(lambda: None)
    print(f"\nMambaLayer {mine:.2f} s, dense attention{' causal' * causal} {peer:.2f} s: {peer / mine:.1f}")
    assert peer / mine > least


def test_time_grows_with_the_length_and_no_faster(benchmark: Any) -> None:
    """256 channels, state 16, forward + backward, 1024 to 65536 steps."""
    taken = {}
    for length in (1024, 4096, 16384, 65536):
        tensors = [
            torch.randn(1, 256, length).requires_grad_(),
            torch.rand(1, 256, length),
            -torch.rand(256, 16),
            *torch.randn(2, 1, 16, length),
        ]
        taken[length] = _least(lambda tensors=tensors: selective_scan(*tensors).sum().backward())  # type: ignore[misc]
        print(f"\n| {length} | {1e3 * taken[length]:.0f} | {1e6 * taken[length] / length:.1f} |")
    benchmark.extra_info.update(seconds=taken)
    benchmark.pedantic(lambda: None)
    assert taken[65536] < 1.5 * 16 * taken[4096]


def test_131072_tokens_stay_finite_in_bounded_memory(benchmark: Any) -> None:
    """Twice the length takes twice the memory, at most: no states are kept but those between tiles."""
    grown = {}
    for length in (65536, 131072):
        command = [sys.executable, "-c", LONG.format(length=length)]
        grown[length] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    benchmark.extra_info.update(mebibytes=grown)
    benchmark.pedantic(lambda: None)
    print(f"\nMambaLayer(64), forward + backward: {grown} MiB")
    assert 0 < grown[131072] < 2.2 * grown[65536]


def test_hugging_face_s_model_beside_itself(benchmark: Any) -> None:
    """A small MambaForCausalLM, patched and not: 256 wide, 4 layers, 512 tokens, forward."""
    from transformers import MambaConfig, MambaForCausalLM

    from triton_attn.integrations.transformers import patch_mamba

    model = MambaForCausalLM(MambaConfig(vocab_size=1000, hidden_size=256, num_hidden_layers=4)).eval()  # type: ignore[no-untyped-call]
    tokens = torch.randint(1000, (1, 512))

    def patched() -> None:
        with patch_mamba():
            model(tokens, use_cache=False)

    with torch.no_grad():
        ours, theirs = bench.interleave(patched, lambda: model(tokens, use_cache=False), CPU, seconds=10.0)
    mine, peer = statistics.median(ours), statistics.median(theirs)
    benchmark.extra_info.update(ratio=peer / mine)
    benchmark.pedantic(lambda: None)
    print(f"\nMambaForCausalLM: patched {1e3 * mine:.0f} ms, as it comes {1e3 * peer:.0f} ms: {peer / mine:.1f}")
    assert peer > mine


def _least(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
