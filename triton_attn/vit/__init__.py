"""Training and evaluation of models.VisionTransformer, behind `triton-attn vit`."""
