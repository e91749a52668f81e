"""Linear-ViT's HydraAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import hydra_attention
from triton_attn.nn._inner_heads import InnerHeads


class HydraAttention(InnerHeads):
    """Self-attention by several branches of queries over one linear-attention state of keys and values.

    q_r = LN(GELU(W_r W_q,r x)) for each branch r and head; the branches' outputs are fused: GELU(LN(W_f [o_1 .. o_R])), then projected.
    O(N) in time and memory.

    Args:
        dim: width of tokens.
        heads: 1 and more, in each branch.
        dim_head: width of a head; kernels serve up to 128 (a feature map doubles it), the portable path any.
        dropout: of the output.
        num_branches: 1 and more.
        variant: "branches", the original's; "meta": Bolya et al.'s, one head for each feature.
        causal: no token sees a later one.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: HydraAttention of Linear-ViT, whose state dicts load.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        num_branches: int = 4,
        *,
        variant: str = "branches",
        causal: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, heads, dim_head, dropout)
        self.num_branches = self.whole("num_branches", num_branches)
        self.variant = self.choice("variant", variant, ("branches", "meta"))
        self.causal = self.flag("causal", causal)
        factory, inner = {"device": device, "dtype": dtype}, heads * dim_head
        self.to_k = nn.Linear(dim, inner, bias=False, **factory)
        self.to_v = nn.Linear(dim, inner, bias=False, **factory)
        self.branch_queries = nn.ModuleList(nn.Linear(dim, inner, bias=False, **factory) for _ in range(num_branches))
        self.branch_transforms = nn.ModuleList(
            nn.Sequential(nn.Linear(dim_head, dim_head, **factory), nn.GELU(), nn.LayerNorm(dim_head, **factory))
            for _ in range(num_branches)
        )
        self.branch_fusion = nn.Sequential(nn.Linear(inner * num_branches, inner, **factory), nn.LayerNorm(inner, **factory), nn.GELU())
        self.to_out = nn.Sequential(nn.Linear(inner, dim, **factory), nn.Dropout(dropout))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_branches={self.num_branches}, variant={self.variant!r}, causal={self.causal}"

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Project, attend, fuse, project back.

        Args:
            x: (B, N, dim).
            key_padding_mask: (B, N) boolean, True = ignore.

        Returns:
            (B, N, dim).

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
        """
        self.check(x, key_padding_mask)
        pairs = zip(self.branch_queries, self.branch_transforms, strict=True)
        query = torch.stack([transform(self.split(project(x))) for project, transform in pairs], 1)
        key, value = self.split(self.to_k(x)), self.split(self.to_v(x))
        out = hydra_attention(
            query,
            key,
            value,
            variant=self.variant,
            causal=self.causal,
            scale=(2 * self.dim_head) ** -0.5,
            key_padding_mask=key_padding_mask,
        )
        fused: Tensor = self.to_out(self.branch_fusion(out.permute(0, 3, 1, 2, 4).flatten(2)))
        return fused
