"""What the benchmarks on a GPU are to reach: bfloat16 on an H200. None of it has been measured yet."""

from __future__ import annotations

from triton_attn.bench import BOTH, FORWARD

# (mechanism, workload, direction) -> peer -> the peer's time over ours
RATIOS: dict[tuple[str, str, str], dict[str, float]] = {
    ("attention", "dense d128", FORWARD): {"FA4": 0.92, "SDPA cuDNN": 0.92, "SDPA flash": 1.6, "FlexAttention": 1.25},
    ("attention", "dense d64", FORWARD): {"FA4": 0.95, "SDPA cuDNN": 0.95},
    ("attention", "causal d128 16k", FORWARD): {"FA4": 0.92, "SDPA cuDNN": 0.92},
    ("attention", "causal d128 2k", FORWARD): {"FA4": 0.95, "SDPA cuDNN": 0.95},
    ("attention", "short d64", FORWARD): {"FA4": 1.05, "SDPA cuDNN": 1.05},
    ("attention", "dropout d64", BOTH): {"SDPA flash": 1.4, "SDPA cuDNN": 0.85},
    ("attention", "padded keys d64", BOTH): {"FlexAttention": 1.4, "SDPA efficient": 2.0},
    ("attention", "cross d64", FORWARD): {"FA4": 1.0, "SDPA cuDNN": 1.0, "SDPA flash": 1.0, "SDPA efficient": 1.0},
    ("attention", "decoding d128", FORWARD): {"torch SDPA": 0.9},
    ("attention", "few queries d96", FORWARD): {"torch SDPA": 0.9},
    ("attention", "text to patches d96, 16 images", FORWARD): {"SDPA cuDNN": 1.0, "SDPA flash": 1.0, "SDPA efficient": 1.0},
    ("local_global_attention", "window 512, 64 summaries, d128", FORWARD): {"FlexAttention": 1.4},
    ("local_global_attention", "window 512, 64 summaries, d128", BOTH): {"FlexAttention": 1.4},
    ("local_global_attention", "window 512, d128", FORWARD): {"FA4": 0.92},
    ("local_global_attention", "window 128, d64", FORWARD): {"FlexAttention": 1.8, "local-attention": 6.0},
    ("sparse_attention", "strided, 128 steps", FORWARD): {"FlexAttention": 8.0, "dense, causal": 8.0},
    ("sparse_attention", "strided, 128 steps", BOTH): {"FlexAttention": 8.0, "dense, causal": 8.0},
    ("subset_attention", "one key in eight", FORWARD): {"torch SDPA on a copy, without own keys": 1.1, "FlexAttention": 3.0},
    ("subset_attention", "one key in eight", BOTH): {"torch SDPA on a copy, without own keys": 1.1, "FlexAttention": 3.0},
    ("dilated_attention", "16k, three branches", FORWARD): {"torchscale's way": 3.0},
    ("dilated_attention", "16k, three branches", BOTH): {"torchscale's way": 3.0},
    ("dilated_attention", "16k, a branch for each third of the heads", FORWARD): {"dilated-attention-pytorch": 4.0},
    ("linear_attention", "causal 8k, 96 heads", FORWARD): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("linear_attention", "causal 8k, 96 heads", BOTH): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("linear_attention", "causal 16k, 16 heads", FORWARD): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("linear_attention", "causal 16k, 16 heads", BOTH): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("linear_attention", "causal 4k, 64 heads", FORWARD): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("linear_attention", "causal 4k, 64 heads", BOTH): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("linear_attention", "sums 8k, 96 heads", FORWARD): {"fla chunk": 1.7, "fla fused chunk": 1.7},
    ("linear_attention", "sums 8k, 96 heads", BOTH): {"fla chunk": 2.2, "fla fused chunk": 2.2},
    ("linear_attention", "sums 16k, 16 heads", FORWARD): {"fla chunk": 1.7, "fla fused chunk": 1.7},
    ("linear_attention", "sums 16k, 16 heads", BOTH): {"fla chunk": 2.2, "fla fused chunk": 2.2},
    ("linear_attention", "sums 4k, 64 heads", FORWARD): {"fla chunk": 1.7, "fla fused chunk": 1.7},
    ("linear_attention", "sums 4k, 64 heads", BOTH): {"fla chunk": 2.2, "fla fused chunk": 2.2},
    ("linear_attention", "whole 4k, 64 heads", FORWARD): {"einsum, compiled": 2.0, "einsum": 4.0},
    ("linear_attention", "two signs, causal 16k, 16 heads", FORWARD): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("performer_attention", "whole 4k", FORWARD): {"performer-pytorch": 6.0},
    ("performer_attention", "causal 4k", FORWARD): {"performer-pytorch": 30.0},
    ("meta_hydra_attention", "one branch, whole 4k", FORWARD): {"cosines": 5.0, "cosines, compiled": 1.8},
    ("meta_hydra_attention", "one branch, causal 4k", FORWARD): {"cosines": 5.0, "cosines, compiled": 1.8},
    ("ripple_attention", "8k, one stage", FORWARD): {"pooled by torch": 4.0, "pooled by torch, compiled": 2.0},
    ("selective_scan", "batch 8, 2048 tokens", FORWARD): {"mamba-ssm": 1.7, "mambapy": 20.0},
    ("selective_scan", "batch 8, 2048 tokens", BOTH): {"mamba-ssm": 1.4},
    ("selective_scan", "batch 1, 16384 tokens", FORWARD): {"mamba-ssm": 1.7, "mambapy": 20.0},
    ("causal_conv1d", "batch 8, 2048 tokens", FORWARD): {"causal-conv1d": 1.0, "fla": 1.0},
}

# (mechanism, workload, direction) -> milliseconds that ours may take
TIMES: dict[tuple[str, str, str], float] = {
    ("local_global_attention", "window 2048, one head", FORWARD): 0.1,  # NATTEN's authors report 0.0949
}


def ratio(mechanism: str, workload: str, direction: str, peer: str) -> float | None:
    """The ratio aimed at, where there is one."""
    return RATIOS.get((mechanism, workload, direction), {}).get(peer)


__all__ = ["RATIOS", "TIMES", "ratio"]
