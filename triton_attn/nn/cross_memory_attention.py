"""HierarchicalVLM's CrossMemoryAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_attn import ArgumentError, arguments, attention
from triton_attn.arguments import ArgumentTypeError
from triton_attn.nn._projections import Projections


class CrossMemoryAttention(Projections):
    """Attention of local features to memory tokens: cross = W_o softmax(q k_m^T / sqrt(head_dim)) v_m.

    Args:
        dim: width of tokens.
        num_heads: a divisor of dim.
        dropout: share of attention weights dropped in training.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: CrossMemoryAttention of HierarchicalVLM, whose state dicts load; the differences are in docs/hierarchical.md.
    """

    def __init__(self, dim: int = 768, num_heads: int = 12, dropout: float = 0.0, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, num_heads, dropout, device, dtype)

    def forward(
        self,
        local_features: Tensor,
        memory_tokens: Tensor | None = None,
        residual: bool = True,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """cross, or local_features + cross.

        Args:
            local_features: (B, N, dim).
            memory_tokens: (B, M, dim), M of 0 included; None: local_features are their own memory.
            residual: add local_features.
            memory_key_padding_mask: (B, M) boolean, True = ignore.

        Returns:
            (B, N, dim). Where no memory is seen, cross is out_proj's bias.

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
        """
        self.check_tokens("local_features", local_features)
        memory = local_features if memory_tokens is None else memory_tokens
        self.check_tokens("memory_tokens", memory, local_features.shape[0])
        self.check_mask("memory_key_padding_mask", memory_key_padding_mask, tuple(memory.shape[:2]))
        query = self.heads(self.q_proj(local_features))
        key, value = self.heads(self.k_proj(memory)), self.heads(self.v_proj(memory))
        cross = self.output(attention(query, key, value, key_padding_mask=memory_key_padding_mask, dropout_p=self.dropout_p))
        return cross + local_features if residual else cross

    def fuse_with_memory(
        self,
        local_features: Tensor,
        memory_tokens: Tensor | None,
        fusion_ratio: float | Tensor = 0.5,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """fusion_ratio cross + (1 - fusion_ratio) local_features

        Args:
            local_features, memory_tokens, memory_key_padding_mask: as for a call.
            fusion_ratio: 0 (local features alone) to 1 (cross alone); or a tensor that broadcasts to (B, N, dim), such as a
                learned gate, which gets its gradient and whose values are taken as they are, in the dtype of the features.

        Returns:
            (B, N, dim).

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
        """
        self.check_tokens("local_features", local_features)
        if isinstance(fusion_ratio, Tensor):
            shape, wanted = tuple(fusion_ratio.shape), tuple(local_features.shape)
            if len(shape) > 3 or any(size not in (1, want) for size, want in zip(reversed(shape), reversed(wanted), strict=False)):
                raise ArgumentError(self.name, "fusion_ratio", f"has shape {shape}; allowed: broadcastable to {wanted}")
            if fusion_ratio.is_complex():
                raise ArgumentTypeError(self.name, "fusion_ratio", f"has dtype {fusion_ratio.dtype}; allowed: of real numbers")
        else:
            arguments.probability(self, "fusion_ratio", fusion_ratio)
        cross: Tensor = self(local_features, memory_tokens, residual=False, memory_key_padding_mask=memory_key_padding_mask)
        if isinstance(fusion_ratio, Tensor):
            fusion_ratio = fusion_ratio.to(torch.promote_types(cross.dtype, local_features.dtype))  # a gate in float64 widens nothing
        return fusion_ratio * cross + (1 - fusion_ratio) * local_features
