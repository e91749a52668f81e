"""A branch added at the length of what it is added to, in stock PyTorch operators."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_matched_add(
    x: Tensor, branch: Tensor, weight: Tensor | None = None, *, scale: float = 1.0, eps: float = 1e-6, return_gain: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """(out, gain): two norms and one pass over both inputs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    ours, theirs = (torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=wide) for part in (x, branch))
    gain = ours / (theirs + eps)
    factor = scale * gain if weight is None else scale * weight.to(wide) * gain
    out = torch.addcmul(x.to(wide), factor, branch.to(wide)).to(x.dtype)
    return (out, gain.squeeze(-1)) if return_gain else out
