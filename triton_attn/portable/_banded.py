"""A band of keys and a few that everybody sees, on a CPU: a head at a time, some blocks at a time, so that scores stay in the cache.

Blocks of queries meet overlapping windows of the padded keys, which are views; one batched product each way, and between them torch's
softmax in place, whose passes over a row stay in the first cache.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn.portable import _near

ROWS, BACKWARD_ROWS = 32, 64  # fewer rows meet fewer keys in vain, more make larger products
AT_ONCE = 2**21  # scores: one core is as quick with fewer, two are not


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
    """How one head's keys are cut into overlapping windows (blocks, width, D), and what is added to the scores of a window."""

    def __init__(self, n: int, behind: int, ahead: int, more: int, like: Tensor, rows: int) -> None:
        self.n, self.behind, self.more, self.rows = n, behind, more, rows
        self.blocks = -(-n // rows)
        self.width = -(-(rows + behind + ahead) // rows) * rows
        self.padded = (self.blocks - 1) * rows + self.width
        row, column = torch.arange(rows)[:, None], torch.arange(self.width)
        self.outside = F.pad((column < row) | (column > row + behind + ahead), (0, more))
        place = torch.arange(self.padded).as_strided((self.blocks, self.width), (rows, 1)) - behind
        self.beyond = F.pad((place < 0) | (place >= n), (0, more))
        self.band = like.new_zeros(self.outside.shape).masked_fill_(self.outside, -math.inf)
        self.together = min(self.blocks, max(1, AT_ONCE // self.band.numel()))
        # blocks that are computed together, and those of them at the ends, which alone look beyond the sequence
        self.parts: list[tuple[slice, list[tuple[slice, Tensor]]]] = []
        looking = self.beyond.any(1).tolist()
        for start in range(0, self.blocks, self.together):
            blocks = range(start, min(start + self.together, self.blocks))
            runs = [list(run) for beyond, run in itertools.groupby(blocks, lambda block: looking[block]) if beyond]
            ends = [(slice(run[0] - start, run[-1] + 1 - start), torch.stack([self.hidden(block) for block in run])) for run in runs]
            self.parts.append((slice(blocks.start, blocks.stop), ends))

    def over(self, x: Tensor) -> Tensor:
        """(n, D) as (blocks, width, D), zeros beyond."""
        storage = x.new_zeros(self.padded, x.shape[-1])
        storage[self.behind : self.behind + self.n] = x
        return storage.as_strided((self.blocks, self.width, x.shape[-1]), (self.rows * x.shape[-1], x.shape[-1], 1))

    def blocked(self, x: Tensor) -> Tensor:
        """(n, D) as (blocks, rows, D), zeros at the end."""
        if self.n == self.blocks * self.rows and x.is_contiguous():
            return x.view(self.blocks, self.rows, x.shape[-1])
        storage = x.new_zeros(self.blocks * self.rows, x.shape[-1])
        storage[: self.n] = x
        return storage.view(self.blocks, self.rows, x.shape[-1])

    def weights(self, q: Tensor, k: Tensor, ends: list[tuple[slice, Tensor]], scale: float, out: Tensor) -> Tensor:
        """Softmax of the scores of some blocks, in place."""
        torch.baddbmm(self.band.expand(len(q), -1, -1), q, k.mT, alpha=scale, out=out)
        for run, hidden in ends:
            out[run].masked_fill_(hidden, -math.inf)
        return torch.softmax(out, -1, out=out)

    def hidden(self, block: int) -> Tensor:
        """(rows, width + more): what lies beyond the sequence. Rows that do themselves see it, or their weights were NaN."""
        inside = torch.arange(self.rows)[:, None] < self.n - block * self.rows
        return self.beyond[block] & inside


class _Joined:
    """The windows of a part beside the rows that every query sees: views where there are none, else copies in one buffer."""

    def __init__(self, windows: _Windows, x: Tensor, more: Tensor) -> None:
        self.over, self.width = windows.over(x), windows.width
        self.buffer = x.new_empty(windows.together, windows.width + len(more), x.shape[-1]) if len(more) else None
        if self.buffer is not None:
            self.buffer[:, windows.width :] = more

    def of(self, part: slice) -> Tensor:
        if self.buffer is None:
            return self.over[part]
        joined = self.buffer[: part.stop - part.start]
        joined[:, : self.width] = self.over[part]
        return joined


class _Summed:
    """The inverse of `_Joined`: what overlaps is added."""

    def __init__(self, windows: _Windows, like: Tensor, more: Tensor) -> None:
        self.windows, self.more = windows, more
        self.storage = like.new_zeros(windows.padded, like.shape[-1])

    def add(self, found: Tensor, part: slice) -> None:
        rows, width = self.windows.rows, self.windows.width
        for first in range(0, width, rows):
            here = self.storage[part.start * rows + first : part.stop * rows + first]
            here.view(len(found), rows, -1).add_(found[:, first : first + rows])
        if len(self.more):
            self.more.add_(found[:, width:].sum(0))

    def result(self) -> Tensor:
        return self.storage[self.windows.behind : self.windows.behind + self.windows.n]


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, more_key: Tensor, more_value: Tensor, behind: int, ahead: int, scale: float
    ) -> Tensor:
        ctx.numbers = behind, ahead, scale
        if _near.serves(query, key, value):
            out, lse = _near.forward(query, key, value, more_key, more_value, behind, ahead, scale)
            ctx.save_for_backward(query, key, value, more_key, more_value, out, lse)
            return out
        b, h, n = query.shape[:3]
        out = torch.empty(b, h, n, value.shape[-1], dtype=query.dtype)
        windows = _Windows(n, behind, ahead, more_key.shape[2], query, ROWS)
        scores = query.new_empty(windows.together, *windows.band.shape)
        for i in range(b):
            for j in range(h):
                _forward(windows, scores, scale, *(x[i, j] for x in (query, key, value, more_key, more_value, out)))
        ctx.save_for_backward(query, key, value, more_key, more_value, out, None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        saved = ctx.saved_tensors  # read once: a checkpoint hands out what it saved one time
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
            return *_by_autograd(grad, saved[:5], ctx.needs_input_grad, ctx.numbers), None, None, None
        return *_Gradients.apply(grad, *saved, *ctx.numbers), None, None, None  # type: ignore[no-untyped-call]


def _forward(
    windows: _Windows,
    scores: Tensor,
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    more_key: Tensor,
    more_value: Tensor,
    out: Tensor,
) -> None:
    """One head."""
    q, k, v = windows.blocked(query), _Joined(windows, key, more_key), _Joined(windows, value, more_value)
    whole = windows.n % windows.rows == 0
    found = windows.blocked(out) if whole else out.new_empty(windows.blocks, windows.rows, out.shape[-1])
    for part, ends in windows.parts:
        weights = windows.weights(q[part], k.of(part), ends, scale, scores[: part.stop - part.start])
        torch.bmm(weights, v.of(part), out=found[part])
    if not whole:
        out.copy_(found.flatten(0, 1)[: windows.n])


class _Gradients(torch.autograd.Function):
    """An operation of its own, so that forward-mode derivatives of it are refused."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
        *inputs, out, lse, behind, ahead, scale = given
        if lse is not None:
            return _near.backward(grad, *given)
        b, h, n = grad.shape[:3]
        results = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in inputs)
        windows = _Windows(n, behind, ahead, inputs[3].shape[2], grad, BACKWARD_ROWS)
        scores = grad.new_empty(2, windows.together, *windows.band.shape)
        for i in range(b):
            for j in range(h):
                _backward(windows, scores, scale, *(x[i, j] for x in (grad, *inputs, out, *results)))
        return results

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise NotImplementedError("the forward-mode derivative of the gradients of portable local attention is not implemented")


def _backward(
    windows: _Windows,
    scores: Tensor,
    scale: float,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    more_key: Tensor,
    more_value: Tensor,
    out: Tensor,
    *results: Tensor,
) -> None:
    """One head."""
    dq, dk, dv, dmore_key, dmore_value = results
    q, k, v = windows.blocked(query), _Joined(windows, key, more_key), _Joined(windows, value, more_value)
    do, delta = windows.blocked(grad), windows.blocked((grad * out).sum(-1, keepdim=True))
    keys, values = _Summed(windows, key, dmore_key), _Summed(windows, value, dmore_value)
    found = q.new_empty(q.shape)
    for part, ends in windows.parts:
        weights, slopes = (x[: part.stop - part.start] for x in scores)
        seen = k.of(part)
        windows.weights(q[part], seen, ends, scale, weights)
        values.add(torch.bmm(weights.mT, do[part]), part)
        torch.bmm(do[part], v.of(part).mT, out=slopes).sub_(delta[part]).mul_(weights)
        torch.bmm(slopes, seen, out=found[part])
        keys.add(torch.bmm(slopes.mT, q[part]), part)
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
        query, key, value, more_key, more_value = leaves
        out = _in_operators(query, key, value, more_key, more_value, *numbers)
        asked = [leaf for leaf, need in zip(leaves, needed, strict=False) if need]
        found = iter(torch.autograd.grad(out, asked, grad, create_graph=create))
    return [next(found) if need else None for need, _ in zip(needed, leaves, strict=False)]


def _in_operators(
    query: Tensor, key: Tensor, value: Tensor, more_key: Tensor, more_value: Tensor, behind: int, ahead: int, scale: float
) -> Tensor:
    """The same in operators that torch differentiates, all heads at once: O(N window) memory."""
    n = query.shape[2]
    windows = _Windows(n, behind, ahead, more_key.shape[2], query.detach(), ROWS)
    after = windows.padded - behind - n
    keys, values = (F.pad(x, (0, 0, behind, after)).unfold(2, windows.width, ROWS) for x in (key, value))  # (B, H, blocks, D, width)
    rows = F.pad(query, (0, 0, 0, windows.blocks * ROWS - n))
    rows = rows.view(*rows.shape[:2], windows.blocks, ROWS, rows.shape[-1])
    hidden = windows.outside | torch.stack([windows.hidden(block) for block in range(windows.blocks)])
    scores = torch.cat((rows @ keys, rows @ more_key[:, :, None].mT), -1) * scale
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    found = weights[..., : windows.width] @ values.mT + weights[..., windows.width :] @ more_value[:, :, None]
    return found.flatten(2, 3)[:, :, :n]
