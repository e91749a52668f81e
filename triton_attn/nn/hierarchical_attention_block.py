"""HierarchicalVLM's HierarchicalAttentionBlock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from triton_attn import ArgumentError, arguments
from triton_attn.nn._projections import Projections
from triton_attn.nn.cross_memory_attention import CrossMemoryAttention
from triton_attn.nn.local_global_attention import LocalGlobalAttention
from triton_attn.nn.strided_attention import StridedAttention

# what each type makes, and the options that it takes
TYPES: dict[str, tuple[Callable[..., Projections], tuple[str, ...]]] = {
    "strided": (StridedAttention, ("stride", "phase", "include_self", "causal")),
    "local_global": (LocalGlobalAttention, ("local_window", "num_global_tokens", "global_mode", "combine", "causal")),
    "cross_memory": (CrossMemoryAttention, ()),
    "dense": (partial(StridedAttention, stride=1), ("causal",)),
}


class HierarchicalAttentionBlock(nn.Module):
    """A post-norm transformer block: x = norm1(x + attention(x)), x = norm2(x + ffn(x)).

    Args:
        dim: width of tokens; the feed-forward network is four times as wide.
        num_heads: a divisor of dim.
        attention_type: "strided", "local_global", "cross_memory" or "dense".
        dropout: share of attention weights and of features in the feed-forward network dropped in training.
        compat_double_residual: "cross_memory" alone: x = norm1(2 x + cross), as the original computes it.
        device, dtype: of the parameters.
        options: what the attention's class takes beside: stride, phase, include_self, causal; local_window, num_global_tokens,
            global_mode, combine, causal; for "dense", causal.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: HierarchicalAttentionBlock of HierarchicalVLM, whose state dicts load; the differences are in docs/hierarchical.md.
    """

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 12,
        attention_type: str = "local_global",
        dropout: float = 0.1,
        *,
        compat_double_residual: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        make, allowed = TYPES[arguments.choice(self, "attention_type", attention_type, tuple(TYPES))]
        for option in options:
            if option not in allowed:
                instead = ", ".join(allowed) or "no option"
                raise ArgumentError(self.name, option, f"is no option of attention_type={attention_type!r}; allowed: {instead}")
        self.compat_double_residual = arguments.flag(self, "compat_double_residual", compat_double_residual)
        if compat_double_residual and attention_type != "cross_memory":
            raise ArgumentError(self.name, "compat_double_residual", f"is True with {attention_type!r}; allowed: with 'cross_memory'")
        self.attention_type = attention_type
        place = {"device": device, "dtype": dtype}
        self.attention = make(dim=dim, num_heads=num_heads, dropout=dropout, **options, **place)
        self.ffn = nn.Sequential(
            nn.Linear(dim, 4 * dim, **place), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim, **place), nn.Dropout(dropout)
        )
        self.norm1 = nn.LayerNorm(dim, **place)
        self.norm2 = nn.LayerNorm(dim, **place)

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend, add, normalise; feed forward, add, normalise.

        Args:
            x: (B, N, dim).
            memory: (B, M, dim), for "cross_memory"; None: x is its own memory. The other types have no use for one and raise.
            mask: (B, N) boolean, True = ignore these tokens of x as keys; "strided" and "dense" also take one for each query. With a
                memory, whose tokens are the keys, it raises.
            memory_key_padding_mask: (B, M) boolean, True = ignore these tokens of the memory.

        Returns:
            (B, N, dim).

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
            Unsupported: a mask for each query where the attention takes none.
        """
        if self.attention_type == "cross_memory":
            if memory is None:
                if memory_key_padding_mask is not None:
                    raise ArgumentError(self.name, "memory_key_padding_mask", "is given without a memory; allowed: mask")
                memory_key_padding_mask = mask
            elif mask is not None:
                complaint = "is given with a memory, whose tokens are the keys; allowed: memory_key_padding_mask"
                raise ArgumentError(self.name, "mask", complaint)
            attended = self.attention(x, memory, residual=self.compat_double_residual, memory_key_padding_mask=memory_key_padding_mask)
        else:
            for argument, given in (("memory", memory), ("memory_key_padding_mask", memory_key_padding_mask)):
                if given is not None:
                    raise ArgumentError(self.name, argument, f"is given to {self.attention_type!r}; allowed: to 'cross_memory'")
            attended = self.attention(x, mask)
        x = self.norm1(x + attended)
        x = self.norm2(x + self.ffn(x))
        return x
