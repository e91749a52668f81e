"""LayerNorm of a weighted sum in stock PyTorch operators: a sum, and torch's own LayerNorm in float32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    eps: float = 1e-5,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """(out, sum)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    if residual is not None:
        h = torch.add(h, residual.to(wide), alpha=alpha)
    scale, shift = (None if parameter is None else parameter.to(wide) for parameter in (weight, bias))
    out = F.layer_norm(h, h.shape[-1:], scale, shift, eps).to(x.dtype)
    return (out, x[:0] if residual is None else h.to(x.dtype)) if return_sum else out
