"""HierarchicalVLM's StridedAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_attn import arguments, attention, refusals, strided_attention
from triton_attn.nn._projections import Projections


class StridedAttention(Projections):
    """Self-attention to every stride-th token: out = W_o softmax(q k_S^T / sqrt(head_dim)) v_S, S = {phase, phase + stride, ...}.

    Keys and values are projected for the tokens that are seen, no others. Cost O(N^2 / stride).

    Args:
        stride: distance between the tokens that are seen; 1 and more, 1 being dense attention.
        dim: width of tokens.
        num_heads: a divisor of dim.
        dropout: share of attention weights dropped in training.
        phase: position of the first token that is seen; 0 to stride - 1.
        include_self: each token also sees itself; then every token needs a key and a value.
        causal: no token sees a later one. Those before the first that is seen get heads of 0, unless include_self.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: StridedAttention of HierarchicalVLM, whose state dicts load; the differences are in docs/hierarchical.md.
    """

    def __init__(
        self,
        stride: int = 4,
        dim: int = 768,
        num_heads: int = 12,
        dropout: float = 0.0,
        *,
        phase: int = 0,
        include_self: bool = False,
        causal: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, num_heads, dropout, device, dtype)
        self.stride = arguments.whole(self, "stride", stride, 1)
        self.phase = arguments.whole(self, "phase", phase, 0, stride - 1)
        self.include_self = arguments.flag(self, "include_self", include_self)
        self.causal = arguments.flag(self, "causal", causal)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, {super().extra_repr()}, phase={self.phase}, include_self={self.include_self}, causal={self.causal}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Project, attend, project back.

        Args:
            x: (B, N, dim).
            mask: boolean, True = ignore: (B, N), padded tokens, as nn.MultiheadAttention's key_padding_mask; or (B, N, S) or
                (B, H, N, S), for each query and each of the S tokens that are seen, which a module with include_self refuses.

        Returns:
            (B, N, dim). A token that sees nothing gets heads of 0, so that out_proj's bias remains.

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
            Unsupported: a mask for each query together with include_self.
        """
        self.check_tokens("x", x)
        seen = x[:, self.phase :: self.stride]
        b, n, s = *x.shape[:2], seen.shape[1]
        shapes: list[tuple[int, ...]] = [(b, n), (b, n, s), (b, self.num_heads, n, s)]
        self.check_mask("mask", mask, *shapes)
        padding = mask if mask is not None and mask.ndim == 2 else None
        rule = None if mask is None or mask.ndim == 2 else ~(mask[:, None] if mask.ndim == 3 else mask)

        query = self.heads(self.q_proj(x))
        if self.include_self:
            if rule is not None:
                refusals.refuse(self.name, "a mask for each query with include_self", "give (B, N), True = ignore, or include_self=False")
            keys, values = self.k_proj(x), self.v_proj(x)
        else:
            keys, values = self.k_proj(seen), self.v_proj(seen)
        if self.include_self or (self.causal and rule is None):
            if not self.include_self:
                keys, values = (self._in_place(projected, n) for projected in (keys, values))
            out = strided_attention(
                query,
                self.heads(keys),
                self.heads(values),
                stride=self.stride,
                phase=self.phase,
                include_self=self.include_self,
                key_padding_mask=padding,
                causal=self.causal,
                dropout_p=self.dropout_p,
            )
        else:
            if self.causal and rule is not None:
                positions = torch.arange(n, device=x.device)
                rule = rule & (positions[self.phase :: self.stride] <= positions[:, None])
            padding = None if padding is None else padding[:, self.phase :: self.stride]
            out = attention(query, self.heads(keys), self.heads(values), mask=rule, key_padding_mask=padding, dropout_p=self.dropout_p)
        return self.output(out)

    def _in_place(self, projected: Tensor, n: int) -> Tensor:
        """The projections of the tokens that are seen at their places among n, for whom a place means before and after."""
        spread = projected.new_zeros(projected.shape[0], n, self.dim)
        spread[:, self.phase :: self.stride] = projected
        return spread
