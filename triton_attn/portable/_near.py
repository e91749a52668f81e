"""A short band on a CPU: blocks of queries against the keys around them by torch's fused call, all heads at once.

Where a head has few blocks, the calls of `_banded` cost more than its products. The joint log-sum-exp makes the fused backward exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from triton_attn.portable import _fused

ROWS = 64
LONGEST = 1024


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Short, and right for the fused operators."""
    return query.shape[2] <= LONGEST and all(x.stride(-1) == 1 for x in (query, key, value)) and _fused.serves(query, key, value)


def pays(n: int, behind: int, ahead: int) -> bool:
    """Blocks visit so much less than every key that several calls are cheaper than one."""
    visited = sum(min(start + ROWS + ahead, n) - max(start - behind, 0) for start in range(0, n, ROWS))
    return n >= 2 * ROWS and visited * ROWS <= 0.75 * n * n


def _pieces(n: int, behind: int, ahead: int, more: int, like: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, the keys around them, and what is added to their scores and to those of `more` keys after these."""
    shape: tuple[int, int, int] | None = None
    mask = like
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        low, high = max(start - behind, 0), min(stop + ahead, n)
        if shape != (stop - start, start - low, high - low):
            shape = stop - start, start - low, high - low
            inside = torch.ones(stop - start, high - low + more, dtype=torch.bool)
            inside[:, : high - low].tril_(start - low + ahead).triu_(start - low - behind)
            mask = like.new_zeros(inside.shape).masked_fill_(~inside, -math.inf)
        yield slice(start, stop), slice(low, high), mask


def _joined(x: Tensor, more: Tensor) -> Tensor:
    return torch.cat((x, more), 2) if more.shape[2] else x


def forward(
    query: Tensor, key: Tensor, value: Tensor, more_key: Tensor, more_value: Tensor, behind: int, ahead: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and its log-sum-exp."""
    b, h, n = query.shape[:3]
    out = torch.empty(b, h, n, value.shape[-1], dtype=query.dtype)
    lses = []
    for rows, keys, mask in _pieces(n, behind, ahead, more_key.shape[2], query):
        k, v = _joined(key[:, :, keys], more_key), _joined(value[:, :, keys], more_value)
        found, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query[:, :, rows], k, v, attn_mask=mask, scale=scale)
        out[:, :, rows] = found
        lses.append(lse)
    return out, torch.cat(lses, 2)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    more_key: Tensor,
    more_value: Tensor,
    out: Tensor,
    lse: Tensor,
    behind: int,
    ahead: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of the five inputs."""
    grad = _fused.together(grad)
    results = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in (query, key, value, more_key, more_value))
    for rows, keys, mask in _pieces(query.shape[2], behind, ahead, more_key.shape[2], query):
        k, v = _joined(key[:, :, keys], more_key), _joined(value[:, :, keys], more_value)
        given = (grad[:, :, rows], query[:, :, rows], k, v, out[:, :, rows], lse[:, :, rows], 0.0, False)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, attn_mask=mask, scale=scale)
        results[0][:, :, rows] = dq
        width = keys.stop - keys.start
        for found, near, more in ((dk, results[1], results[3]), (dv, results[2], results[4])):
            near[:, :, keys] += found[:, :, :width]
            more += found[:, :, width:]
    return results
