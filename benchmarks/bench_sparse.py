"""The rules of sparse attention beside dense attention and FlexAttention with the same mask. Ratios, interleaved.

    python -m pytest benchmarks/bench_sparse.py --benchmark-enable --benchmark-only -s

On a GPU bfloat16 at 16384 tokens; on a CPU float32 at 4096. The assertions are what the project promises on a CPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.flex_peers import flex
from triton_attn import bench, sparse_attention

GPU = torch.cuda.is_available()
WHERE = torch.device("cuda" if GPU else "cpu")
SHAPE = (1, 16, 16384, 64) if GPU else (1, 8, 4096, 64)
BLOCK = math.isqrt(SHAPE[2])
RULES: dict[str, dict[str, Any]] = {
    "uniform, one key in eight": {"keep_ratio": 1 / 8},
    "topk, one key in eight": {"keep_ratio": 1 / 8, "selection": "topk"},
    "window, one key in eight": {"keep_ratio": 1 / 8, "selection": "window"},
    "fixed": {"selection": "fixed", "causal": True},
    "strided": {"selection": "strided", "causal": True},
}
# the dense call's time over ours, forward, on a CPU
PROMISED = {"uniform, one key in eight": 5.0}
MASKS: dict[str, Callable[[Any, Any], Any]] = {
    "uniform, one key in eight": lambda i, j: (j % 8 == 0) | (i == j),
    "window, one key in eight": lambda i, j: (i - j).abs() <= math.floor(SHAPE[2] * (1 - math.sqrt(7 / 8)) - 0.5),
    "fixed": lambda i, j: (i // BLOCK == j // BLOCK) | (j % BLOCK == BLOCK - 1),
    "strided": lambda i, j: (i - j <= BLOCK) | ((i - j) % BLOCK == 0),
}


def drawn(backward: bool) -> list[Tensor]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if GPU else torch.float32
    return [torch.randn(SHAPE, device=WHERE, dtype=dtype, requires_grad=backward) for _ in range(3)]


def beside(benchmark: Any, name: str, peer: str, theirs: Callable[..., Any], backward: bool) -> float:
    """The peer's time over ours."""
    given = drawn(backward)
    weights = torch.ones(SHAPE, device=WHERE, dtype=given[0].dtype)

    def timed(call: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(*given), given, weights) if backward else call(*given)

    def attend(*tensors: Tensor) -> Any:
        return sparse_attention(*tensors, **RULES[name])

    ours, others = bench.interleave(timed(attend), timed(theirs), WHERE, seconds=8.0)
    ratio = statistics.median(b / a for a, b in zip(ours, others, strict=True))
    benchmark.extra_info.update(ratio=ratio)
    benchmark.pedantic(timed(attend), rounds=3, warmup_rounds=1)
    times = f"{1e3 * statistics.median(ours):.1f} ms beside {1e3 * statistics.median(others):.1f} ms"
    print(f"\n{name}, {'forward + backward' if backward else 'forward'}, {peer}: {times}, ratio {ratio:.2f}")
    return ratio


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_beside_dense_attention(benchmark: Any, name: str, backward: bool) -> None:
    causal = bool(RULES[name].get("causal"))
    ratio = beside(benchmark, name, "dense", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), backward)
    if not GPU and not backward:
        assert ratio >= PROMISED.get(name, 0.0)


@pytest.mark.parametrize("backward", [False, True] if GPU else [False], ids=["forward", "forward + backward"][: 1 + GPU])
@pytest.mark.parametrize("name", MASKS)
def test_a_rule_beside_flex_attention(benchmark: Any, name: str, backward: bool) -> None:
    attend = flex(lambda: lambda b, h, i, j: MASKS[name](i, j))
    causal = bool(RULES[name].get("causal"))
    with torch.no_grad():
        given = drawn(False)
        rtol, atol = (2e-2, 2e-2) if GPU else (1e-3, 1e-4)
        torch.testing.assert_close(attend(*given, causal=causal), sparse_attention(*given, **RULES[name]), rtol=rtol, atol=atol)
    beside(benchmark, name, "FlexAttention", lambda *tensors: attend(*tensors, causal=causal), backward)
