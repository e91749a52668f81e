"""Whole small models over the modules of triton_attn.nn."""

from triton_attn.models.adapted_clip import AdaptedCLIPWithCrossAttention
from triton_attn.models.long_net import LongNet
from triton_attn.models.vision_transformer import VisionTransformer

__all__ = ["AdaptedCLIPWithCrossAttention", "LongNet", "VisionTransformer"]
