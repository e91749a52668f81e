"""Performer attention (FAVOR+) in stock operators: O(N), differentiable, in float32; the causal form by chunks of rescaled states."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn.portable._carried import CHUNK, with_ones

SPAN = 8 * CHUNK  # whose states fit a cache: there are as many as chunks, each of all features
Walked = tuple[Tensor, Tensor, Tensor]  # outputs, the state after the last key, its level


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
    """Numerator and denominator are one product, relative to e^M, M being the largest level that a query sees."""
    (b, h), g = query.shape[:2], key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    rows, _ = _features(query.to(wide), projection.to(wide), scale, kernel_epsilon)
    columns, level = _features(key.to(wide), projection.to(wide), scale, kernel_epsilon)
    if key_padding_mask is not None:
        level = level.masked_fill(key_padding_mask[:, None, :], -math.inf)
    rows = rows.reshape(b, g, h // g if g else 1, *rows.shape[2:])
    shape = (b, g, columns.shape[-1])
    top = value.new_zeros(*shape, value.shape[-1], dtype=wide) if initial_state is None else initial_state
    bottom = value.new_zeros(shape, dtype=wide) if initial_normalizer is None else initial_normalizer
    at = level.new_full((b, g), -math.inf) if initial_level is None else initial_level
    walk = _running if causal else _whole
    both, state, at = walk(rows, columns, with_ones(value.to(wide)), level, torch.cat((top, bottom[..., None]), -1), at)
    both = both.flatten(1, 2)
    total = both[..., -1:] + eps * columns.shape[-1]
    out = (both[..., :-1] / total.masked_fill(total == 0, 1.0)).to(query.dtype).contiguous()
    return (out, state[..., :-1].contiguous(), state[..., -1].contiguous(), at) if return_state else out


def _features(x: Tensor, projection: Tensor, scale: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """(features of vectors relative to their largest, the logarithm of that)."""
    exponents = x @ (projection.mT * math.sqrt(scale))
    # a constant to the gradient: whatever it is, it cancels
    largest = exponents.detach().amax(-1, keepdim=True)
    # in place: fresh memory costs more than these operations
    found = exponents.sub_(largest).exp_()
    found = found + epsilon if found.requires_grad else found.add_(epsilon)
    return found, largest[..., 0] - 0.5 * scale * x.square().sum(-1)


def _safe(level: Tensor) -> Tensor:
    """A level to subtract: where nothing has been seen yet, any."""
    return level.masked_fill(level == -math.inf, 0.0)


def _whole(rows: Tensor, columns: Tensor, value: Tensor, level: Tensor, state: Tensor, at: Tensor) -> Walked:
    last = torch.cat((at[..., None], level.detach()), -1).amax(-1)
    weight = (level - _safe(last)[..., None]).exp()
    # the keys' scale goes to the values, which have fewer columns than features
    state = columns.mT @ (value * weight[..., None]) + state * (at - _safe(last)).exp()[..., None, None]
    return rows @ state[:, :, None], state, last


def _running(rows: Tensor, columns: Tensor, value: Tensor, level: Tensor, state: Tensor, at: Tensor) -> Walked:
    if rows.shape[3] == 0:
        return _whole(rows, columns, value, level, state, at)
    if torch.compiler.is_compiling():
        # a loop over spans would fix the length in the graph
        return _span(rows, columns, value, level, state, at)
    parts = []
    spans = (torch.split(x, SPAN, axis) for x, axis in ((rows, 3), (columns, 2), (value, 2), (level, 2)))
    for q, k, v, m in zip(*spans, strict=True):
        part, state, at = _span(q, k, v, m, state, at)
        parts.append(part)
    return torch.cat(parts, 3), state, at


def _span(q: Tensor, k: Tensor, v: Tensor, level: Tensor, state: Tensor, at: Tensor) -> Walked:
    """Chunks side by side. States are relative to the largest level so far, and so is every score."""
    b, g, group, n, f = q.shape
    e, chunks = v.shape[-1], (n + CHUNK - 1) // CHUNK
    if torch.compiler.is_compiling() or chunks * CHUNK != n:
        q, k, v = (F.pad(x, (0, 0, 0, chunks * CHUNK - n)) for x in (q, k, v))
        level = F.pad(level, (0, chunks * CHUNK - n), value=-math.inf)
    seen = torch.maximum(level.detach().cummax(-1).values, at[..., None]).view(b, g, chunks, CHUNK)
    q = q.view(b, g, group, chunks, CHUNK, f).transpose(2, 3).reshape(b, g, chunks, group * CHUNK, f)
    k, v, level = (x.view(b, g, chunks, CHUNK, *x.shape[3:]) for x in (k, v, level))
    # above the diagonal a key may be the larger one: it is hidden before its exponential is taken
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    weights = (level[..., None, :] - _safe(seen)[..., None]).masked_fill(later, -math.inf).exp()
    scores = ((q @ k.mT).view(b, g, chunks, group, CHUNK, CHUNK) * weights[:, :, :, None]).view(b, g, chunks, group * CHUNK, CHUNK)
    ends = torch.cat((at[..., None], seen[..., -1]), -1)
    sums = k.mT @ (v * (level - _safe(ends[..., 1:, None])).exp()[..., None])
    earlier = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=q.device).tril()
    decay = (ends[..., None, :] - _safe(ends)[..., None]).masked_fill(~earlier, -math.inf).exp()
    before = (decay @ torch.cat((state[:, :, None], sums), 2).flatten(3)).view(b, g, chunks + 1, f, e)
    shrunk = (ends[..., :-1, None] - _safe(seen)).exp()[:, :, :, None].expand(b, g, chunks, group, CHUNK)
    out = (q @ before[:, :, :-1]) * shrunk.reshape(b, g, chunks, group * CHUNK, 1) + scores @ v
    out = out.view(b, g, chunks, group, CHUNK, e).transpose(2, 3).reshape(b, g, group, chunks * CHUNK, e)
    return out[..., :n, :], before[:, :, -1], ends[..., -1]
