"""One call of every mechanism of the package, and of its modules: what goes in, what comes out, what ran.

    python examples/attention_examples.py

Seconds on a CPU. A mechanism without a call of its own below is shown with the first case of its row in the catalogue.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import triton_attn
from triton_attn import nn
from triton_attn.testing import inputs

B, H, HK, N, D = 2, 8, 2, 500, 64
CONFIGURATION = Path(__file__).parent / "configs" / "sparse_attention.yaml"


def calls() -> dict[str, Callable[[], Any]]:
    """By mechanism: 8 query heads on 2 key heads, 500 tokens, the second sequence 300 long."""
    query, key, value = torch.randn(B, H, N, D), torch.randn(B, HK, N, D), torch.randn(B, HK, N, D)
    padded = torch.arange(N) >= torch.tensor([[N], [300]])
    image, text = torch.randn(B, H, 196, D), torch.randn(B, H, 77, D)
    columns = torch.tensor([0, 17, 99, 400])
    packed, ends = (torch.randn(N, H, D), torch.randn(N, HK, D), torch.randn(N, HK, D)), torch.tensor([0, 300, 301, N])
    same: dict[str, Any] = {"key_padding_mask": padded}
    return {
        "attention, causal": lambda: triton_attn.attention(query, key, value, causal=True, **same),
        "attention, cross, with lse": lambda: triton_attn.attention(image, text, text, return_lse=True),
        "attention_varlen": lambda: triton_attn.attention_varlen(*packed, ends, ends, causal=True),
        "strided_attention": lambda: triton_attn.strided_attention(query, key, value, stride=4, include_self=True, **same),
        "local_global_attention": lambda: triton_attn.local_global_attention(query, key, value, window=64, global_tokens=4, **same),
        "subset_attention": lambda: triton_attn.subset_attention(query, key, value, indices=columns, **same),
        "sparse_attention": lambda: triton_attn.sparse_attention(query, key, value, keep_ratio=0.125, **same),
        "dilated_attention": lambda: triton_attn.dilated_attention(query, key, value, segment_lengths=[128, 512], dilation_rates=[1, 4]),
        "hydra_attention": lambda: triton_attn.hydra_attention(torch.randn(B, 4, H, N, D), query, query),
        "performer_attention": lambda: triton_attn.performer_attention(query, query, query, triton_attn.orthogonal_projection(256, D)),
        "ripple_attention": lambda: triton_attn.ripple_attention(query, query, query, [], [], num_stages=0),
        "scaled_dot_product_attention": lambda: triton_attn.scaled_dot_product_attention(query, key, value, enable_gqa=True),
    }


def modules() -> dict[str, Callable[[], Any]]:
    """By module: 500 tokens, 768 wide, one sequence."""
    x, memory = torch.randn(1, N, 768), torch.randn(1, 100, 768)
    built: Any = nn.build(CONFIGURATION)
    heads = x.view(1, N, 12, 64)
    pattern: dict[str, Any] = {"segment_lengths": (128, 512), "dilation_rates": (1, 4)}
    blocks = {f"nn.{name}": getattr(nn, name) for name in nn.__all__ if "Residual" in name}
    return {
        "nn.MultiheadAttention": lambda: nn.MultiheadAttention(768, 12, batch_first=True)(x, x, x, need_weights=False)[0],
        "nn.StridedAttention": lambda: nn.StridedAttention(stride=4)(x),
        "nn.LocalGlobalAttention": lambda: nn.LocalGlobalAttention(local_window=64, num_global_tokens=4)(x),
        "nn.CrossMemoryAttention": lambda: nn.CrossMemoryAttention().fuse_with_memory(x, memory, 0.3),
        "nn.HierarchicalAttentionBlock": lambda: nn.HierarchicalAttentionBlock(attention_type="cross_memory")(x, memory),
        "nn.MambaLayer": lambda: nn.MambaLayer()(x),
        "nn.build": lambda: built["block"](x, memory),
        "nn.DilatedAttention": lambda: nn.DilatedAttention(**pattern)(heads, heads, heads, is_causal=True),
        "nn.ImprovedDilatedAttention": lambda: nn.ImprovedDilatedAttention(**pattern)(heads, heads, heads),
        "nn.MultiheadDilatedAttention": lambda: nn.MultiheadDilatedAttention(768, 12, **pattern)(x, is_causal=True)[0],
        "nn.ImprovedMultiheadDilatedAttention": lambda: nn.ImprovedMultiheadDilatedAttention(768, 12, **pattern)(x)[0],
        "nn.PerformerAttention": lambda: nn.PerformerAttention(kernel_type="elu")(x),
        "nn.LinearSelfAttention": lambda: nn.LinearSelfAttention()(x),
        "nn.LinearAttentionBlock": lambda: nn.LinearAttentionBlock(attention_type="mamba")(x),
        "nn.HydraAttention": lambda: nn.HydraAttention(768, 12)(x),
        "nn.RippleAttention": lambda: nn.RippleAttention(768, 12)(x),
        "nn.TokenAttention": lambda: nn.TokenAttention(768, 12, mechanism="strided_attention", options={"stride": 4})(x),
        "nn.CrossAttentionModule": lambda: nn.CrossAttentionModule()(x[:, :77], memory),
        "nn.ImageCrossAttentionModule": lambda: nn.ImageCrossAttentionModule(768)(x, memory),
        "nn.EnhancedTransformer": lambda: nn.EnhancedTransformer(768, 2, 12, block_type="sparse")(x),
        **{name: partial(_called, block, x) for name, block in blocks.items()},
    }


def _called(block: Any, x: Tensor) -> Tensor:
    out: Tensor = block(768, 12)(x)
    return out


def rest(shown: set[str]) -> dict[str, Callable[[], Any]]:
    """The first case of every other row."""

    def first_case(row: Any) -> Callable[[], Any]:
        tensors, options = inputs.draw(row, row.cases[0], dtype=torch.float32, device=torch.device("cpu"))
        tensors.pop("seed", None)
        return lambda: row.call(**tensors, **options)

    return {name: first_case(row) for name, row in triton_attn.CATALOG.items() if name not in shown}


def path_of(call: Callable[[], Any]) -> str:
    """What runs: an implementation that the dispatcher chose, or torch's operators alone."""
    try:
        return triton_attn.explain(call).path
    except triton_attn.ArgumentError:
        return "torch's operators"


def main(argv: Sequence[str] | None = None) -> int:
    torch.manual_seed(0)
    by_hand = calls()
    every = by_hand | rest({name.partition(",")[0] for name in by_hand}) | modules()
    for name, call in every.items():
        found = call()
        shapes = ", ".join(str(tuple(x.shape)) for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor))
        print(f"{name:37} -> {shapes:32} {path_of(call)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
