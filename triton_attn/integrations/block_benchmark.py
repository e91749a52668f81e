"""OpenCLIP's residual blocks beside the standard one: time, memory, parameters."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from triton_attn import arguments
from triton_attn.nn.enhanced_transformer import BLOCK_TYPES
from triton_attn.nn.parallel_block import ParallelResidualAttentionBlock

NAME = "benchmark_attention_blocks"


class _Who:
    name = NAME


def benchmark_attention_blocks(
    d_model: int = 768,
    n_head: int = 12,
    seq_len: int = 197,
    batch_size: int = 8,
    device: str | None = None,
    num_warmup: int = 10,
    num_iterations: int = 100,
    *,
    backward: bool = False,
    dtype: torch.dtype = torch.float32,
    tick: Callable[[int], None] = lambda turn: None,
) -> dict[str, dict[str, Any]]:
    """Time every block on random tokens, all of them in turns, so that a drifting machine drifts for each.

    Without a backward pass the parallel block is folded.

    Args:
        d_model: width of tokens.
        n_head: a divisor of d_model.
        seq_len: tokens.
        batch_size: sequences.
        device: "cuda" where there is one, else "cpu".
        num_warmup: rounds that do not count.
        num_iterations: rounds that do.
        backward: a forward and a backward pass in place of a forward pass.
        dtype: of parameters and tokens.
        tick: is told after each round how many there were.

    Returns:
        For each block type, "standard" first: avg_time_ms (median), speedup over "standard" (median of the rounds' ratios), memory_mb
        (peak beyond what was there, None on a CPU), parameters, output_shape.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
    """
    who: Any = _Who
    for argument, given in (("seq_len", seq_len), ("batch_size", batch_size), ("num_iterations", num_iterations)):
        arguments.whole(who, argument, given, 1)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    x = torch.randn(batch_size, seq_len, d_model, device=where, dtype=dtype)
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    results: dict[str, dict[str, Any]] = {}
    for kind, block in BLOCK_TYPES.items():
        layer = block(d_model, n_head).to(where, dtype).train(backward)
        if isinstance(layer, ParallelResidualAttentionBlock) and not backward:
            layer.fold()
        calls[kind] = _call(layer, x, backward)
        base = torch.cuda.memory_allocated(where) if where.type == "cuda" else 0
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        out = calls[kind]()
        results[kind] = {
            "memory_mb": (torch.cuda.max_memory_allocated(where) - base) / 2**20 if where.type == "cuda" else None,
            "parameters": sum(parameter.numel() for parameter in layer.parameters()),
            "output_shape": tuple(out.shape),
        }
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    for turn in range(num_warmup + num_iterations):
        for kind, call in calls.items():
            start = time.perf_counter()
            call()
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            if turn >= num_warmup:
                times[kind].append(time.perf_counter() - start)
        tick(turn + 1)
    for kind, spent in times.items():
        ratios = [a / b for a, b in zip(times["standard"], spent, strict=True)]
        results[kind] |= {"avg_time_ms": 1e3 * statistics.median(spent), "speedup": statistics.median(ratios)}
    return results


def _call(layer: torch.nn.Module, x: torch.Tensor, backward: bool) -> Callable[[], torch.Tensor]:
    def forward() -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = layer(x)
        return out

    def both() -> torch.Tensor:
        out: torch.Tensor = layer(x)
        torch.autograd.grad(out, tuple(layer.parameters()), torch.ones_like(out), allow_unused=True)
        return out

    return both if backward else forward
