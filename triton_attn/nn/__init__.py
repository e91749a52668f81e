"""Modules over our functions: torch.nn's and HierarchicalVLM's, same parameters, same calls."""

from triton_attn.nn.configuration import build
from triton_attn.nn.cross_memory_attention import CrossMemoryAttention
from triton_attn.nn.hierarchical_attention_block import HierarchicalAttentionBlock
from triton_attn.nn.local_global_attention import LocalGlobalAttention
from triton_attn.nn.mamba_layer import MambaLayer
from triton_attn.nn.multihead_attention import MultiheadAttention
from triton_attn.nn.strided_attention import StridedAttention

__all__ = [
    "CrossMemoryAttention",
    "HierarchicalAttentionBlock",
    "LocalGlobalAttention",
    "MambaLayer",
    "MultiheadAttention",
    "StridedAttention",
    "build",
]
