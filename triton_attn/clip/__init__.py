"""Training of models.AdaptedCLIPWithCrossAttention on images with masks of defects, behind `triton-attn train-clip-adapter`."""
