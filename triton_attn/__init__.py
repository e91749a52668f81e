"""Fast attention for PyTorch: Triton kernels, matched references, and a dispatcher that says what it does."""

from typing import TYPE_CHECKING

from triton_attn.arguments import ArgumentError
from triton_attn.catalog import CATALOG
from triton_attn.dispatch import Unsupported, explain, use_backend
from triton_attn.functional.add_layer_norm import add_layer_norm, layer_norm
from triton_attn.functional.attention import attention
from triton_attn.functional.attention_varlen import attention_varlen
from triton_attn.functional.causal_conv1d import causal_conv1d, causal_conv1d_fn
from triton_attn.functional.causal_conv1d_update import causal_conv1d_update
from triton_attn.functional.dilated_attention import dilated_attention
from triton_attn.functional.hydra_attention import hydra_attention
from triton_attn.functional.linear_attention import linear_attention, linear_attention_step
from triton_attn.functional.local_global_attention import local_global_attention
from triton_attn.functional.meta_hydra_attention import meta_hydra_attention
from triton_attn.functional.norm_matched_add import norm_matched_add
from triton_attn.functional.orthogonal_projection import orthogonal_projection
from triton_attn.functional.performer_attention import performer_attention
from triton_attn.functional.pool_tokens import pool_tokens
from triton_attn.functional.ripple_attention import ripple_attention
from triton_attn.functional.scaled_dot_product_attention import scaled_dot_product_attention
from triton_attn.functional.selective_scan import selective_scan, selective_scan_fn
from triton_attn.functional.selective_state_update import selective_state_update
from triton_attn.functional.sparse_attention import sparse_attention
from triton_attn.functional.strided_attention import strided_attention
from triton_attn.functional.subset_attention import subset_attention
from triton_attn.tuning.autotune import autotune, broadcast_tables

if TYPE_CHECKING:
    from triton_attn.integrations.patching import patch, sdpa_override
else:

    def __getattr__(name):
        # they stand on triton_attn.nn, which a call of a function does not need
        if name in ("patch", "sdpa_override"):
            from triton_attn.integrations import patching

            return getattr(patching, name)
        raise AttributeError(f"module 'triton_attn' has no attribute {name!r}")


__all__ = [
    "CATALOG",
    "ArgumentError",
    "Unsupported",
    "add_layer_norm",
    "attention",
    "attention_varlen",
    "autotune",
    "broadcast_tables",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "dilated_attention",
    "explain",
    "hydra_attention",
    "layer_norm",
    "linear_attention",
    "linear_attention_step",
    "local_global_attention",
    "meta_hydra_attention",
    "norm_matched_add",
    "orthogonal_projection",
    "patch",
    "performer_attention",
    "pool_tokens",
    "ripple_attention",
    "scaled_dot_product_attention",
    "sdpa_override",
    "selective_scan",
    "selective_scan_fn",
    "selective_state_update",
    "sparse_attention",
    "strided_attention",
    "subset_attention",
    "use_backend",
]
__version__ = "0.1.0"
