"""What Linear-ViT's modules share: heads whose width together need not be the tokens'."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from triton_attn import ArgumentError, arguments
from triton_attn.nn._projections import check_mask


class InnerHeads(nn.Module):
    """Checks, and heads of width dim_head."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.dim, self.heads, self.dim_head = (self.whole(*given) for given in (("dim", dim), ("heads", heads), ("dim_head", dim_head)))
        self.dropout = arguments.probability(self, "dropout", dropout)

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, dim_head={self.dim_head}"

    def whole(self, argument: str, given: int, low: int = 1) -> int:
        """A whole number of `low` and more."""
        return arguments.whole(self, argument, given, low)

    def choice(self, argument: str, given: str, allowed: Sequence[str]) -> str:
        """One of a few names."""
        return arguments.choice(self, argument, given, allowed)

    def flag(self, argument: str, given: bool) -> bool:
        """True or False."""
        return arguments.flag(self, argument, given)

    def split(self, projected: Tensor) -> Tensor:
        """(B, N, heads dim_head) -> (B, heads, N, dim_head), a view."""
        return projected.view(*projected.shape[:-1], self.heads, self.dim_head).transpose(1, 2)

    def check(self, x: Tensor, key_padding_mask: Tensor | None) -> None:
        """(B, N, dim), and (B, N) boolean or None."""
        if not isinstance(x, Tensor):
            raise ArgumentError(self.name, "x", f"is a {type(x).__name__}; allowed: torch.Tensor")
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ArgumentError(self.name, "x", f"has shape {tuple(x.shape)}; allowed: (B, N, {self.dim})")
        check_mask(self, "key_padding_mask", key_padding_mask, tuple(x.shape[:2]))
