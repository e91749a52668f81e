"""DeepNorm's residual block, with the constants that keep hundreds of layers stable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments
from triton_attn.nn._block_norms import added_norm
from triton_attn.nn.residual_blocks import ResidualAttentionBlock


class DeepNormResidualAttentionBlock(ResidualAttentionBlock):
    """x = ln_1(alpha x + ls_1(attention(x))), then x = ln_2(alpha x + ls_2(mlp(x))): post-norm, stable at hundreds of layers.

    Weights of another block load, but compute another function here: DeepNorm needs training.

    Args:
        num_layers: N, of this half of the model.
        other_layers: of the other half of an encoder-decoder.
        part: "encoder" or "decoder"; alone both have alpha = (2 N)^(1/4), beta = (8 N)^(-1/4).
        init: "xavier_normal": weights of values, output and MLP drawn with gain beta, as the paper does; "scale": torch's initial values
            times beta, as torchscale does.
        variant: "daclip": the source's own arithmetic, for its checkpoints: pre-norm, x = a x + attention(ln_1 x), x = b x + mlp(ln_2 x)
            with a = (2 l)^(1/4), b = (8 l)^(-1/4) for layer l.
        layer_depth: l, from 1, for "daclip".

    The others are those of `ResidualAttentionBlock`.

    Source: Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", 2022; the variant is an OpenCLIP fork's.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *args: Any,
        num_layers: int = 12,
        other_layers: int | None = None,
        part: str = "encoder",
        init: str = "xavier_normal",
        variant: str = "deepnorm",
        layer_depth: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(d_model, n_head, *args, **options)
        self.variant = arguments.choice(self, "variant", variant, ("deepnorm", "daclip"))
        depth = arguments.whole(self, "layer_depth", layer_depth, 0)
        arguments.choice(self, "init", init, ("xavier_normal", "scale"))
        self.alpha, self.beta = deepnorm_constants(num_layers, other_layers, part=part)
        if self.variant == "deepnorm":
            self._initialise(init)
        else:
            self.alpha, self.beta = (float(2 * depth) ** 0.25, float(8 * depth) ** -0.25) if depth else (1.0, 1.0)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, alpha={self.alpha:.4f}, beta={self.beta:.4f}"

    def forward(self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """As `ResidualAttentionBlock.forward`."""
        keys, values = self._norm_kv(k_x), self._norm_kv(v_x)
        if self.variant == "daclip":
            x = self.alpha * q_x + self.attention(self.ln_1(q_x), keys, values, attn_mask)
            out: Tensor = self.beta * x + self.mlp(self.ln_2(x))
            return out
        x, _ = added_norm(self.ls_1(self.attention(q_x, keys, values, attn_mask)), q_x, self.ln_1, self.alpha)
        x, _ = added_norm(self.ls_2(self.mlp(x)), x, self.ln_2, self.alpha)
        return x

    @torch.no_grad()
    def _initialise(self, init: str) -> None:
        mlp: Any = self.mlp
        query, key, value = self.attn.in_proj_weight.chunk(3)
        weights = (
            (query, 1.0),
            (key, 1.0),
            *((w, self.beta) for w in (value, self.attn.out_proj.weight, mlp.c_fc.weight, mlp.c_proj.weight)),
        )
        for weight, gain in weights:
            if init == "xavier_normal":
                nn.init.xavier_normal_(weight, gain=gain)
            else:
                weight.mul_(gain)


def deepnorm_constants(num_layers: int, other_layers: int | None = None, *, part: str = "encoder") -> tuple[float, float]:
    """(alpha, beta) of DeepNorm.

    Args:
        num_layers: of this half; N for an encoder, M for a decoder.
        other_layers: of the other half; None: there is none.
        part: "encoder" or "decoder".

    Returns:
        Alone: (2 N)^(1/4), (8 N)^(-1/4). Of both: encoder 0.81 (N^4 M)^(1/16), 0.87 (N^4 M)^(-1/16); decoder (3 M)^(1/4), (12 M)^(-1/4).
    """
    if part not in ("encoder", "decoder"):
        raise ArgumentError("deepnorm_constants", "part", f"is {part!r}; allowed: 'encoder', 'decoder'")
    if other_layers is None:
        return (2 * num_layers) ** 0.25, (8 * num_layers) ** -0.25
    if part == "encoder":
        both = (num_layers**4 * other_layers) ** (1 / 16)
        return 0.81 * both, 0.87 / both
    return (3 * num_layers) ** 0.25, (12 * num_layers) ** -0.25
