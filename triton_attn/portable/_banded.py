"""A band of keys and a few that everybody sees, on a CPU: a head at a time, so that its scores stay in the cache.

Blocks of ROWS queries meet overlapping windows of the padded keys, which are views; one batched product each way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ROWS = 64


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Equal heads, float32 or wider, nothing empty, on a CPU, and nobody who looks inside."""
    return (
        query.device.type == "cpu"
        and type(query) is Tensor
        and query.dtype in (torch.float32, torch.float64)
        and query.shape[1] == key.shape[1]
        and query.numel() > 0
        and value.shape[-1] > 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def banded(
    query: Tensor, key: Tensor, value: Tensor, more_key: Tensor | None, more_value: Tensor | None, behind: int, ahead: int, scale: float
) -> Tensor:
    """Query i sees keys i - behind .. i + ahead and every one of `more_key` (B, H, G, D), in one softmax."""
    if more_key is None or more_value is None:
        more_key, more_value = key[:, :, :0], value[:, :, :0]
    return _Banded.apply(query, key, value, more_key, more_value, behind, ahead, scale)  # type: ignore[no-any-return,no-untyped-call]


_TWICE = "the derivative of the gradients of portable local attention is not implemented"


class _Windows:
    """One head's keys or values, padded, as overlapping windows (blocks, width, D)."""

    def __init__(self, n: int, behind: int, ahead: int, like: Tensor) -> None:
        self.n, self.behind, self.ahead = n, behind, ahead
        self.rows = ROWS
        self.blocks = -(-n // self.rows)
        self.width = -(-(self.rows + behind + ahead) // self.rows) * self.rows
        self.padded = (self.blocks - 1) * self.rows + self.width
        row, column = torch.arange(self.rows, device=like.device)[:, None], torch.arange(self.width, device=like.device)
        outside = (column < row) | (column > row + behind + ahead)
        self.band = torch.zeros(self.rows, self.width, dtype=like.dtype, device=like.device).masked_fill_(outside, -math.inf)
        place = torch.arange(self.padded, device=like.device).as_strided((self.blocks, self.width), (self.rows, 1)) - behind
        beyond = (place < 0) | (place >= n)
        # blocks at the ends alone look beyond the sequence
        self.ends = beyond.any(1).nonzero()[:, 0].tolist()
        self.beyond = beyond

    def of(self, x: Tensor) -> Tensor:
        storage = x.new_zeros(self.padded, x.shape[-1])
        kept = min(self.n, self.padded - self.behind)
        storage[self.behind : self.behind + kept] = x[:kept]
        return self._over(storage)

    def _over(self, storage: Tensor) -> Tensor:
        d = storage.shape[-1]
        return storage.as_strided((self.blocks, self.width, d), (self.rows * d, d, 1))

    def summed(self, windows: Tensor) -> Tensor:
        """The inverse of `of`: what overlaps is added."""
        d = windows.shape[-1]
        storage = windows.new_zeros(self.padded, d)
        for part in range(0, self.width, self.rows):
            storage[part : part + self.blocks * self.rows].view(self.blocks, self.rows, d).add_(windows[:, part : part + self.rows])
        return storage[self.behind : self.behind + self.n]

    def blocked(self, x: Tensor) -> Tensor:
        """(n, D) as (blocks, rows, D), zeros at the end."""
        if x.shape[0] == self.blocks * self.rows and x.is_contiguous():
            return x.view(self.blocks, self.rows, x.shape[-1])
        storage = x.new_zeros(self.blocks * self.rows, x.shape[-1])
        storage[: self.n] = x
        return storage.view(self.blocks, self.rows, x.shape[-1])

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """scale q k^T (blocks, rows, width), -inf outside of the band and of the sequence."""
        scores = torch.baddbmm(self.band.expand(self.blocks, -1, -1), q, k.mT, alpha=scale)
        for block in self.ends:
            scores[block].masked_fill_(self.beyond[block], -math.inf)
        return scores


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, more_key: Tensor, more_value: Tensor, behind: int, ahead: int, scale: float
    ) -> Tensor:
        b, h, n = query.shape[:3]
        out = torch.empty(b, h, n, value.shape[-1], dtype=query.dtype, device=query.device)
        lse = torch.empty(b, h, n, dtype=query.dtype, device=query.device)
        windows = _Windows(n, behind, ahead, query)
        for i in range(b):
            for j in range(h):
                q, k, v = windows.blocked(query[i, j]), windows.of(key[i, j]), windows.of(value[i, j])
                scores = windows.scores(q, k, scale)
                top = scores.amax(-1, keepdim=True)
                more = (q @ more_key[i, j].mT).mul_(scale)
                if more.shape[-1]:
                    top = torch.maximum(top, more.amax(-1, keepdim=True))
                top = top.masked_fill_(top == -math.inf, 0.0)
                total = scores.sub_(top).exp_().sum(-1, keepdim=True) + more.sub_(top).exp_().sum(-1, keepdim=True)
                found = torch.bmm(scores, v)
                if more.shape[-1]:
                    found += more @ more_value[i, j]
                out[i, j] = found.div_(total).flatten(0, 1)[:n]
                lse[i, j] = top.add_(total.log_()).flatten()[:n]
        ctx.save_for_backward(query, key, value, more_key, more_value, out, lse)
        ctx.numbers = behind, ahead, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        query, key, value, more_key, more_value, out, lse = ctx.saved_tensors
        if torch._C._functorch.is_legacy_batchedtensor(grad):
            leaves = [x.detach().requires_grad_() for x in (query, key, value, more_key, more_value)]
            with torch.enable_grad():
                return *torch.autograd.grad(_with_every_score(*leaves, *ctx.numbers), leaves, grad), None, None, None
        return *_Gradients.apply(grad, query, key, value, more_key, more_value, out, lse, *ctx.numbers), None, None, None  # type: ignore[no-untyped-call]


def _with_every_score(
    query: Tensor, key: Tensor, value: Tensor, more_key: Tensor, more_value: Tensor, behind: int, ahead: int, scale: float
) -> Tensor:
    """The definition, for several gradients at once (is_grads_batched): in-place operations have no rule for that."""
    place = torch.arange(query.shape[2], device=query.device)
    distance = place - place[:, None]
    scores = (query @ key.mT * scale).masked_fill((distance < -behind) | (distance > ahead), -math.inf)
    weights = torch.cat((scores, query @ more_key.mT * scale), -1).softmax(-1)
    return weights @ torch.cat((value, more_value), 2)


class _Gradients(torch.autograd.Function):
    """An operation of its own, so that a second derivative is refused."""

    @staticmethod
    def forward(
        ctx: Any,
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
        b, h, n = query.shape[:3]
        results = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value, more_key, more_value))
        dq, dk, dv, dmore_key, dmore_value = results
        windows = _Windows(n, behind, ahead, query)
        for i in range(b):
            for j in range(h):
                q, k, v = windows.blocked(query[i, j]), windows.of(key[i, j]), windows.of(value[i, j])
                do = windows.blocked(grad[i, j])
                shift = windows.blocked(lse[i, j, :, None])
                delta = windows.blocked((grad[i, j] * out[i, j]).sum(-1, keepdim=True))
                p = windows.scores(q, k, scale).sub_(shift).exp_()
                dv[i, j] = windows.summed(torch.bmm(p.mT, do))
                ds = torch.bmm(do, v.mT).sub_(delta).mul_(p).mul_(scale)
                found = torch.bmm(ds, k)
                dk[i, j] = windows.summed(torch.bmm(ds.mT, q))
                if more_key.shape[2]:
                    rows, gradient = q.flatten(0, 1), do.flatten(0, 1)
                    p = (rows @ more_key[i, j].mT).mul_(scale).sub_(shift.flatten(0, 1)).exp_()
                    dmore_value[i, j] = p[:n].mT @ gradient[:n]
                    ds = (gradient @ more_value[i, j].mT).sub_(delta.flatten(0, 1)).mul_(p).mul_(scale)
                    dmore_key[i, j] = ds[:n].mT @ rows[:n]
                    found += (ds @ more_key[i, j]).view(found.shape)
                dq[i, j] = found.flatten(0, 1)[:n]
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(_TWICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise NotImplementedError(_TWICE)
