"""Linear attention in stock operators: O(N), differentiable, its state in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn.portable import _carried
from triton_attn.reference._features import features


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """O(N) time and memory; no state is kept for a token. Queries may be (B, members, Hk, M, D), and then so is the result."""
    b, g = key.shape[:2]
    wide = torch.promote_types(query.dtype, torch.float32)
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    phi_q, phi_k = features(query.to(wide), feature_map), features(key.to(wide), feature_map)
    if key_padding_mask is not None:
        phi_k = phi_k.masked_fill(hidden, 0.0)
    state = None
    if initial_state is not None or initial_normalizer is not None:
        shape = (b, g, phi_k.shape[-1])
        top = value.new_zeros(*shape, value.shape[-1], dtype=wide) if initial_state is None else initial_state
        bottom = value.new_zeros(shape, dtype=wide) if initial_normalizer is None else initial_normalizer
        state = top, bottom
    members = 1
    if query.ndim == 4:
        phi_q, members = phi_q.reshape(b, g, query.shape[1] // g if g else 1, *phi_q.shape[-2:]), 2
    walk = _carried.causal if causal else _carried.everything
    out, bottom, last = walk(phi_q, phi_k, value.to(wide), state, members)
    scale = 1.0 if scale is None else scale
    if normalize:
        factor = scale / (bottom * scale + eps)
        out = out * factor if out.requires_grad else out.mul_(factor)
    elif scale != 1.0:
        out = out * scale
    out = (out if query.ndim == 5 else out.flatten(1, 2)).to(query.dtype).contiguous()
    return (out, *last) if return_state else out
