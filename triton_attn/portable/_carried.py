"""A carried state in stock operators: chunks for the causal form, a product for the other. Numerators and denominators apart.

A column of ones beside the values would give both in one product, at up to twice the time: what is cut out of its result is copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
CHUNKS = 32  # of which the prefix is one product with a triangle of ones, where `cumsum` would take six times as long
State = tuple[Tensor, Tensor]  # S (B, G, F, E), z (B, G, F)
Walked = tuple[Tensor, Tensor, State]  # numerators, denominators, the state after the last key


def total(phi_k: Tensor, value: Tensor, state: State | None) -> State:
    """(S, z) of all keys: (B, G, N, F), (B, G, N, E)."""
    top, bottom = phi_k.mT @ value, phi_k.sum(-2)
    return (top, bottom) if state is None else (top + state[0], bottom + state[1])


def seen(phi_q: Tensor, state: State, members: int = 2) -> tuple[Tensor, Tensor]:
    """(phi_q S, phi_q z) of (B, G, R, M, F), or (B, R, G, M, F) with `members` 1."""
    return phi_q @ state[0].unsqueeze(members), phi_q @ state[1][..., None].unsqueeze(members)


def causal(phi_q: Tensor, phi_k: Tensor, value: Tensor, state: State | None, members: int = 2) -> Walked:
    """The same of row i of phi_q with S and z of the keys up to i, and the last (S, z). M = N."""
    (b, g, n, f), phi_q = phi_k.shape, phi_q.movedim(members, 2)
    if n == 0:
        state = total(phi_k, value, state)
        return *seen(phi_q.movedim(2, members), state, members), state
    state = (value.new_zeros(b, g, f, value.shape[-1]), value.new_zeros(b, g, f)) if state is None else state
    if torch.compiler.is_compiling() or n <= CHUNK * CHUNKS:
        # compiled, a loop over spans would fix the length in the graph
        top, bottom, state = _span(phi_q, phi_k, value, state)
    else:
        tops, bottoms = [], []
        for q, k, v in zip(*(torch.split(x, CHUNK * CHUNKS, -2) for x in (phi_q, phi_k, value)), strict=True):
            top, bottom, state = _span(q, k, v, state)
            tops.append(top)
            bottoms.append(bottom)
        top, bottom = torch.cat(tops, 3), torch.cat(bottoms, 3)
    return top.movedim(2, members), bottom.movedim(2, members), state


def _span(q: Tensor, k: Tensor, v: Tensor, state: State) -> Walked:
    b, g, group, n, f = q.shape
    e, chunks = v.shape[-1], (n + CHUNK - 1) // CHUNK
    if torch.compiler.is_compiling() or chunks * CHUNK != n:  # torch copies for padding of 0, too
        q, k, v = (F.pad(x, (0, 0, 0, chunks * CHUNK - n)) for x in (q, k, v))
    q = q.view(b, g, group, chunks, CHUNK, f).transpose(2, 3).reshape(b * g * chunks, group * CHUNK, f)
    k, v = k.reshape(b * g * chunks, CHUNK, f), v.reshape(b * g * chunks, CHUNK, e)
    scores = (q @ k.mT).view(-1, group, CHUNK, CHUNK).tril_().view(-1, group * CHUNK, CHUNK)
    tops, top = _before(state[0].flatten(2), (k.mT @ v).view(b, g, chunks, f * e))
    bottoms, bottom = _before(state[1], k.sum(1).view(b, g, chunks, f))
    numerators = torch.baddbmm(q @ tops.reshape(-1, f, e), scores, v)
    denominators = torch.baddbmm(scores.sum(-1, keepdim=True), q, bottoms.reshape(-1, f, 1))
    numerators, denominators = (
        x.view(b, g, chunks, group, CHUNK, -1).transpose(2, 3).flatten(3, 4)[..., :n, :] for x in (numerators, denominators)
    )
    return numerators, denominators, (top.view(b, g, f, e), bottom)


def _before(state: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """(what lies before each chunk, what lies before the end), of sums over chunks (B, G, chunks, numbers)."""
    if torch.compiler.is_compiling():
        running = torch.cat((state[:, :, None], sums), 2).cumsum(2)
        return running[:, :, :-1], running[:, :, -1]
    earlier = torch.ones(sums.shape[2], sums.shape[2], dtype=sums.dtype, device=sums.device).tril(-1)
    before = torch.baddbmm(state.flatten(0, 1)[:, None], earlier.expand(sums.shape[0] * sums.shape[1], -1, -1), sums.flatten(0, 1))
    before = before.view(sums.shape)
    return before, before[:, :, -1] + sums[:, :, -1]
