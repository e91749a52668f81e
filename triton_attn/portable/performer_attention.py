"""Performer attention (FAVOR+) in stock operators: O(N), differentiable, in float32; the causal form by chunks of rescaled states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn.portable._carried import CHUNK

MOST = 2 << 20  # features of queries and keys at a time, 8 MiB in float32
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
    """Without `causal` some heads at a time: what is computed of all of them would be fresh memory again and again."""
    g, features = key.shape[1], projection.shape[0]
    group = query.shape[1] // g if g else 1
    options: dict[str, Any] = {"causal": causal, "kernel_epsilon": kernel_epsilon, "eps": eps, "key_padding_mask": key_padding_mask}
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = g
    if not (causal or torch.compiler.is_compiling()):  # chunks of few heads would be too small
        heads = max(1, MOST // max(1, query.shape[0] * (group * query.shape[2] + key.shape[2]) * features))
    states = (initial_state, initial_normalizer, initial_level)
    if heads >= g:
        out, *last = _together(query, key, value, projection, states, scale, **options)
    else:
        splits = ((query, heads * group), *((x, heads) for x in (key, value, *states)))
        parts = zip(*((None,) * -(-g // heads) if x is None else torch.split(x, size, 1) for x, size in splits), strict=True)
        made = [_together(q, k, v, projection, begun, scale, **options) for q, k, v, *begun in parts]
        out, *last = (torch.cat(part, 1) for part in zip(*made, strict=True))
    return (out, *last) if return_state else out  # type: ignore[return-value]


def _together(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    begun: Sequence[Tensor | None],
    scale: float,
    *,
    causal: bool,
    kernel_epsilon: float,
    eps: float,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numerator and denominator are one product, of a column of ones, relative to e^M, M being the largest level that a query sees."""
    (b, h), g = query.shape[:2], key.shape[1]
    initial_state, initial_normalizer, initial_level = begun
    wide = torch.promote_types(query.dtype, torch.float32)
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
    both, state, at = walk(rows, columns, F.pad(value.to(wide), (0, 1), value=1.0), level, torch.cat((top, bottom[..., None]), -1), at)
    both = both.flatten(1, 2)
    total = both[..., -1:] + eps * columns.shape[-1]
    out = (both[..., :-1] / total.masked_fill(total == 0, 1.0)).to(query.dtype).contiguous()
    return out, state[..., :-1].contiguous(), state[..., -1].contiguous(), at


def _features(x: Tensor, projection: Tensor, scale: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """(features of vectors relative to their largest, the logarithm of that)."""
    exponents = x @ (projection.mT * math.sqrt(scale))
    # a constant to the gradient, as in the original; it cancels where epsilon is 0
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
    """Chunk by chunk. States are relative to the largest level so far, and so is every score."""
    n = level.shape[-1]
    if n == 0:
        return _whole(rows, columns, value, level, state, at)
    seen = torch.maximum(level.detach().cummax(-1).values, at[..., None])
    ends = torch.cat((at[..., None], seen[..., CHUNK - 1 : n - 1 : CHUNK], seen[..., -1:]), -1)
    shrunk = (_repeated(ends[..., :-1], n) - _safe(seen)).exp()[:, :, None, :, None]
    added = value * (level - _safe(_repeated(ends[..., 1:], n))).exp()[..., None]
    # a loop would fix the length in a graph
    walk = _side_by_side if torch.compiler.is_compiling() else _in_turn
    out, state = walk(rows, columns[:, :, None], value[:, :, None], added, level, _safe(seen), shrunk, state, ends)
    return out, state, ends[..., -1]


def _repeated(x: Tensor, n: int) -> Tensor:
    """What a chunk has, for each of its tokens."""
    return x[..., None].expand(*x.shape, CHUNK).flatten(-2)[..., :n]


def _weights(level: Tensor, seen: Tensor) -> Tensor:
    """e^(m_j - M_i). Above the diagonal a key may be the larger one: it is hidden before its power is taken."""
    later = torch.ones(level.shape[-1], level.shape[-1], dtype=torch.bool, device=level.device).triu(1)
    return (level[..., None, :] - seen[..., None]).masked_fill(later, -math.inf).exp()


def _in_turn(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor, level: Tensor, seen: Tensor, shrunk: Tensor, state: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    kept = (ends[..., :-1] - _safe(ends[..., 1:])).exp()[..., None, None]
    outs = []
    lines = (torch.split(x, CHUNK, axis) for x, axis in ((q, 3), (k, 3), (v, 3), (added, 2), (level, 2), (seen, 2), (shrunk, 3)))
    for i, (q, k, v, added, level, seen, shrunk) in enumerate(zip(*lines, strict=True)):
        scores = (q @ k.mT) * _weights(level, seen)[:, :, None]
        outs.append(scores @ v + (q @ state[:, :, None]) * shrunk)
        state = state * kept[:, :, i] + k[:, :, 0].mT @ added
    return torch.cat(outs, 3), state


def _side_by_side(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor, level: Tensor, seen: Tensor, shrunk: Tensor, state: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Every chunk at once, the states before them by a triangle of decays."""
    n, chunks = level.shape[-1], ends.shape[-1] - 1
    q, k, v, shrunk = (_chunked(x, 3, chunks) for x in (q, k, v, shrunk))
    added, level = (_chunked(x, 2, chunks) for x in (added, level))
    seen = _chunked(seen, 2, chunks, math.inf)  # or powers at no query may be infinite, and their gradients NaN
    sums = torch.cat((state[:, :, None], k[:, :, 0].mT @ added), 2)
    earlier = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=q.device).tril()
    decay = (ends[..., None, :] - _safe(ends)[..., None]).masked_fill(~earlier, -math.inf).exp()
    states = (decay @ sums.flatten(3)).view(sums.shape)
    out = (q @ k.mT * _weights(level, seen)[:, :, None]) @ v + (q @ states[:, :, None, :-1]) * shrunk
    return out.flatten(3, 4)[..., :n, :], states[:, :, -1]


def _chunked(x: Tensor, axis: int, chunks: int, beyond: float = 0.0) -> Tensor:
    """That axis as (chunks, CHUNK), filled up at its end, which no query sees."""
    filled = F.pad(x, (*(0 for _ in range(2 * (x.ndim - 1 - axis))), 0, chunks * CHUNK - x.shape[axis]), value=beyond)
    return filled.view(*x.shape[:axis], chunks, CHUNK, *x.shape[axis + 1 :])
