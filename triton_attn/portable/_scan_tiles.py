"""The selective scan eagerly, with explicit buffers: tiles of (time, N, D), one multiply-add a step, one product a tile.

Tiles stay in the cache; their buffers are used again and again, since fresh memory costs more than arithmetic. The backward pass
recomputes a tile from the state that it starts from.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn.portable._scan_doubling import scanned
from triton_attn.portable._watched import backward_is_watched, differentiable

TILE = 2**20  # numbers in each buffer of a tile, three of which must stay in the cache
SHORTEST, LONGEST = 16, 256  # steps


def steps_of(length: int, n: int, d: int) -> int:
    """How many steps a tile has."""
    return min(length, max(SHORTEST, min(TILE // max(n * d, 1), LONGEST)))


class Scan(torch.autograd.Function):
    """(y, last_state) of (u, Delta, A, B, C, initial_state, cu_seqlens); u, B and C in any dtype, the rest in the wide one."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, size: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (b, d, length), n = u.shape, A.shape[1]
        rows = _rows(b, length, cu_seqlens)
        y = torch.zeros_like(size)  # as u and delta lie in memory
        last = size.new_empty(len(rows), d, n)
        starts = []
        steps = steps_of(length, n, d)
        work = _Buffers(size, steps, n, d)
        for number, (item, first, end) in enumerate(rows):
            h = work.start(initial_state, number)
            for begin in range(first, end, max(steps, 1)):
                starts.append(h)
                part = slice(begin, min(begin + steps, end))
                tile = _Tile(work, u, size, A, B, item, part)
                states = tile.states(h)
                row = work.through[: part.stop - part.start]
                _by_groups(tile.turned(C), states, row)
                y[item, :, part] = row.t()
                h = states[-1].clone()
            last[number] = h.t()
        ctx.rows = rows
        ctx.starts = starts
        ctx.save_for_backward(u, size, A, B, C, initial_state, cu_seqlens)
        return y, last

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if backward_is_watched(grad_y, grad_last):
            return differentiable(scanned, saved, ctx.needs_input_grad, (grad_y, grad_last))
        u, size, A, B, C, initial_state, _ = saved
        (b, d, length), (groups, n) = u.shape, B.shape[1:3]
        du, dsize = (size.new_zeros(b, length, d) for _ in range(2))
        db, dc = (size.new_zeros(b, groups, length, n) for _ in range(2))
        da = size.new_zeros(n, d)
        dinitial = None if initial_state is None else torch.empty_like(initial_state)
        steps = steps_of(length, n, d)
        work = _Buffers(size, steps, n, d)
        at = A.t().contiguous()
        kept = len(ctx.starts)
        for number, (item, first, end) in reversed(list(enumerate(ctx.rows))):
            dh = grad_last[number].t().contiguous()
            for begin in reversed(range(first, end, max(steps, 1))):
                kept -= 1
                part = slice(begin, min(begin + steps, end))
                tile = _Tile(work, u, size, A, B, item, part)
                states = tile.states(ctx.starts[kept])
                gy = work.turn(grad_y[item, :, part], "gy")
                _outer_by_groups(tile.turned(C), gy, tile.grad)
                grads, decays = tile.grad.unbind(0), tile.decay.unbind(0)
                torch.add(grads[-1], dh, out=grads[-1])
                for t in range(len(grads) - 2, -1, -1):
                    torch.addcmul(grads[t], decays[t + 1], grads[t + 1], out=grads[t])
                dh = decays[0] * grads[0]
                _over_groups(states, gy, dc[item, :, part])
                _over_groups(tile.grad, tile.weight, db[item, :, part])
                through = work.through[: len(grads)]
                _by_groups(tile.b, tile.grad, through)
                # x = dh a h_{t-1}, in the place of the decays
                tile.decay[0].mul_(ctx.starts[kept])
                tile.decay[1:].mul_(states[:-1])
                tile.decay.mul_(tile.grad)
                torch.mul(tile.size, through, out=du[item, part])
                torch.mul(tile.u, through, out=dsize[item, part])
                da += torch.mul(tile.decay, tile.size[:, None], out=states).sum(0)
                dsize[item, part] += tile.decay.mul_(at).sum(1)
            if dinitial is not None:
                dinitial[number] = dh.t()
        return (
            du.transpose(1, 2).to(u.dtype),
            dsize.transpose(1, 2),
            da.t(),
            db.transpose(2, 3).to(B.dtype),
            dc.transpose(2, 3).to(C.dtype),
            dinitial,
            None,
        )


class _Buffers:
    """What one tile needs, for all of them."""

    def __init__(self, like: Tensor, steps: int, n: int, d: int) -> None:
        self.decay, self.states, self.grad = (like.new_empty(steps, n, d) for _ in range(3))
        self.through = like.new_empty(steps, d)
        self.turns = {name: like.new_empty(steps, d) for name in ("size", "u", "weight", "gy")}
        self.like, self.shape = like, (n, d)
        # below it exponentials are denormal, and twenty times as slow; they count as 0
        self.least = -700.0 if like.dtype == torch.float64 else -87.0

    def turn(self, matrix: Tensor, name: str) -> Tensor:
        """(D, T) -> (T, D), in a buffer: a two-dimensional copy is the quick one."""
        return self.turns[name][: matrix.shape[1]].copy_(matrix.t())

    def start(self, initial_state: Tensor | None, number: int) -> Tensor:
        return self.like.new_zeros(self.shape) if initial_state is None else initial_state[number].t().contiguous()


class _Tile:
    """A few steps of one sequence: step sizes, decays and, on demand, states."""

    def __init__(self, work: _Buffers, u: Tensor, size: Tensor, A: Tensor, B: Tensor, item: int, part: slice) -> None:
        steps = part.stop - part.start
        self.size, self.u = work.turn(size[item, :, part], "size"), work.turn(u[item, :, part], "u")
        self.weight = torch.mul(self.size, self.u, out=work.turns["weight"][:steps])
        self.decay, self.grad, self._states = (x[:steps] for x in (work.decay, work.grad, work.states))
        torch.mul(self.size[:, None], A.t(), out=self.decay)
        F.threshold(self.decay, work.least, -math.inf, inplace=True).exp_()
        self.item, self.part, self.dtype = item, part, size.dtype
        self.b = self.turned(B)

    def turned(self, matrix: Tensor) -> Tensor:
        """(B, G, N, L) -> (T, G, N) of this tile."""
        return matrix[self.item, :, :, self.part].permute(2, 0, 1).to(self.dtype).contiguous()

    def states(self, h: Tensor) -> Tensor:
        """(T, N, D), from the state before the first step."""
        _outer_by_groups(self.b, self.weight, self._states)
        for added, decay in zip(self._states.unbind(0), self.decay.unbind(0), strict=True):
            h = torch.addcmul(added, decay, h, out=added)
        return self._states


def _rows(b: int, length: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """(batch index, first step, end) of every sequence."""
    if cu_seqlens is None:
        return [(item, 0, length) for item in range(b)]
    ends = cu_seqlens.tolist()
    return [(0, start, end) for start, end in pairwise(ends)]


def _split(d: int, groups: int) -> list[slice]:
    each = d // groups if groups else 0
    return [slice(g * each, (g + 1) * each) for g in range(groups)]


def _by_groups(vectors: Tensor, states: Tensor, out: Tensor) -> None:
    """out (T, D) = sum over N of vectors (T, G, N) and states (T, N, D)."""
    if vectors.shape[1] == states.shape[2]:  # a group for each channel
        torch.sum(vectors.mT * states, 1, out=out)
        return
    for g, channels in enumerate(_split(states.shape[2], vectors.shape[1])):
        torch.bmm(vectors[:, g, None], states[..., channels], out=out[:, None, channels])


def _outer_by_groups(vectors: Tensor, rows: Tensor, out: Tensor) -> None:
    """out (T, N, D) = vectors (T, G, N) times rows (T, D)."""
    if vectors.shape[1] == rows.shape[1]:
        torch.mul(vectors.mT, rows[:, None], out=out)
        return
    for g, channels in enumerate(_split(rows.shape[1], vectors.shape[1])):
        torch.mul(vectors[:, g, :, None], rows[:, None, channels], out=out[..., channels])


def _over_groups(states: Tensor, rows: Tensor, out: Tensor) -> None:
    """out (G, T, N) = sum over the channels of each group of states (T, N, D) and rows (T, D)."""
    if out.shape[0] == rows.shape[1]:
        torch.mul(states.permute(2, 0, 1), rows.t()[..., None], out=out)
        return
    for g, channels in enumerate(_split(rows.shape[1], out.shape[0])):
        torch.bmm(states[..., channels], rows[:, channels, None], out=out[g, :, :, None])
