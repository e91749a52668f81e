"""Linear attention by its definition, in naive PyTorch: every score a product of features, all of them in memory."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

from triton_attn.reference._features import features, pulled_back, roundings


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
    """out_i = sum_j a_ij v_j / (sum_j a_ij + eps), a_ij = scale <phi(q_i), phi(k_j)>, the initial state counting as earlier keys."""
    phi_q, phi_k, value = _operands(query, key, value, key_padding_mask, feature_map)
    scale = 1.0 if scale is None else scale
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    scores = _seen(torch.einsum("bhmf,bhnf->bhmn", phi_q, _spread(phi_k, group)) * scale, causal)
    out, total = torch.einsum("bhmn,bhne->bhme", scores, _spread(value, group)), scores.sum(-1, keepdim=True)
    wide = torch.promote_types(query.dtype, torch.float32)
    state, normalizer = torch.einsum("bgnf,bgne->bgfe", phi_k.to(wide), value.to(wide)), phi_k.to(wide).sum(2)
    if initial_state is not None:
        earlier = torch.einsum("bhmf,bhfe->bhme", phi_q.to(wide), _spread(initial_state, group)) * scale
        out, state = (out + earlier).to(query.dtype), state + initial_state
    if initial_normalizer is not None:
        earlier = torch.einsum("bhmf,bhf->bhm", phi_q.to(wide), _spread(initial_normalizer, group)) * scale
        total, normalizer = (total + earlier[..., None]).to(query.dtype), normalizer + initial_normalizer
    if normalize:
        out = out / (total + eps)
    return (out, state, normalizer) if return_state else out


def bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_state: Tensor | None = None,
    grad_normalizer: Tensor | None = None,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S: the formulas on magnitudes, to first order in the errors of every factor.

    `q` and `k` below are features, `err_*` what one unit of rounding in each factor may move: with out = N / D,
    err_out = (err_N + |out| err_D) / |D|, and the backward formulas likewise, from dN = dO / D and dD = -<dO, out> / D.
    """
    q, k, value = _operands(query, key, value, key_padding_mask, feature_map)
    scale = 1.0 if scale is None else scale
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    unit_k = roundings(key if key_padding_mask is None else key.masked_fill(key_padding_mask[:, None, :, None], 0.0), feature_map)
    mag_q, mag_k, mag_v = q.abs() * abs(scale), k.abs(), value.abs()
    err_q, err_k = mag_q * roundings(query, feature_map), mag_k * unit_k
    keys, err_keys, values = (_spread(x, group) for x in (mag_k, err_k, mag_v))
    zeros = torch.zeros_like
    begun = zeros(mag_k.mT @ mag_v) if initial_state is None else initial_state.abs()
    begun_sum = zeros(mag_k.sum(2)) if initial_normalizer is None else initial_normalizer.abs()
    wide_begun, wide_sum = _spread(begun, group), _spread(begun_sum, group)[..., None]
    scores = _seen(err_q @ keys.mT + mag_q @ err_keys.mT, causal)
    out = linear_attention(
        query,
        key,
        value,
        feature_map=feature_map,
        causal=causal,
        normalize=normalize,
        scale=scale,
        eps=eps,
        key_padding_mask=key_padding_mask,
        initial_state=initial_state,
        initial_normalizer=initial_normalizer,
    )
    assert isinstance(out, Tensor)
    err_top, err_bottom = scores @ values + err_q @ wide_begun, scores.sum(-1, keepdim=True) + err_q @ wide_sum + abs(eps)
    divisor = torch.ones_like(err_bottom)
    if normalize:
        total = _seen(q * scale @ _spread(k, group).mT, causal).sum(-1, keepdim=True)
        if initial_normalizer is not None:
            total = total + q * scale @ _spread(initial_normalizer, group)[..., None]
        divisor = (total + eps).abs()
    loss = 1.0 + err_bottom / divisor if normalize else divisor
    err_out = (err_top + out.abs() * err_bottom * normalize) / divisor
    d_top = grad_out.abs() / divisor * loss
    d_bottom = (grad_out.abs() * (err_out + out.abs() * loss)).sum(-1, keepdim=True) / divisor if normalize else zeros(divisor)
    d_scores = _seen(d_top @ values.mT + d_bottom, causal)
    twice_q, twice_k = mag_q + err_q, mag_k + err_k
    d_state, d_normalizer = _summed(twice_q.mT @ d_top, group), _summed((twice_q * d_bottom).sum(2), group)
    d_q = abs(scale) * (d_scores @ _spread(twice_k, group) + d_top @ wide_begun.mT + d_bottom * wide_sum.mT)
    d_k = _summed(d_scores.mT @ twice_q, group)
    d_value = _summed(_seen(mag_q @ keys.mT + scores, causal).mT @ d_top, group)
    if grad_state is not None:
        d_state = d_state + grad_state.abs()
        d_k, d_value = d_k + mag_v @ grad_state.abs().mT, d_value + twice_k @ grad_state.abs()
    if grad_normalizer is not None:
        d_normalizer = d_normalizer + grad_normalizer.abs()
        d_k = d_k + grad_normalizer.abs()[..., None, :]
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        d_k, d_value, key = d_k.masked_fill(hidden, 0.0), d_value.masked_fill(hidden, 0.0), key.masked_fill(hidden, 0.0)
    return {
        "out": err_out,
        "state": twice_k.mT @ mag_v + begun,
        "normalizer": twice_k.sum(2) + begun_sum,
        "query": pulled_back(d_q, query, feature_map),
        "key": pulled_back(d_k, key, feature_map),
        "value": d_value,
        "initial_state": d_state,
        "initial_normalizer": d_normalizer,
    }


def _operands(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor, Tensor]:
    """phi(Q), phi(K) and V; padded keys have neither features nor a value, whatever lies there."""
    phi_q = features(query, feature_map)
    if key_padding_mask is None:
        return phi_q, features(key, feature_map), value
    hidden = key_padding_mask[:, None, :, None]
    return phi_q, features(key.masked_fill(hidden, 0.0), feature_map).masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)


def _seen(scores: Tensor, causal: bool) -> Tensor:
    return scores.tril() if causal else scores


def _spread(x: Tensor, group: int) -> Tensor:
    """Once for every query head."""
    return repeat(x, "b g ... -> b (g r) ...", r=group)


def _summed(x: Tensor, group: int) -> Tensor:
    """Over the query heads that share a key head."""
    return x.reshape(x.shape[0], x.shape[1] // group if group else 0, group, *x.shape[2:]).sum(2)
