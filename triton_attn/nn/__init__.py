"""Modules over our functions: torch.nn's and those of the systems we re-implement, same parameters, same calls."""

from triton_attn.nn.configuration import build
from triton_attn.nn.cross_attention import CrossAttentionModule, ImageCrossAttentionModule, image_context
from triton_attn.nn.cross_memory_attention import CrossMemoryAttention
from triton_attn.nn.deep_norm_block import DeepNormResidualAttentionBlock, deepnorm_constants
from triton_attn.nn.dilated_attention import DilatedAttention, ImprovedDilatedAttention
from triton_attn.nn.dilated_states import from_darcstar, from_dilated_attention_pytorch, from_torchscale
from triton_attn.nn.enhanced_transformer import EnhancedTransformer
from triton_attn.nn.hierarchical_attention_block import HierarchicalAttentionBlock
from triton_attn.nn.hydra_attention import HydraAttention
from triton_attn.nn.local_global_attention import LocalGlobalAttention
from triton_attn.nn.mamba_layer import MambaLayer
from triton_attn.nn.multihead_attention import MultiheadAttention
from triton_attn.nn.multihead_dilated_attention import ImprovedMultiheadDilatedAttention, MultiheadDilatedAttention, magneto_gain
from triton_attn.nn.parallel_block import ParallelResidualAttentionBlock
from triton_attn.nn.performer_attention import LinearAttentionBlock, LinearSelfAttention, PerformerAttention
from triton_attn.nn.residual_blocks import (
    LinearAttentionResidualBlock,
    ResidualAttentionBlock,
    SparseAttentionResidualBlock,
    SubLNResidualAttentionBlock,
)
from triton_attn.nn.ripple_attention import RippleAttention
from triton_attn.nn.strided_attention import StridedAttention
from triton_attn.nn.token_attention import TokenAttention

__all__ = [
    "CrossAttentionModule",
    "CrossMemoryAttention",
    "DeepNormResidualAttentionBlock",
    "DilatedAttention",
    "EnhancedTransformer",
    "HierarchicalAttentionBlock",
    "HydraAttention",
    "ImageCrossAttentionModule",
    "ImprovedDilatedAttention",
    "ImprovedMultiheadDilatedAttention",
    "LinearAttentionBlock",
    "LinearAttentionResidualBlock",
    "LinearSelfAttention",
    "LocalGlobalAttention",
    "MambaLayer",
    "MultiheadAttention",
    "MultiheadDilatedAttention",
    "ParallelResidualAttentionBlock",
    "PerformerAttention",
    "ResidualAttentionBlock",
    "RippleAttention",
    "SparseAttentionResidualBlock",
    "StridedAttention",
    "SubLNResidualAttentionBlock",
    "TokenAttention",
    "build",
    "deepnorm_constants",
    "from_darcstar",
    "from_dilated_attention_pytorch",
    "from_torchscale",
    "image_context",
    "magneto_gain",
]
