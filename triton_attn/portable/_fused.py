"""Unions that torch's fused call for CPUs computes: its log-sum-exp joins the pieces, and the joint one differentiates each of them.

P = exp(s - lse) and delta = rowsum(out dout) of the whole make the fused backward exact for a piece. The two operators are torch's own
but not public, so whatever they might refuse goes another way: `serves` says when they are right.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_OPERATORS = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Equal heads and widths, nothing empty, on a CPU, and nobody who looks inside: torch.compile, torch.func, forward-mode."""
    shapes = (query.shape, key.shape, value.shape)
    return (
        _OPERATORS
        and query.device.type == "cpu"
        and type(query) is Tensor
        and query.shape[1] == key.shape[1]
        and query.shape[-1] == value.shape[-1]
        and all(size > 0 for shape in shapes for size in shape)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def together(x: Tensor) -> Tensor:
    """The tensor with the numbers of a row side by side, as the fused operators read them whatever the stride: a copy if it must be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def with_own_key(
    query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor, own: Tensor, scale: float, hidden: Tensor | None = None
) -> Tensor:
    """Attention of query i to `keys` and, where `own` (broadcastable to (B, H, N)) says so, to key i. All (B, H, ., D).

    `hidden` (B, H, 1, K) leaves keys out, never all that a query has.
    """
    added = None if hidden is None else query.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf).expand(-1, -1, query.shape[2], -1)
    query, keys, values = (together(x) for x in (query, keys, values))
    return _WithOwnKey.apply(query, keys, values, key, value, own, scale, added)  # type: ignore[no-any-return,no-untyped-call]


class _WithOwnKey(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, key: Tensor, value: Tensor, own: Tensor, scale: float, added: Tensor | None
    ) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, attn_mask=added, scale=scale)
        score = _rowwise(query, key) * scale
        weight = torch.sigmoid(score - lse).masked_fill_(~own, 0.0)
        out = out.lerp_(value, weight.to(out.dtype)[..., None])
        lse = torch.where(own, torch.logaddexp(lse, score), lse)
        ctx.save_for_backward(query, keys, values, key, value, out, lse, weight, added)
        ctx.scale = scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *_Gradients.apply(together(grads[0]), *ctx.saved_tensors, ctx.scale), None, None, None  # type: ignore[no-untyped-call]


class Last(torch.autograd.Function):
    """Gradients as an operation of their own, so that a second derivative is refused."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("the derivative of the gradients of this portable path is not implemented")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise NotImplementedError("the derivative of the gradients of this portable path is not implemented")


class _Gradients(Last):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        weight: Tensor,
        added: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, ...]:
        dq, dkeys, dvalues = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, keys, values, out, lse, 0.0, False, attn_mask=added, scale=scale
        )
        ds = (weight * (_rowwise(grad, value) - _rowwise(grad, out)) * scale).to(query.dtype)[..., None]
        return dq.addcmul_(ds, key), dkeys, dvalues, ds * query, weight.to(grad.dtype)[..., None] * grad


def _rowwise(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows, in float32 at the least, a head at a time: fresh memory costs more than the products."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(x.shape[:-1], dtype=wide, device=x.device)
    products = torch.empty(x.shape[2:], dtype=x.dtype, device=x.device)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            torch.sum(torch.mul(x[b, h], y[b, h], out=products), -1, dtype=wide, out=out[b, h])
    return out
