"""Hydra attention by its definition, in naive PyTorch, every score of every branch in memory; and its bound."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn.reference import _linear
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
    """out_ri = sum_j a_rij v_j / (sum_j a_rij + eps), a_rij = scale <phi(q_ri), phi(k_j)>, beside the sums over keys."""
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    phi_q, phi_k = features(query_branches, feature_map), features(key, feature_map)
    if key_padding_mask is not None:
        phi_k = phi_k.masked_fill(hidden, 0.0)
    scores = torch.einsum("brhmf,bhnf->brhmn", phi_q, phi_k) * (1.0 if scale is None else scale)
    scores = scores.tril() if causal else scores
    out = torch.einsum("brhmn,bhne->brhme", scores, value) / (scores.sum(-1, keepdim=True) + eps)
    wide = torch.promote_types(key.dtype, torch.float32)
    state = torch.einsum("bhnf,bhne->bhfe", phi_k.to(wide), value.to(wide))
    return (out, state, phi_k.to(wide).sum(2)) if return_state else out


def bound(
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_state: Tensor | None = None,
    grad_normalizer: Tensor | None = None,
    *,
    feature_map: str = "crelu",
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Linear attention's bound, of its errors in every branch: branches are query heads that share a key head."""
    heads = query_branches.shape[2], query_branches.shape[1]
    found = _linear.bound(
        query_branches.transpose(1, 2).flatten(1, 2),
        key,
        value,
        grad_out.transpose(1, 2).flatten(1, 2),
        grad_state,
        grad_normalizer,
        feature_map=feature_map,
        causal=causal,
        scale=scale,
        eps=eps,
        key_padding_mask=key_padding_mask,
    )
    pairs = (("out", "out"), ("query_branches", "query"))
    branches = {name: torch.unflatten(found[old], 1, heads).transpose(1, 2) for name, old in pairs}
    return {**{name: found[name] for name in ("state", "normalizer", "key", "value")}, **branches}
