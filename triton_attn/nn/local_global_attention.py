"""HierarchicalVLM's LocalGlobalAttention, with global tokens that learn."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import arguments, attention, local_global_attention, refusals
from triton_attn.nn._projections import Projections

MODES, COMBINATIONS = ("summary", "first", "topk"), ("joint", "average")
ORIGINAL = "global_token_indices"


class LocalGlobalAttention(Projections):
    """Self-attention to a window and to a few global tokens: out = W_o softmax over both together. Cost O(N (window + globals)).

    Args:
        local_window: a token sees local_window // 2 tokens on each side and itself; 0 and more.
        num_global_tokens: G, 0 and more.
        dim: width of tokens.
        num_heads: a divisor of dim.
        dropout: share of attention weights dropped in training.
        global_mode: "summary": G learned queries e (parameter `global_queries`) attend to all tokens,
            P = softmax(q_proj(e) k^T / sqrt(head_dim)), and their keys and values are P k and P v.
            "first": the first G tokens, which with "joint" see everything themselves.
            "topk": the G tokens of largest s = x u (parameter `saliency`), their values times sigmoid(s), through which u learns.
        combine: "joint": one softmax over window and globals; a token that is in both counts twice under "topk", once under
            "first". "average": half of a softmax over the window and half of one over the globals.
        causal: no token sees a later one; with "first" alone, because the other two look at the whole sequence.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: causal with "summary" or "topk".

    Source: LocalGlobalAttention of HierarchicalVLM, which is global_mode="first", combine="average", and whose state dicts load;
    the differences are in docs/hierarchical.md. Ainslie et al., "ETC", 2020, and Lee et al., "Set Transformer", 2019, for summaries.
    """

    def __init__(
        self,
        local_window: int = 64,
        num_global_tokens: int = 4,
        dim: int = 768,
        num_heads: int = 12,
        dropout: float = 0.0,
        *,
        global_mode: str = "summary",
        combine: str = "joint",
        causal: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, num_heads, dropout, device, dtype)
        self.global_mode = arguments.choice(self, "global_mode", global_mode, MODES)
        self.combine = arguments.choice(self, "combine", combine, COMBINATIONS)
        self.local_window = arguments.whole(self, "local_window", local_window, 0)
        self.num_global_tokens = arguments.whole(self, "num_global_tokens", num_global_tokens, int(combine == "average"))
        self.causal = arguments.flag(self, "causal", causal)
        if causal and global_mode != "first":
            asked = f"causal attention with global_mode={global_mode!r}, which looks at the whole sequence"
            refusals.refuse(self.name, asked, "say global_mode='first'")
        # unit variance, as of normalised tokens; a saliency of unit variance
        if global_mode == "summary":
            self.global_queries = nn.Parameter(torch.randn(num_global_tokens, dim, device=device, dtype=dtype))
        elif global_mode == "topk":
            self.saliency = nn.Parameter(torch.randn(dim, device=device, dtype=dtype) * dim**-0.5)

    def extra_repr(self) -> str:
        own = f"local_window={self.local_window}, num_global_tokens={self.num_global_tokens}, {super().extra_repr()}"
        return f"{own}, global_mode={self.global_mode!r}, combine={self.combine!r}, causal={self.causal}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Project, attend, project back.

        Args:
            x: (B, N, dim).
            mask: (B, N) boolean, True = ignore, as nn.MultiheadAttention's key_padding_mask; summaries do not hold these tokens.

        Returns:
            (B, N, dim). A token that sees nothing gets heads of 0, so that out_proj's bias remains.

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
            Unsupported: a mask for each query.
        """
        self.check_tokens("x", x)
        if isinstance(mask, Tensor) and mask.ndim > 2:
            refusals.refuse(self.name, "a mask for each query", "give (B, N), True = ignore; triton_attn.attention takes any mask")
        self.check_mask("mask", mask, tuple(x.shape[:2]))
        query, key, value = (self.heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        call: dict[str, Any] = {"window": self.local_window, "key_padding_mask": mask, "causal": self.causal, "dropout_p": self.dropout_p}
        if self.global_mode == "first":
            if self.combine == "joint":
                return self.output(local_global_attention(query, key, value, global_tokens=self.num_global_tokens, **call))
            first = slice(self.num_global_tokens)
            global_key, global_value, ignored = key[:, :, first], value[:, :, first], None if mask is None else mask[:, first]
        elif self.global_mode == "summary":
            global_key, global_value, ignored = self._summaries(key, value, mask)
        else:
            global_key, global_value, ignored = self._salient(x, key, value, mask)
        if self.combine == "joint" and ignored is None:
            return self.output(local_global_attention(query, key, value, global_key=global_key, global_value=global_value, **call))

        joint = self.combine == "joint"
        local = local_global_attention(query, key, value, **call, return_lse=joint)
        causal = "top_left" if self.causal else False
        whole = attention(
            query,
            global_key,
            global_value,
            key_padding_mask=ignored,
            causal=causal,
            dropout_p=self.dropout_p,
            return_lse=joint,
        )
        return self.output(_merged(*local, *whole) if joint else 0.5 * local + 0.5 * whole)

    def _summaries(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, None]:
        """P k and P v: one softmax, asked for twice, because G rows are cheaper than a copy of [k | v]."""
        query = self.heads(self.q_proj(self.global_queries)[None]).expand(key.shape[0], -1, -1, -1)
        pooled_key, pooled_value = (attention(query, key, x, key_padding_mask=mask) for x in (key, value))
        return pooled_key, pooled_value, None

    def _salient(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and gated values of the most salient tokens, and which of those are padding after all."""
        saliency = x @ self.saliency
        ranked = saliency if mask is None else saliency.masked_fill(mask, -math.inf)
        chosen = ranked.topk(min(self.num_global_tokens, x.shape[1]), dim=1).indices
        gate = saliency.gather(1, chosen).sigmoid()[:, None, :, None]
        places = chosen[:, None, :, None].expand(-1, self.num_heads, -1, self.head_dim)
        ignored = None if mask is None else mask.gather(1, chosen)
        return key.gather(2, places), value.gather(2, places) * gate.to(value.dtype), ignored

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """An original's state has a parameter that did nothing, and lacks those that make globals learn: they stay as they are."""
        if state_dict.pop(prefix + ORIGINAL, None) is not None and (self.global_mode, self.combine) != ("first", "average"):
            own = {"summary": "global_queries", "topk": "saliency"}.get(self.global_mode)
            if own and prefix + own not in state_dict:
                state_dict[prefix + own] = getattr(self, own).detach()
            warnings.warn(
                f"{self.name}: this state was trained with global_mode='first', combine='average'; it was loaded into "
                f"{self.global_mode!r}, {self.combine!r}, which computes something else until it is trained",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *others)


def _merged(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> Tensor:
    """One softmax over the keys of both, from the softmax over each."""
    top = torch.maximum(lse_a, lse_b).detach()
    top = top.where(top > -math.inf, 0.0)
    share_a, share_b = ((lse - top).exp()[..., None] for lse in (lse_a, lse_b))
    total = share_a + share_b
    return ((share_a * a + share_b * b) / total.where(total > 0, 1.0)).to(a.dtype)
