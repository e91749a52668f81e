"""Whole small models over the modules of triton_attn.nn."""

from triton_attn.models.vision_transformer import VisionTransformer

__all__ = ["VisionTransformer"]
