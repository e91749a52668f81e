"""Queries, keys, values and output as HierarchicalVLM's modules project them, and what they check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments
from triton_attn.arguments import ArgumentTypeError


class Projections(nn.Module):
    """q_proj, k_proj, v_proj and out_proj, made in this order: a seed gives the originals' initial values.

    They are called as modules, so that hooks, adapters and quantised replacements work.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, device: Any, dtype: Any) -> None:
        super().__init__()
        arguments.whole(self, "dim", dim, 1)
        arguments.whole(self, "num_heads", num_heads, 1)
        if dim % num_heads:
            raise ArgumentError(self.name, "num_heads", f"is {num_heads}; allowed: a divisor of dim, {dim}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.dropout = arguments.probability(self, "dropout", dropout)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, projection, nn.Linear(dim, dim, device=device, dtype=dtype))

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    @property
    def dropout_p(self) -> float:
        """The share of attention weights to drop now: none in evaluation."""
        return self.dropout if self.training else 0.0

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, dropout={self.dropout}"

    def heads(self, projected: Tensor) -> Tensor:
        """(B, N, dim) -> (B, H, N, head_dim), a view."""
        return projected.view(*projected.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def output(self, heads: Tensor) -> Tensor:
        """(B, H, N, head_dim) -> (B, N, dim), projected."""
        projected: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return projected

    def check_tokens(self, argument: str, tokens: Tensor, batch: int | None = None) -> None:
        """(B, N, dim), with the batch size of the other argument if there is one."""
        if not isinstance(tokens, Tensor):
            raise ArgumentError(self.name, argument, f"is a {type(tokens).__name__}; allowed: torch.Tensor")
        if tokens.is_nested:
            raise ArgumentError(self.name, argument, "is a nested tensor; allowed: dense, with a mask that says what is padding")
        if tokens.ndim != 3 or tokens.shape[2] != self.dim:
            raise ArgumentError(self.name, argument, f"has shape {tuple(tokens.shape)}; allowed: (B, N, {self.dim})")
        if batch is not None and tokens.shape[0] != batch:
            raise ArgumentError(self.name, argument, f"has batch size {tokens.shape[0]}; allowed: {batch}, as before it")

    def check_mask(self, argument: str, mask: Tensor | None, *allowed: tuple[int, ...]) -> None:
        """Boolean, of one of these shapes."""
        check_mask(self, argument, mask, *allowed)


def check_mask(who: arguments.Named, argument: str, mask: object, *allowed: tuple[int, ...]) -> None:
    """None, or boolean of one of these shapes, or of any if there are none."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise ArgumentTypeError(who.name, argument, f"is a {type(mask).__name__}; allowed: torch.Tensor, boolean (True = ignore)")
    if mask.dtype != torch.bool:
        raise ArgumentError(who.name, argument, f"has dtype {mask.dtype}; allowed: torch.bool (True = ignore)")
    if allowed and tuple(mask.shape) not in allowed:
        raise ArgumentError(who.name, argument, f"has shape {tuple(mask.shape)}; allowed: {' or '.join(map(str, allowed))}")
