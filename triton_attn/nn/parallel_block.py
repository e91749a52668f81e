"""OpenCLIP's residual block with attention and MLP side by side."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments
from triton_attn.nn.residual_blocks import ResidualAttentionBlock

ROWS = 2048  # of the MLP at a time, on a CPU


class Folded(NamedTuple):
    """The input projections after a bare norm, the output projections with their scales, and the versions of what they were made of."""

    weight: Tensor
    bias: Tensor
    out_weight: Tensor
    mlp_weight: Tensor
    out_bias: Tensor
    versions: tuple[int, ...]


class ParallelResidualAttentionBlock(ResidualAttentionBlock):
    """x + ls_1(attention(ln_1 x)) + ls_2(mlp(ln_2 x)): attention and MLP of the same tokens.

    `fold()` makes one normalisation and one input projection for both branches, for inference.

    Args:
        shared_norm: ln_1 serves both, as in PaLM; ln_2 is kept for the state.
        qk_norm: queries and keys normalised for each head, as in ViT-22B; adds q_norm and k_norm to the state.

    The others are those of `ResidualAttentionBlock`.

    Source: the parallel block of an OpenCLIP fork; Chowdhery et al., "PaLM", 2022; Dehghani et al., "Scaling Vision Transformers to 22
    Billion Parameters", 2023.
    """

    def __init__(self, d_model: int, n_head: int, *args: Any, shared_norm: bool = False, qk_norm: bool = False, **options: Any) -> None:
        super().__init__(d_model, n_head, *args, **options)
        self.shared_norm = arguments.flag(self, "shared_norm", shared_norm)
        normalised = arguments.flag(self, "qk_norm", qk_norm)
        self.q_norm = nn.LayerNorm(d_model // n_head) if normalised else None
        self.k_norm = nn.LayerNorm(d_model // n_head) if normalised else None
        self._folded: Folded | None = None

    def forward(self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """As `ResidualAttentionBlock.forward`."""
        keys, values = self._norm_kv(k_x), self._norm_kv(v_x)
        if self._folded is not None and keys is None and values is None and not torch.is_grad_enabled():
            return self._forward_folded(self._folded, q_x, attn_mask)
        first = self.ln_1(q_x)
        second = first if self.shared_norm else self.ln_2(q_x)
        attended = self.ls_1(self.attention(first, keys, values, attn_mask))
        out: Tensor = q_x + attended + self.ls_2(self.mlp(second))
        return out

    @torch.no_grad()
    def fold(self) -> ParallelResidualAttentionBlock:
        """Keep folded copies of the weights beside the parameters; calls without gradients use them, and call no hooks inside.

        W' = [W_qkv diag(gamma_1); W_fc diag(gamma_2)] after one norm, b' = b + W beta, and LayerScale in both output projections.
        train(), eval(), loading a state and moving the block forget them. A parameter changed in place raises in the next call;
        what is written through `.data` nobody sees: fold() again after it.

        Raises:
            ArgumentError: the norms are no LayerNorms, or differ in eps; a LayerScale is none.
        """
        norms: list[Any] = [self.ln_1, self.ln_1 if self.shared_norm else self.ln_2]
        if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or norms[0].eps != norms[1].eps:
            raise ArgumentError(self.name, "norm_layer", "makes no LayerNorms of one eps; allowed for fold(): those")
        mlp: Any = self.mlp
        weights, biases = [], []
        for norm, weight, bias in zip(
            norms, (self.attn.in_proj_weight, mlp.c_fc.weight), (self.attn.in_proj_bias, mlp.c_fc.bias), strict=True
        ):
            weights.append(weight if norm.weight is None else (weight * norm.weight).to(weight.dtype))
            biases.append(bias if norm.bias is None else bias + weight @ norm.bias.to(weight.dtype))
        (out_weight, out_bias), (mlp_weight, mlp_bias) = self._scaled("ls_1", self.attn.out_proj), self._scaled("ls_2", mlp.c_proj)
        self._folded = Folded(torch.cat(weights), torch.cat(biases), out_weight, mlp_weight, out_bias + mlp_bias, self._versions())
        return self

    def _scaled(self, scale: str, projection: Any) -> tuple[Tensor, Tensor]:
        layer: Any = getattr(self, scale)
        if isinstance(layer, nn.Identity):
            return projection.weight, projection.bias
        if not hasattr(layer, "gamma"):
            raise ArgumentError(self.name, scale, f"is a {type(layer).__name__}; allowed for fold(): a LayerScale")
        gamma = layer.gamma.to(projection.weight.dtype)
        return projection.weight * gamma[:, None], projection.bias * gamma

    def _forward_folded(self, folded: Folded, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling and folded.versions != self._versions():
            raise ArgumentError(self.name, "parameters", "have changed since fold(); allowed: fold() after the change")
        mlp, norm = cast(Any, self.mlp), cast(Any, self.ln_1)
        split = 3 * self.attn.embed_dim
        normed = F.layer_norm(x, x.shape[-1:], None, None, norm.eps).to(x.dtype)
        if compiling or x.device.type != "cpu":
            projected, hidden = F.linear(normed, folded.weight, folded.bias).tensor_split((split,), -1)
            out: Tensor = x + self._folded_attention(folded, projected, attn_mask) + F.linear(mlp.gelu(hidden), folded.mlp_weight)
            return out
        # on a CPU two products measure faster than one, and rows that fit into the cache faster than fresh memory for all
        projected = F.linear(normed, folded.weight[:split], folded.bias[:split])
        out = self._folded_attention(folded, projected, attn_mask).add_(x)
        rows, sums = normed.view(-1, x.shape[-1]), out.view(-1, x.shape[-1])
        buffer = rows.new_empty(min(ROWS, rows.shape[0]), folded.mlp_weight.shape[1])
        for first in range(0, rows.shape[0], ROWS):
            part = rows[first : first + ROWS]
            hidden = torch.addmm(folded.bias[split:], part, folded.weight[split:].mT, out=buffer[: part.shape[0]])
            sums[first : first + ROWS].addmm_(mlp.gelu(hidden), folded.mlp_weight.mT)
        return out

    def _folded_attention(self, folded: Folded, projected: Tensor, attn_mask: Tensor | None) -> Tensor:
        """With the biases of both output projections."""
        query, key, value = self._normed(*(self._heads(part) for part in projected.chunk(3, -1)))
        return F.linear(self._joined(self._attend(query, key, value, attn_mask)), folded.out_weight, folded.out_bias)

    def _versions(self) -> tuple[int, ...]:
        return tuple(0 if parameter.is_inference() else parameter._version for parameter in self.parameters())

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return self._normed(*super()._projected(query, key, value))

    def _normed(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.q_norm is None or self.k_norm is None:
            return query, key, value
        return self.q_norm(query), self.k_norm(key), value

    def train(self, mode: bool = True) -> ParallelResidualAttentionBlock:
        """As torch's; forgets what fold() made."""
        self._folded = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or saved; a copy's parameters have versions of their own."""
        return {**self.__dict__, "_folded": None}

    def _apply(self, *args: Any, **options: Any) -> Any:
        self._folded = None
        return super()._apply(*args, **options)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._folded = None
        super()._load_from_state_dict(*args)
