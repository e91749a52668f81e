"""HierarchicalVLM's PerformerAttention, and its block of linear-time attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments, linear_attention, orthogonal_projection, performer_attention
from triton_attn.nn._projections import Projections
from triton_attn.nn.mamba_layer import MambaLayer

State = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor]  # as `triton_attn.performer_attention` returns it


class PerformerAttention(Projections):
    """Self-attention by random features in O(N): see `triton_attn.performer_attention`.

    Args:
        dim: width of tokens.
        num_heads: a divisor of dim.
        num_random_features: 1 and more.
        kernel_type: "elu", "relu" or "softmax" (FAVOR+).
        dropout: of the heads' outputs in training: there are no weights to drop.
        causal: no token sees a later one.
        redraw_interval: forward calls in training after which features are drawn anew; None: never. They depend on seed and the number
            of the draw alone, so that all ranks agree. A compiled graph keeps those that it has; `redraw` changes them.
        seed: of the features.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: PerformerAttention of HierarchicalVLM, whose state dicts load, with orthogonal features and masks that hide.
    """

    random_matrix: Tensor

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 12,
        num_random_features: int = 256,
        kernel_type: str = "elu",
        dropout: float = 0.0,
        *,
        causal: bool = False,
        redraw_interval: int | None = None,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, num_heads, dropout, device, dtype)
        self.features = arguments.whole(self, "num_random_features", num_random_features, 1)
        self.kernel_type = arguments.choice(self, "kernel_type", kernel_type, ("elu", "relu", "softmax"))
        self.causal = arguments.flag(self, "causal", causal)
        self.redraw_interval = redraw_interval if redraw_interval is None else arguments.whole(self, "redraw_interval", redraw_interval, 1)
        self.seed, self.draws, self._calls = arguments.whole(self, "seed", seed, 0), 0, 0
        # (head_dim, features), as the original has it
        self.register_buffer("random_matrix", torch.empty(self.head_dim, num_random_features, device=device, dtype=dtype))
        self.redraw(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_random_features={self.features}, kernel_type={self.kernel_type!r}, causal={self.causal}"

    @torch.no_grad()
    def redraw(self, draw: int | None = None) -> None:
        """Draw features anew: those of the next draw, or of a given one."""
        self.draws = self.draws + 1 if draw is None else draw
        if self.random_matrix.is_meta:
            return
        generator = torch.Generator().manual_seed((self.seed << 32) + self.draws)
        rows = orthogonal_projection(self.features, self.head_dim, generator=generator, dtype=torch.float32)
        self.random_matrix.copy_(rows.mT)

    def forward(self, x: Tensor, mask: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """Project, attend, project back.

        Args:
            x: (B, N, dim).
            mask, key_padding_mask: one of the two, (B, N) boolean, True = ignore.

        Returns:
            (B, N, dim).

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
        """
        self.check_tokens("x", x)
        padding = _one_mask(self, x, mask, key_padding_mask)
        if self.training and self.redraw_interval and not torch.compiler.is_compiling():
            if self._calls and self._calls % self.redraw_interval == 0:
                self.redraw()
            self._calls += 1
        query, key, value = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out = performer_attention(
            query, key, value, self.random_matrix.mT, kernel=self.kernel_type, causal=self.causal, key_padding_mask=padding
        )
        return self.output(nn.functional.dropout(out, self.dropout, self.training))

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next token of a sequence, or the next few, in memory that does not grow with those before.

        Args:
            x: (B, N, dim), N being 1 for a token at a time, more to begin with a prompt.
            state: what this method returned for the tokens before; None at the first. It is left as it was, and holds for the
                features that it was made with: `redraw` ends it.

        Returns:
            (B, N, dim), what `forward` gives for these tokens behind those before them, and the state after them.

        Raises:
            ArgumentError: the module is not causal, or an argument is wrong; the message names it and what is allowed.
        """
        self.check_tokens("x", x)
        if not self.causal:
            raise ArgumentError(self.name, "causal", "is False; allowed for step: True, as earlier tokens cannot be gone back to")
        query, key, value = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out, state = performer_attention(
            query, key, value, self.random_matrix.mT, kernel=self.kernel_type, causal=True, initial_state=state, return_state=True
        )
        assert state is not None
        return self.output(nn.functional.dropout(out, self.dropout, self.training)), state


class LinearSelfAttention(Projections):
    """Self-attention with phi(x) = elu(x) + 1 in O(N): see `triton_attn.linear_attention`.

    Args:
        dim, num_heads, dropout, causal, device, dtype: as in `PerformerAttention`.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020.
    """

    def __init__(
        self, dim: int = 768, num_heads: int = 12, dropout: float = 0.0, *, causal: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(dim, num_heads, dropout, device, dtype)
        self.causal = arguments.flag(self, "causal", causal)

    def forward(self, x: Tensor, mask: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """As `PerformerAttention.forward`."""
        self.check_tokens("x", x)
        padding = _one_mask(self, x, mask, key_padding_mask)
        query, key, value = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out = linear_attention(query, key, value, causal=self.causal, key_padding_mask=padding)
        return self.output(nn.functional.dropout(out, self.dropout, self.training))


def _mamba(dim: int, num_heads: int, **options: Any) -> nn.Module:
    """It has no heads."""
    return MambaLayer(dim, **options)


TYPES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "performer": (PerformerAttention, ("num_random_features", "kernel_type", "causal", "redraw_interval", "seed")),
    "linear": (LinearSelfAttention, ("causal",)),
    "mamba": (_mamba, ("state_size", "expand_factor", "dt_init", "dt_init_floor", "d_conv", "dt_rank", "variant")),
}


class LinearAttentionBlock(nn.Module):
    """A pre-norm block in linear time: x += attention(norm1 x), x += ffn(norm2 x).

    Args:
        dim: width of tokens; the feed-forward network is four times as wide.
        num_heads: a divisor of dim; of no meaning for "mamba".
        attention_type: "performer", "linear" or "mamba".
        dropout: of the attention's output and in the feed-forward network.
        device, dtype: of the parameters.
        options: what the attention's class takes beside.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: LinearAttentionBlock of HierarchicalVLM.
    """

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 12,
        attention_type: str = "performer",
        dropout: float = 0.1,
        *,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        make, allowed = TYPES[arguments.choice(self, "attention_type", attention_type, tuple(TYPES))]
        for option in options:
            if option not in allowed:
                complaint = f"is no option of attention_type={attention_type!r}; allowed: {', '.join(allowed)}"
                raise ArgumentError(self.name, option, complaint)
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim); mask (B, N) boolean, True = ignore."""
        x = x + self.attention(self.norm1(x), mask)
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


def _one_mask(module: Projections, x: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    if mask is not None and key_padding_mask is not None:
        raise ArgumentError(module.name, "mask", "is given beside key_padding_mask; allowed: one of the two")
    padding = key_padding_mask if mask is None else mask
    module.check_mask("key_padding_mask" if mask is None else "mask", padding, tuple(x.shape[:2]))
    return padding
