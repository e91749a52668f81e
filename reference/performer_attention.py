"""Performer attention (FAVOR+) by its definition, in naive PyTorch: every score a product of random features, all of them in memory."""

from __future__ import annotations

import math

import torch
from einops import repeat
from torch import Tensor


def performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    causal: bool = False,
    kernel_epsilon: float = 1e-4,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    initial_level: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """out_i = sum_j a_ij v_j / (sum_j a_ij + F eps), a_ij = <phi(q_i), phi(k_j)> e^(m_j - M_i), M_i being the largest m that i sees.

    phi(x) = e^(y - max y) + kernel_epsilon with y = sqrt(scale) W x, and m = max y - scale |k|^2 / 2. M_i cancels. Gradients take max y for
    a constant, too, as the original's do, though it cancels only where kernel_epsilon is 0.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = _visible(key, key_padding_mask), _visible(value, key_padding_mask)
    phi_q, _ = features(query, projection, scale, kernel_epsilon)
    phi_k, level = features(key, projection, scale, kernel_epsilon, key_padding_mask)
    first = _first(level, initial_level)
    seen, last = running(level.detach(), first, causal)
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    weights = _weights(level, seen, causal, query.shape[2])
    scores = torch.einsum("bhmf,bhnf->bhmn", phi_q, _spread(phi_k, group)) * _spread(weights, group).to(phi_q.dtype)
    out, total = torch.einsum("bhmn,bhne->bhme", scores, _spread(value, group)), scores.sum(-1, keepdim=True)
    wide = level.dtype
    left = (level - safe(last)[..., None]).exp()[..., None]
    state = torch.einsum("bgnf,bgne->bgfe", phi_k.to(wide) * left, value.to(wide))
    normalizer = (phi_k.to(wide) * left).sum(2)
    before, kept = (first[..., None] - safe(seen)).exp(), (first - safe(last)).exp()[..., None]
    if initial_state is not None:
        earlier = torch.einsum("bhmf,bhfe->bhme", phi_q.to(wide), _spread(initial_state, group)) * _spread(before, group)[..., None]
        out, state = (out + earlier).to(query.dtype), state + initial_state * kept[..., None]
    if initial_normalizer is not None:
        earlier = torch.einsum("bhmf,bhf->bhm", phi_q.to(wide), _spread(initial_normalizer, group)) * _spread(before, group)
        total, normalizer = (total + earlier[..., None]).to(query.dtype), normalizer + initial_normalizer * kept
    total = total + eps * projection.shape[0]
    out = out / total.masked_fill(total == 0, 1.0)  # a query that sees nothing gives 0
    return (out, state, normalizer, last) if return_state else out


def bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    grad_out: Tensor,
    grad_state: Tensor | None = None,
    grad_normalizer: Tensor | None = None,
    grad_level: Tensor | None = None,
    *,
    causal: bool = False,
    kernel_epsilon: float = 1e-4,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    initial_level: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S: the formulas on magnitudes, to first order in the errors of every factor.

    One unit of rounding in an exponent moves a feature by the exponent's magnitude, of its terms and of the maximum; a level also by that
    of scale |k|^2 / 2, and by what the largest that is seen may be off.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = _visible(key, key_padding_mask), _visible(value, key_padding_mask)
    q, _ = features(query, projection, scale, kernel_epsilon)
    k, level = features(key, projection, scale, kernel_epsilon, key_padding_mask)
    first = _first(level, initial_level)
    seen, last = running(level, first, causal)
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    unit_q, _ = _units(query, projection, scale)
    unit_k, off = _units(key, projection, scale)
    if key_padding_mask is not None:
        off = off.masked_fill(key_padding_mask[:, None, :], 0.0)
    begun_off = torch.zeros_like(first) if initial_level is None else safe(first).abs()
    seen_off, last_off = running(off, begun_off, causal)
    weights = _weights(level, seen, causal, query.shape[2])
    loose = weights * (2 + off[..., None, :] + (seen_off + safe(seen).abs())[..., None])
    weights, loose = _spread(weights, group), _spread(loose, group)
    left = (level - safe(last)[..., None]).exp()[..., None]
    loose_left = left * (2 + off + (last_off + safe(last).abs())[..., None])[..., None]
    before = _spread((first[..., None] - safe(seen)).exp(), group)[..., None]
    loose_before = before * _spread(2 + begun_off[..., None] + seen_off + safe(seen).abs(), group)[..., None]
    kept = (first - safe(last)).exp() * (2 + begun_off + last_off + safe(last).abs())
    keys, values, err_q, err_keys = _spread(k, group), _spread(value.abs(), group), q * unit_q, _spread(k * unit_k, group)
    begun = torch.zeros_like(k.mT @ value) if initial_state is None else initial_state.abs()
    begun_sum = torch.zeros_like(k.sum(2)) if initial_normalizer is None else initial_normalizer.abs()
    wide_begun, wide_sum = _spread(begun, group), _spread(begun_sum, group)[..., None]
    plain = (q @ keys.mT) * weights
    err = (err_q @ keys.mT + q @ err_keys.mT) * weights + (q @ keys.mT) * loose
    out = performer_attention(
        query,
        key,
        value,
        projection,
        causal=causal,
        kernel_epsilon=kernel_epsilon,
        scale=scale,
        eps=eps,
        key_padding_mask=key_padding_mask,
        initial_state=initial_state,
        initial_normalizer=initial_normalizer,
        initial_level=initial_level,
    )
    assert isinstance(out, Tensor)
    signed = torch.zeros_like(wide_sum) if initial_normalizer is None else _spread(initial_normalizer, group)[..., None]
    constant = eps * projection.shape[0]
    divisor = (plain.sum(-1, keepdim=True) + q @ signed * before + constant).abs()
    divisor = divisor.masked_fill(divisor == 0, 1.0)
    err_begun = err_q * before + q * loose_before
    err_top = err @ values + err_begun @ wide_begun
    err_bottom = err.sum(-1, keepdim=True) + err_begun @ wide_sum + constant
    err_out = (err_top + out.abs() * err_bottom) / divisor
    d_top, d_bottom = grad_out.abs() / divisor, (grad_out * out).abs().sum(-1, keepdim=True) / divisor
    loss = 1.0 + err_bottom / divisor
    err_d_top = d_top * loss
    err_d_bottom = (grad_out.abs() * (err_out + out.abs() * loss)).sum(-1, keepdim=True) / divisor
    d_scores = d_top @ values.mT + d_bottom
    err_d_scores = (err_d_top @ values.mT + err_d_bottom) * weights + d_scores * loose
    d_scores = d_scores * weights
    d_begun, err_d_begun = (x @ wide_begun.mT + y * wide_sum.mT for x, y in ((d_top, d_bottom), (err_d_top, err_d_bottom)))
    d_q = d_scores @ keys + d_begun * before
    err_d_q = err_d_scores @ keys + d_scores @ err_keys + err_d_begun * before + d_begun * loose_before
    d_k, err_d_k = _summed(d_scores.mT @ q, group), _summed(err_d_scores.mT @ q + d_scores.mT @ err_q, group)
    d_value = _summed(err.mT @ d_top + plain.mT @ err_d_top, group)
    d_state = _summed(err_begun.mT @ d_top + (q * before).mT @ err_d_top, group)
    d_normalizer = _summed((err_begun * d_bottom + q * before * err_d_bottom).sum(2), group)
    err_k = k * unit_k * left + k * loose_left
    for given, begins in ((grad_state, value.abs()), (grad_normalizer, None)):
        if given is None:
            continue
        told = begins @ given.abs().mT if begins is not None else given.abs()[..., None, :].expand_as(k)
        d_k, err_d_k = d_k + told * left, err_d_k + told * loose_left
    if grad_state is not None:
        d_state, d_value = d_state + grad_state.abs() * kept[..., None, None], d_value + err_k @ grad_state.abs()
    if grad_normalizer is not None:
        d_normalizer = d_normalizer + grad_normalizer.abs() * kept[..., None]
    root = math.sqrt(scale)
    slopes_q, slopes_k = q * (err_d_q + d_q * (1 + unit_q)), k * (err_d_k + d_k * (1 + unit_k))
    d_key = root * slopes_k @ projection.abs() + scale * key.abs() * slopes_k.sum(-1, keepdim=True)
    if key_padding_mask is not None:
        d_key, d_value = (_visible(x, key_padding_mask) for x in (d_key, d_value))
    return {
        "out": err_out,
        "state": err_k.mT @ value.abs() + begun * kept[..., None, None],
        "normalizer": err_k.sum(2) + begun_sum * kept[..., None],
        "level": last_off + safe(last).abs(),
        "query": root * slopes_q @ projection.abs(),
        "key": d_key,
        "value": d_value,
        "initial_state": d_state,
        "initial_normalizer": d_normalizer,
    }


def features(x: Tensor, projection: Tensor, scale: float, epsilon: float, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(phi(x) in x's dtype, the logarithm of what it was divided by, in float32 at the least)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    exponents = x.to(wide) @ projection.to(wide).mT * math.sqrt(scale)
    largest = exponents.detach().amax(-1, keepdim=True)
    level = largest[..., 0] - 0.5 * scale * x.to(wide).square().sum(-1)
    if key_padding_mask is not None:
        level = level.masked_fill(key_padding_mask[:, None, :], -math.inf)
    return ((exponents - largest).exp() + epsilon).to(x.dtype), level


def running(level: Tensor, first: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(the largest level that each query sees, (B, G, N), or (B, G, 1) if all see the same; the largest of all), `first` included."""
    levels = torch.cat((first[..., None], level), -1)
    last = levels.amax(-1)
    return (levels.cummax(-1).values[..., 1:] if causal else last[..., None]), last


def safe(level: Tensor) -> Tensor:
    """A level to subtract: where nothing is seen, any."""
    return level.masked_fill(level == -math.inf, 0.0)


def _first(level: Tensor, initial_level: Tensor | None) -> Tensor:
    return level.new_full(level.shape[:2], -math.inf) if initial_level is None else initial_level


def _weights(level: Tensor, seen: Tensor, causal: bool, queries: int) -> Tensor:
    """e^(m_j - M_i); a later key is hidden before its power is taken, for it may be the larger one."""
    exponents = level[..., None, :] - safe(seen)[..., None]
    exponents = exponents.expand(*level.shape[:2], queries, level.shape[-1])
    if causal:
        later = torch.ones(queries, queries, dtype=torch.bool, device=level.device).triu(1)
        exponents = exponents.masked_fill(later, -math.inf)
    return exponents.exp()


def _units(x: Tensor, projection: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """By how many units features may be off, and a level."""
    terms = x.abs() @ projection.abs().mT * math.sqrt(scale)
    largest = (x @ projection.mT * math.sqrt(scale)).amax(-1).abs()
    worst = terms.amax(-1)
    return 2 + terms + (worst + largest)[..., None], worst + largest + scale * x.square().sum(-1)


def _visible(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    return x if key_padding_mask is None else x.masked_fill(key_padding_mask[:, None, :, None], 0.0)


def _spread(x: Tensor, group: int) -> Tensor:
    """Once for every query head."""
    return repeat(x, "b g ... -> b (g r) ...", r=group)


def _summed(x: Tensor, group: int) -> Tensor:
    """Over the query heads that share a key head."""
    return x.reshape(x.shape[0], x.shape[1] // group if group else 0, group, *x.shape[2:]).sum(2)
