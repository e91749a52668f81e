"""Linear-ViT's VisionTransformer, with any attention that takes a sequence of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments
from triton_attn.nn import HydraAttention, RippleAttention, TokenAttention
from triton_attn.nn.token_attention import MECHANISMS

TYPES = ("ripple", "hydra", "baseline", *MECHANISMS)


class VisionTransformer(nn.Module):
    """Classifies images: patches, a class token, positions, pre-norm blocks of attention and MLP, a linear head on the class token.

    Args:
        img_size: height and width of the images.
        patch_size: divides img_size.
        num_classes: 1 and more.
        dim: width of tokens.
        depth: number of blocks.
        heads: of the attention.
        mlp_dim: width inside of the MLP.
        attention_type: "ripple", "hydra", "baseline" (dense), or the name of a function of triton_attn that takes query, key, value.
        dropout: in blocks.
        emb_dropout: after the positions are added.
        dim_head: width of a head.
        ripple_stages: of "ripple".
        hydra_branches: of "hydra".
        attention_options: further keyword arguments of RippleAttention or HydraAttention, or of the function, e.g. {"stride": 4}.
            {"variant": "v1"} with "ripple" is the original's arithmetic.
        channels: of the images.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: VisionTransformer of Linear-ViT, whose state dicts load.
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        num_classes: int = 100,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_dim: int = 1536,
        attention_type: str = "ripple",
        dropout: float = 0.1,
        emb_dropout: float = 0.1,
        dim_head: int = 64,
        ripple_stages: int = 3,
        hydra_branches: int = 4,
        *,
        attention_options: Mapping[str, Any] | None = None,
        channels: int = 3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        arguments.choice(self, "attention_type", attention_type, TYPES)
        for argument, given in (("img_size", img_size), ("num_classes", num_classes), ("depth", depth), ("mlp_dim", mlp_dim)):
            arguments.whole(self, argument, given, 1)
        if img_size % arguments.whole(self, "patch_size", patch_size, 1):
            raise ArgumentError(self.name, "patch_size", f"is {patch_size}; allowed: a divisor of img_size, {img_size}")
        self.img_size, self.patch_size, self.channels = img_size, patch_size, arguments.whole(self, "channels", channels, 1)
        self.attention_type = attention_type
        factory = {"device": device, "dtype": dtype}
        side = img_size // patch_size
        pixels = channels * patch_size**2
        self.to_patch_embedding = nn.Sequential(
            Patches(patch_size), nn.LayerNorm(pixels, **factory), nn.Linear(pixels, dim, **factory), nn.LayerNorm(dim, **factory)
        )
        self.pos_embedding = nn.Parameter(torch.randn(1, side * side + 1, dim, **factory))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim, **factory))
        self.dropout = nn.Dropout(emb_dropout)
        common: dict[str, Any] = {**factory, **(attention_options or {})}

        def attention() -> nn.Module:
            if attention_type == "ripple":
                grid = {} if common.get("variant") == "v1" else {"grid_size": (side, side)}
                return RippleAttention(dim, heads, dim_head, dropout, ripple_stages, **{**grid, **common})
            if attention_type == "hydra":
                return HydraAttention(dim, heads, dim_head, dropout, hydra_branches, **common)
            mechanism = "attention" if attention_type == "baseline" else attention_type
            return TokenAttention(dim, heads, dim_head, dropout, mechanism=mechanism, options=attention_options, **factory)

        self.transformer = nn.ModuleList(Block(attention(), dim, mlp_dim, dropout, factory) for _ in range(depth))
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim, **factory), nn.Linear(dim, num_classes, **factory))

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def forward(self, img: Tensor) -> Tensor:
        """(B, channels, img_size, img_size) -> (B, num_classes), logits.

        Raises:
            ArgumentError: the images have another shape.
        """
        wanted = (self.channels, self.img_size, self.img_size)
        if img.ndim != 4 or tuple(img.shape[1:]) != wanted:
            raise ArgumentError(self.name, "img", f"has shape {tuple(img.shape)}; allowed: (B, {', '.join(map(str, wanted))})")
        patches = self.to_patch_embedding(img)
        x = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), 1) + self.pos_embedding
        x = self.dropout(x)
        for block in self.transformer:
            x = block(x)
        logits: Tensor = self.mlp_head(x[:, 0])
        return logits


class Patches(nn.Module):
    """(B, C, rows p, columns p) -> (B, rows columns, p p C), the pixels of a patch row by row, channels last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, img: Tensor) -> Tensor:
        b, c, height, width = img.shape
        p = self.size
        return img.reshape(b, c, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, attention: nn.Module, dim: int, mlp_dim: int, dropout: float, factory: dict[str, Any]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.ff = FeedForward(dim, mlp_dim, dropout, factory)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.ff(self.norm2(x))
        return out


class FeedForward(nn.Module):
    """W_2 GELU(W_1 x), with dropout after each."""

    def __init__(self, dim: int, mlp_dim: int, dropout: float, factory: dict[str, Any]) -> None:
        super().__init__()
        layers = nn.Linear(dim, mlp_dim, **factory), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim, **factory), nn.Dropout(dropout)
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out
