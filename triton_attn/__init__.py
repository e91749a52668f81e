"""Fast attention for PyTorch: Triton kernels, matched references, and a dispatcher that says what it does."""

from triton_attn.arguments import ArgumentError
from triton_attn.catalog import CATALOG
from triton_attn.dispatch import Unsupported, explain, use_backend
from triton_attn.functional.attention import attention
from triton_attn.functional.scaled_dot_product_attention import scaled_dot_product_attention

__all__ = ["CATALOG", "ArgumentError", "Unsupported", "attention", "explain", "scaled_dot_product_attention", "use_backend"]
__version__ = "0.1.0"
