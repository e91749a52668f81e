"""Linear attention in stock operators, which hydra attention's branches share."""

from triton_attn.portable._linear import linear_attention

__all__ = ["linear_attention"]
