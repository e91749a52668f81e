"""Hydra attention in stock operators: O(N), differentiable, the state of a head summed once in float32 for all branches."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn.portable import _carried
from triton_attn.reference._features import features


def hydra_attention(
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "crelu",
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Hydra attention in O(N) time and memory."""
    wide = torch.promote_types(key.dtype, torch.float32)
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    phi_q, phi_k = features(query_branches.to(wide), feature_map), features(key.to(wide), feature_map)
    if key_padding_mask is not None:
        phi_k = phi_k.masked_fill(hidden, 0.0)
    walk = _carried.causal if causal else _carried.everything
    both, last = walk(phi_q.transpose(1, 2), phi_k, _carried.with_ones(value.to(wide)), None)
    both, scale = both.transpose(1, 2), 1.0 if scale is None else scale
    out = (both[..., :-1] * (scale / (both[..., -1:] * scale + eps))).to(query_branches.dtype).contiguous()
    return (out, last[..., :-1].contiguous(), last[..., -1].contiguous()) if return_state else out
