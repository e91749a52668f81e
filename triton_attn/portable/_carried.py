"""A carried state in stock operators: chunks for the causal form, one product for the other. Numerator and denominator are one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
CHUNKS = 32  # of which the prefix is one product with a triangle of ones, where `cumsum` would take six times as long


def with_ones(value: Tensor) -> Tensor:
    """A last column of ones, whose sums are the denominators."""
    return F.pad(value, (0, 1), value=1.0)


def everything(phi_q: Tensor, phi_k: Tensor, value: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(phi_q S, S) with S = state + phi_k^T value: (B, G, R, M, F), (B, G, N, F), (B, G, N, E), (B, G, F, E)."""
    total = phi_k.mT @ value
    if state is not None:
        total = total + state
    return phi_q @ total[:, :, None], total


def causal(phi_q: Tensor, phi_k: Tensor, value: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(row i of phi_q times S_i, the last S) with S_i = state + sum_{j <= i} phi_k_j^T value_j. Shapes as above, M = N."""
    b, g, _, n, f = phi_q.shape
    if n == 0:
        return everything(phi_q, phi_k, value, state)
    state = value.new_zeros(b, g, f, value.shape[-1]) if state is None else state
    if torch.compiler.is_compiling():
        # a loop over spans would fix the length in the graph
        return _span(phi_q, phi_k, value, state)
    parts = []
    for q, k, v in zip(*(torch.split(x, CHUNK * CHUNKS, -2) for x in (phi_q, phi_k, value)), strict=True):
        part, state = _span(q, k, v, state)
        parts.append(part)
    return torch.cat(parts, 3), state


def _span(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    b, g, group, n, f = q.shape
    e, chunks = v.shape[-1], (n + CHUNK - 1) // CHUNK
    if torch.compiler.is_compiling() or chunks * CHUNK != n:  # torch copies for padding of 0, too
        q, k, v = (F.pad(x, (0, 0, 0, chunks * CHUNK - n)) for x in (q, k, v))
    q = q.view(b, g, group, chunks, CHUNK, f).transpose(2, 3).reshape(b, g, chunks, group * CHUNK, f)
    k, v = k.view(b, g, chunks, CHUNK, f), v.view(b, g, chunks, CHUNK, e)
    scores = (q @ k.mT).view(b, g, chunks, group, CHUNK, CHUNK).tril().view(b, g, chunks, group * CHUNK, CHUNK)
    sums = torch.cat((state[:, :, None], k.mT @ v), 2)
    if torch.compiler.is_compiling():
        before = sums.cumsum(2)
    else:
        ones = torch.ones(chunks + 1, chunks + 1, dtype=sums.dtype, device=sums.device).tril()
        before = (ones @ sums.flatten(3)).view(b, g, chunks + 1, f, e)
    out = q @ before[:, :, :-1] + scores @ v
    return out.view(b, g, chunks, group, CHUNK, e).transpose(2, 3).reshape(b, g, group, chunks * CHUNK, e)[..., :n, :], before[:, :, -1]
