"""Linear attention by its definition, in naive PyTorch, and its bound, which hydra attention's branches share."""

from triton_attn.reference._linear import bound, linear_attention

__all__ = ["bound", "linear_attention"]
