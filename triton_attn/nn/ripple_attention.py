"""Linear-ViT's RippleAttention."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments, linear_attention, ripple_attention
from triton_attn.arguments import ArgumentTypeError
from triton_attn.nn._inner_heads import InnerHeads


class RippleAttention(InnerHeads):
    """Self-attention to keys and values that are pooled in stages, by linear attention, with a learned expansion afterwards.

    O(N) in time and memory; see `triton_attn.ripple_attention` for the formula.

    Args:
        dim: width of tokens.
        heads: 1 and more.
        dim_head: width of a head.
        dropout: of the output.
        num_stages: how often keys and values are pooled; 0 and more.
        variant: "spatial": pools over both axes of an image, counts tokens, and leaves prefix tokens alone. "v1": the original's
            arithmetic, for its checkpoints: pooling after the feature map and over the sequence with its class token, so that the
            sum of the scores may be near zero.
        grid_size: (rows, columns) of the tokens after the prefix; None: a sequence. "spatial" only.
        num_prefix_tokens: tokens before the grid, such as a class token. "spatial" only.
        feature_map: "crelu", "relu" or "elu". "spatial" only; "v1" has "elu".
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: RippleAttention of Linear-ViT, whose state dicts load into both variants.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        num_stages: int = 3,
        *,
        variant: str = "spatial",
        grid_size: tuple[int, int] | None = None,
        num_prefix_tokens: int = 1,
        feature_map: str = "crelu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, heads, dim_head, dropout)
        self.num_stages = self.whole("num_stages", num_stages, 0)
        self.variant = self.choice("variant", variant, ("spatial", "v1"))
        self.num_prefix_tokens = self.whole("num_prefix_tokens", num_prefix_tokens, 0)
        self.feature_map = self.choice("feature_map", feature_map, ("crelu", "relu", "elu"))
        self.grid_size = None if grid_size is None else self._grid(grid_size)
        factory, inner = {"device": device, "dtype": dtype}, heads * dim_head
        for projection in ("to_q", "to_k", "to_v"):
            setattr(self, projection, nn.Linear(dim, inner, bias=False, **factory))
        for layers in ("pool_layers", "expand_layers"):
            stages = (
                nn.Sequential(nn.Linear(dim_head, dim_head, **factory), nn.LayerNorm(dim_head, **factory), nn.GELU())
                for _ in range(num_stages)
            )
            setattr(self, layers, nn.ModuleList(stages))
        self.to_out = nn.Sequential(nn.Linear(inner, dim, **factory), nn.Dropout(dropout))

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    pool_layers: nn.ModuleList
    expand_layers: nn.ModuleList

    def _grid(self, given: object) -> tuple[int, int]:
        if not isinstance(given, (list, tuple)) or len(given) != 2:
            raise ArgumentTypeError(self.name, "grid_size", f"is {given!r}; allowed: (rows, columns), or None")
        rows, columns = (arguments.whole(self, "grid_size", size, 1) for size in given)
        return rows, columns

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_stages={self.num_stages}, variant={self.variant!r}, grid_size={self.grid_size}"

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Project, pool, attend, expand, project back.

        Args:
            x: (B, N, dim); N = num_prefix_tokens + rows * columns where there is a grid.
            key_padding_mask: (B, N) boolean, True = ignore; "v1" has none.

        Returns:
            (B, N, dim).

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
        """
        self.check(x, key_padding_mask)
        query, key, value = (self.split(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        if self.variant == "v1":
            if key_padding_mask is not None:
                raise ArgumentError(self.name, "key_padding_mask", "is given; allowed with variant='v1': None")
            out = self._original(query, key, value)
        else:
            out = ripple_attention(
                query,
                key,
                value,
                _weights(self.pool_layers),
                _weights(self.expand_layers),
                num_stages=self.num_stages,
                grid_size=self.grid_size,
                num_prefix_tokens=min(self.num_prefix_tokens, x.shape[1]),
                feature_map=self.feature_map,
                key_padding_mask=key_padding_mask,
            )
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected

    def _original(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Pairs of neighbours are averaged, the last with a zero where the number is odd; layers act on features."""
        query, key = F.elu(query) + 1, F.elu(key) + 1
        for layer in self.pool_layers:
            if key.shape[2] > 1:
                key, value = (_halved(part) for part in (key, value))
                key = layer(key)
        out: Tensor = linear_attention(query, key, value, feature_map="identity", scale=max(key.shape[2], 1) ** -0.5)
        for layer in reversed(self.expand_layers):
            out = layer(out)
        return out


def _halved(x: Tensor) -> Tensor:
    b, h, n, d = x.shape
    return F.pad(x, (0, 0, 0, n % 2)).view(b, h, -1, 2, d).mean(3)


def _weights(layers: nn.ModuleList) -> list[Any]:
    """Of each linear layer and of the LayerNorm after it."""
    stages: Any = layers
    return [(stage[0].weight, stage[0].bias, stage[1].weight, stage[1].bias) for stage in stages]
