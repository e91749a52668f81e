"""A band of keys and a few that everybody sees, on a CPU: a head at a time, some blocks at a time, so that scores stay in the cache.

Blocks of ROWS queries meet overlapping windows of the padded keys, which are views; one batched product each way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 64
AT_ONCE = 2**18  # scores
# Where no score can be larger, exp needs no maximum taken off before: neither it nor a sum of it, nor a ratio, leaves float32.
CALM = 40.0


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


class _Windows:
    """How keys or values of one head are cut into overlapping windows (blocks, width, D), and which scores of a window count."""

    def __init__(self, n: int, behind: int, ahead: int, like: Tensor) -> None:
        self.n, self.behind, self.span = n, behind, behind + ahead
        self.blocks = -(-n // ROWS)
        self.width = -(-(ROWS + self.span) // ROWS) * ROWS
        self.padded = (self.blocks - 1) * ROWS + self.width
        self.scores = like.new_empty(min(self.blocks, max(1, AT_ONCE // (ROWS * self.width))), ROWS, self.width)
        row, column = torch.arange(ROWS)[:, None], torch.arange(self.width)
        # outside of the band lie a triangle at each side
        self.sides = (slice(ROWS), column[:ROWS] >= row), (slice(self.span, None), column[self.span :] <= row + self.span)
        place = torch.arange(self.padded).as_strided((self.blocks, self.width), (ROWS, 1)) - behind
        self.beyond = (place < 0) | (place >= n)
        self.ends = self.beyond.any(1).nonzero()[:, 0].tolist()  # blocks at the ends alone look beyond the sequence
        self.factors = [inside.to(like.dtype) for _, inside in self.sides]
        self.added = [like.new_zeros(inside.shape).masked_fill_(~inside, -math.inf) for _, inside in self.sides]

    def parts(self) -> Iterator[slice]:
        """Blocks that are computed together."""
        return (slice(start, min(start + len(self.scores), self.blocks)) for start in range(0, self.blocks, len(self.scores)))

    def over(self, x: Tensor) -> Tensor:
        """(n, D) as (blocks, width, D), zeros beyond."""
        storage = x.new_zeros(self.padded, x.shape[-1])
        storage[self.behind : self.behind + self.n] = x
        return storage.as_strided((self.blocks, self.width, x.shape[-1]), (ROWS * x.shape[-1], x.shape[-1], 1))

    def blocked(self, x: Tensor) -> Tensor:
        """(n, D) as (blocks, ROWS, D), zeros at the end."""
        if self.n == self.blocks * ROWS and x.is_contiguous():
            return x.view(self.blocks, ROWS, x.shape[-1])
        storage = x.new_zeros(self.blocks * ROWS, x.shape[-1])
        storage[: self.n] = x
        return storage.view(self.blocks, ROWS, x.shape[-1])

    def scored(self, q: Tensor, k: Tensor, part: slice, scale: float) -> Tensor:
        """scale q k^T (blocks of the part, ROWS, width), those outside of the band too."""
        scores = self.scores[: part.stop - part.start]
        return torch.baddbmm(scores, q[part], k[part].mT, beta=0, alpha=scale, out=scores)

    def hide(self, scores: Tensor, part: slice) -> Tensor:
        """-inf outside of the band and of the sequence."""
        for (columns, _), added in zip(self.sides, self.added, strict=True):
            scores[..., columns].add_(added)
        return self._end(scores, part, -math.inf)

    def drop(self, weights: Tensor, part: slice) -> Tensor:
        """0 in place of finite numbers outside of the band and of the sequence: cheaper than exp of -inf."""
        for (columns, _), factor in zip(self.sides, self.factors, strict=True):
            weights[..., columns].mul_(factor)
        return self._end(weights, part, 0.0)

    def _end(self, scores: Tensor, part: slice, fill: float) -> Tensor:
        for block in self.ends:
            if part.start <= block < part.stop:
                scores[block - part.start].masked_fill_(self.beyond[block], fill)
        return scores


class _Summed:
    """The inverse of `_Windows.over`: what overlaps is added."""

    def __init__(self, windows: _Windows, like: Tensor) -> None:
        self.windows = windows
        self.storage = like.new_zeros(windows.padded, like.shape[-1])

    def add(self, found: Tensor, part: slice) -> None:
        for first in range(0, self.windows.width, ROWS):
            here = self.storage[part.start * ROWS + first : part.stop * ROWS + first]
            here.view(found.shape[0], ROWS, -1).add_(found[:, first : first + ROWS])

    def result(self) -> Tensor:
        return self.storage[self.windows.behind : self.windows.behind + self.windows.n]


def _calm(query: Tensor, key: Tensor, more_key: Tensor, scale: float) -> bool:
    longest = max(float(x.norm(dim=-1).amax()) for x in (key, more_key) if x.numel())
    return abs(scale) * float(query.norm(dim=-1).amax()) * longest <= CALM


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, more_key: Tensor, more_value: Tensor, behind: int, ahead: int, scale: float
    ) -> Tensor:
        b, h, n = query.shape[:3]
        out = torch.empty(b, h, n, value.shape[-1], dtype=query.dtype)
        top, total = torch.zeros(2, b, h, n, dtype=query.dtype)  # weights are exp(score - top) / total
        calm = torch.zeros(b, h, dtype=torch.bool)
        windows = _Windows(n, behind, ahead, query)
        for i in range(b):
            for j in range(h):
                calm[i, j] = _calm(query[i, j], key[i, j], more_key[i, j], scale)
                heads = (x[i, j] for x in (query, key, value, more_key, more_value))
                _forward(windows, *heads, out[i, j], None if calm[i, j] else top[i, j], total[i, j], scale)
        ctx.save_for_backward(query, key, value, more_key, more_value, out, top, total, calm)
        ctx.numbers = behind, ahead, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        inputs = ctx.saved_tensors[:5]
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            return *_by_autograd(grad, inputs, ctx.needs_input_grad, ctx.numbers), None, None, None
        return *_Gradients.apply(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None  # type: ignore[no-untyped-call]


def _forward(
    windows: _Windows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    more_key: Tensor,
    more_value: Tensor,
    out: Tensor,
    top: Tensor | None,
    total: Tensor,
    scale: float,
) -> None:
    """One head; `top` is None where scores are calm."""
    q, k, v = windows.blocked(query), windows.over(key), windows.over(value)
    found = windows.blocked(out) if windows.n % ROWS == 0 else out.new_empty(windows.blocks, ROWS, out.shape[-1])
    totals, tops = (out.new_zeros(windows.blocks, ROWS, 1) for _ in range(2))
    for part in windows.parts():
        scores = windows.scored(q, k, part, scale)
        more = (q[part] @ more_key.mT).mul_(scale) if more_key.shape[0] else None
        if top is not None:
            highest = windows.hide(scores, part).amax(-1, keepdim=True)
            highest = highest if more is None else torch.maximum(highest, more.amax(-1, keepdim=True))
            tops[part] = highest.masked_fill_(highest == -math.inf, 0.0)
            scores.sub_(highest).exp_()
            more = None if more is None else more.sub_(highest)
        else:
            windows.drop(scores.exp_(), part)
        torch.sum(scores, -1, keepdim=True, out=totals[part])
        torch.bmm(scores, v[part], out=found[part])
        if more is not None:
            totals[part].add_(more.exp_().sum(-1, keepdim=True))
            found[part].add_(more @ more_value)
        found[part].div_(totals[part])
    if found.data_ptr() != out.data_ptr():
        out.copy_(found.flatten(0, 1)[: windows.n])
    total.copy_(totals.flatten()[: windows.n])
    if top is not None:
        top.copy_(tops.flatten()[: windows.n])


class _Gradients(torch.autograd.Function):
    """An operation of its own, so that forward-mode derivatives of it are refused."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
        *inputs, out, top, total, calm, behind, ahead, scale = given
        b, h, n = grad.shape[:3]
        results = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in inputs)
        windows = _Windows(n, behind, ahead, grad)
        for i in range(b):
            for j in range(h):
                heads = (x[i, j] for x in (grad, *inputs, out))
                _backward(windows, *heads, None if calm[i, j] else top[i, j], total[i, j], scale, *(x[i, j] for x in results))
        return results

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise NotImplementedError("the forward-mode derivative of the gradients of portable local attention is not implemented")


def _backward(
    windows: _Windows,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    more_key: Tensor,
    more_value: Tensor,
    out: Tensor,
    top: Tensor | None,
    total: Tensor,
    scale: float,
    *results: Tensor,
) -> None:
    """One head: with e = exp(score - top) and dO / total for dO, p dO is e (dO / total), and a row less to multiply."""
    dq, dk, dv, dmore_key, dmore_value = results
    q, k, v = windows.blocked(query), windows.over(key), windows.over(value)
    shared = grad / total[:, None]
    do, delta = windows.blocked(shared), windows.blocked((shared * out).sum(-1, keepdim=True))
    shift = None if top is None else windows.blocked(top[:, None])
    keys, values = _Summed(windows, key), _Summed(windows, value)
    found = q.new_empty(q.shape)
    slopes = torch.empty_like(windows.scores)
    for part in windows.parts():
        e = windows.scored(q, k, part, scale)
        if shift is None:
            windows.drop(e.exp_(), part)
        else:
            windows.hide(e, part).sub_(shift[part]).exp_()
        values.add(torch.bmm(e.mT, do[part]), part)
        ds = slopes[: len(e)]
        torch.bmm(do[part], v[part].mT, out=ds).sub_(delta[part]).mul_(e)
        torch.bmm(ds, k[part], out=found[part])
        keys.add(torch.bmm(ds.mT, q[part]), part)
        if more_key.shape[0]:
            rows, gradient = q[part].flatten(0, 1), do[part].flatten(0, 1)
            e = (rows @ more_key.mT).mul_(scale)
            e = e.exp_() if shift is None else e.sub_(shift[part].flatten(0, 1)).exp_()
            dmore_value.add_(e.mT @ gradient)
            ds = (gradient @ more_value.mT).sub_(delta[part].flatten(0, 1)).mul_(e)
            dmore_key.add_(ds.mT @ rows)
            found[part].add_((ds @ more_key).view(found[part].shape))
    dq.copy_(found.flatten(0, 1)[: windows.n]).mul_(scale)
    dk.copy_(keys.result()).mul_(scale)
    dv.copy_(values.result())
    dmore_key.mul_(scale)


def _by_autograd(
    grad: Tensor, inputs: tuple[Tensor, ...], needed: tuple[bool, ...], numbers: tuple[int, int, float]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, or of several cotangents at once (is_grads_batched)."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        # a view of each, because one tensor may be several of them
        leaves = [x.view_as(x) if create and x.requires_grad else x.detach().requires_grad_() for x in inputs]
        out = _in_operators(*leaves, *numbers)
        asked = [leaf for leaf, need in zip(leaves, needed, strict=False) if need]
        found = iter(torch.autograd.grad(out, asked, grad, create_graph=create))
    return [next(found) if need else None for need, _ in zip(needed, leaves, strict=False)]


def _in_operators(
    query: Tensor, key: Tensor, value: Tensor, more_key: Tensor, more_value: Tensor, behind: int, ahead: int, scale: float
) -> Tensor:
    """The same in operators that torch differentiates, all heads at once: O(N window) memory."""
    n = query.shape[2]
    windows = _Windows(n, behind, ahead, query.detach())
    after = windows.padded - behind - n
    keys, values = (F.pad(x, (0, 0, behind, after)).unfold(2, windows.width, ROWS) for x in (key, value))  # (B, H, blocks, D, width)
    rows = F.pad(query, (0, 0, 0, windows.blocks * ROWS - n)).unflatten(2, (windows.blocks, ROWS))
    row, column = torch.arange(ROWS)[:, None], torch.arange(windows.width)
    outside = (column < row) | (column > row + windows.span) | windows.beyond[:, None]
    # a row after the last would see nothing, and be NaN
    outside = outside & (torch.arange(windows.blocks * ROWS).view(windows.blocks, ROWS, 1) < n)
    scores = (rows @ keys * scale).masked_fill(outside, -math.inf)
    more = rows @ more_key[:, :, None].mT * scale
    weights = torch.cat((scores, more), -1).softmax(-1)
    found = weights[..., : windows.width] @ values.mT + weights[..., windows.width :] @ more_value[:, :, None]
    return found.flatten(2, 3)[:, :, :n]
