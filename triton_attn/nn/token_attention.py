"""Self-attention of a sequence of tokens by any mechanism that takes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

import triton_attn
from triton_attn.nn._inner_heads import InnerHeads

MECHANISMS: dict[str, Callable[..., Tensor]] = {
    "attention": triton_attn.attention,
    "dilated_attention": triton_attn.dilated_attention,
    "linear_attention": triton_attn.linear_attention,
    "local_global_attention": triton_attn.local_global_attention,
    "sparse_attention": triton_attn.sparse_attention,
    "strided_attention": triton_attn.strided_attention,
}
DROPLESS = ("linear_attention",)


class TokenAttention(InnerHeads):
    """out = W_o mechanism(q, k, v) with [q k v] = W_qkv x; W_qkv has no bias.

    Args:
        dim: width of tokens.
        heads: 1 and more.
        dim_head: width of a head.
        dropout: of attention weights in training, where the mechanism has weights, and of the output.
        mechanism: a function of triton_attn that takes query, key and value, by name.
        options: its keyword arguments, such as {"stride": 4}.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: the baseline attention of Linear-ViT, whose state dicts load.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        *,
        mechanism: str = "attention",
        options: Mapping[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, heads, dim_head, dropout)
        self.mechanism = self.choice("mechanism", mechanism, tuple(MECHANISMS))
        self.options = dict(options or {})
        factory, inner = {"device": device, "dtype": dtype}, heads * dim_head
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False, **factory)
        self.to_out = nn.Sequential(nn.Linear(inner, dim, **factory), nn.Dropout(dropout))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mechanism={self.mechanism!r}, options={self.options}"

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Project, attend, project back.

        Args:
            x: (B, N, dim).
            key_padding_mask: (B, N) boolean, True = ignore.

        Returns:
            (B, N, dim).

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
        """
        self.check(x, key_padding_mask)
        query, key, value = (self.split(part) for part in self.to_qkv(x).chunk(3, -1))
        options: dict[str, Any] = {"key_padding_mask": key_padding_mask, **self.options}
        if self.training and self.dropout and self.mechanism not in DROPLESS:
            options["dropout_p"] = self.dropout
        out = MECHANISMS[self.mechanism](query, key, value, **options)
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected
