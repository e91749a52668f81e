"""torch.nn's modules over our functions: same parameters, same calls."""

from triton_attn.nn.multihead_attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
