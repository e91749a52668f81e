"""The selective scan by doubling inside tiles of time: out of place, and differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE = 128


def scanned(
    u: Tensor, size: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, last_state) by doubling inside tiles (Hillis and Steele, 1986), differentiable any number of times.

    Decays are exponentials of what is not positive, and are only ever multiplied: nothing overflows.
    """
    b, d, length = u.shape
    groups, n = B.shape[1], A.shape[1]
    packed = None if cu_seqlens is None else _Packed(cu_seqlens, length, initial_state)
    h = size.new_zeros(b, d, n) if initial_state is None or packed is not None else initial_state
    last = h if packed is None else packed.start(h)
    outs = []
    again = torch.is_grad_enabled() and length > TILE and not torch._C._are_functorch_transforms_active()
    for start in range(0, length, TILE):
        part = slice(start, start + TILE)
        given = (h, u[:, :, part], size[:, :, part], A, B[..., part], C[..., part], groups, packed, start)
        # recomputed in the backward pass, or every state would be kept for it
        y, h, found = checkpoint(_tile, *given, use_reentrant=False) if again else _tile(*given)
        outs.append(y)
        last = h if packed is None else torch.where(packed.ends_in(start, y.shape[2]), found, last)
    return torch.cat(outs, 2) if outs else size.new_zeros(u.shape), last


class _Packed:
    """Sequences in one row, by tensors alone, so that their lengths may be unknown."""

    def __init__(self, cu_seqlens: Tensor, length: int, initial_state: Tensor | None) -> None:
        self.first, self.end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        self.initial_state = initial_state
        steps = torch.arange(length, device=cu_seqlens.device)
        self.number = (torch.searchsorted(cu_seqlens.long(), steps, right=True) - 1).clamp(0, max(self.first.shape[0] - 1, 0))
        self.begins = steps == self.first[self.number] if self.first.shape[0] else steps < 0

    def start(self, h: Tensor) -> Tensor:
        """The last states of sequences without steps."""
        count = self.first.shape[0]
        return h.new_zeros(count, *h.shape[1:]) if self.initial_state is None else self.initial_state

    def ends_in(self, start: int, steps: int) -> Tensor:
        final = self.end - 1
        return ((final >= start) & (final < start + steps) & (self.end > self.first))[:, None, None]


def _tile(
    h: Tensor, u: Tensor, size: Tensor, A: Tensor, B: Tensor, C: Tensor, groups: int, packed: _Packed | None, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the state after the last step, the states after the packed sequences' ends) of a few steps."""
    wide, steps = size.dtype, u.shape[2]
    decay = (size[:, :, None] * A[:, :, None]).exp()  # (B, D, N, T)
    wide_b, wide_c = (x.to(wide).repeat_interleave(u.shape[1] // groups if groups else 1, 1) for x in (B, C))
    added = (size * u)[:, :, None] * wide_b
    if packed is not None:
        begins = packed.begins[start : start + steps]
        if packed.initial_state is not None:
            given = packed.initial_state[packed.number[start : start + steps]].permute(1, 2, 0)[None]
            added = torch.where(begins, added + decay * given, added)
        decay = decay.masked_fill(begins, 0.0)
    step = 1
    while step < steps:
        added = torch.cat((added[..., :step], added[..., step:] + decay[..., step:] * added[..., :-step]), -1)
        decay = torch.cat((decay[..., :step], decay[..., step:] * decay[..., :-step]), -1)
        step *= 2
    states = added + decay * h[..., None]
    y = (states * wide_c).sum(2)
    if packed is None:
        return y, states[..., -1], h
    place = (packed.end - 1 - start).clamp(0, steps - 1)
    return y, states[..., -1], states[0].index_select(-1, place).permute(2, 0, 1)
