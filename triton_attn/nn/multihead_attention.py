"""torch.nn.MultiheadAttention on `triton_attn.attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import ArgumentError, arguments, attention, dispatch, refusals
from triton_attn.arguments import ArgumentTypeError
from triton_attn.nn.attention_weights import attention_weights

NAME = "MultiheadAttention"
FEW = 2**16  # weights of a call: half a megabyte at most, in float64


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on our kernels: same arguments, parameters, initial values and state dict.

    MultiHead(Q, K, V) = concat(head_1, ..., head_h) W_o,  head_i = attention(Q W_i^q, K W_i^k, V W_i^v)

    It is torch's class with another `forward`, so a state dict of either loads into the other, and the same seed gives the same
    weights. Never torch's own fused evaluation.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: torch's own.
        on_unsupported: what happens where the weights cannot be had beside the kernel's output, which is in training with
            dropout: no kernel says which entries it dropped. "reference", the default, computes weights and output by their
            definition, as torch does; "none" returns None for the weights; "raise" raises.

    Source: Vaswani et al., "Attention Is All You Need", 2017; torch.nn.MultiheadAttention, torch 2.13. The differences are in
    docs/drop_in.md.
    """

    on_unsupported = "reference"  # for a module of torch's whose class was set

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        on_unsupported: str = "reference",
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        self.on_unsupported = refusals.policy(NAME, on_unsupported)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Project, attend, project back.

        Args:
            query: (L, N, E), with batch_first (N, L, E), unbatched (L, E).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S), unbatched (S). Boolean: True = ignore. Floating: added to the scores.
            need_weights: also return the weights: exact, computed beside the output, in training after dropout.
            attn_mask: (L, S) or (N * num_heads, L, S). Boolean: True = not allowed. Floating: added to the scores. A mask is no
                wider than query, or float32.
            average_attn_weights: the mean of the weights over the heads.
            is_causal: a promise that attn_mask, which must be there, is the causal mask. It is believed where torch believes it:
                without key_padding_mask, weights and added keys.

        Returns:
            The output, of query's layout and width E, and the weights (N, L, S), per head (N, num_heads, L, S), without N if
            unbatched, or None. A query that sees no key gets weights and heads of 0, so that out_proj's bias remains.

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
            Unsupported: nested tensors; what on_unsupported="raise" refuses.
        """
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.ndim == 3
        q, k, v = self._project(query, key, value)
        k, v, added = self._add_keys(k, v)
        causal = is_causal and key_padding_mask is None and not need_weights and not added
        mask, padding = self._masks(None if causal else attn_mask, key_padding_mask, added, q)

        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights and dropout:
            asked, instead = "weights after dropout beside a kernel's output", "pass need_weights=False, or on_unsupported='reference'"
            need_weights = refusals.settle(NAME, asked, instead, self.on_unsupported)
        if need_weights and (dropout or self._few(q, k, mask, padding)):
            weights = attention_weights(q, k, mask=mask, key_padding_mask=padding)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights.to(v.dtype) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = self._attend(q, k, v, mask, padding, "top_left" if causal else False, dropout)
            if need_weights:
                weights = attention_weights(q, k, mask=mask, key_padding_mask=padding, average=average_attn_weights)

        if weights is not None:
            weights = (weights if batched else weights[0]).to(query.dtype)
        out = out.permute(0, 2, 1, 3) if self.batch_first and batched else out.permute(2, 0, 1, 3)
        out = out.flatten(2)
        return self.out_proj(out if batched else out[:, 0]), weights

    @staticmethod
    def _few(q: Tensor, k: Tensor, mask: Tensor | None, padding: Tensor | None) -> bool:
        """Whether the output is cheaper from the weights, which are asked for, than by a call of its own that would hold none."""
        where_no_kernel = q.device.type == "cpu" and dispatch.backend() == "auto" and not dispatch.explaining()
        # a hidden NaN among the values would reach a product with weights of 0
        if mask is not None or padding is not None or not where_no_kernel:
            return False
        # a graph for every length has all weights at once, see `attention_weights`
        return torch.compiler.is_compiling() or q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= FEW

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool | str, dropout: float
    ) -> Tensor:
        out: Tensor = attention(q, k, v, mask=mask, key_padding_mask=padding, causal=causal, dropout_p=dropout)
        return out

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """(N, H, length, head_dim) each, in one product where the inputs are one tensor; views of the result, never copies."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return self._heads(F.linear(query, weight, bias), 3).unbind(0)
        return tuple(self._heads(x, 1)[0] for x in self._product(query, key, value, weight, bias))

    def _product(self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        """(..., E) each."""
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        e = self.embed_dim
        first, second = (None, None) if bias is None else (bias[:e], bias[e:])
        if key is value:
            return F.linear(query, weight[:e], first), *F.linear(key, weight[e:], second).chunk(2, -1)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True))

    def _heads(self, projected: Tensor, count: int) -> Tensor:
        """(count, N, H, length, head_dim), a view."""
        heads = projected.view(*projected.shape[:-1], count, self.num_heads, self.head_dim)
        if projected.ndim == 2:
            return heads.permute(1, 2, 0, 3)[:, None]
        return heads.permute(2, 0, 3, 1, 4) if self.batch_first else heads.permute(2, 1, 3, 0, 4)

    def _add_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with the learned one and the zero one behind them, and how many those are."""
        n = k.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, self.num_heads, 1, self.head_dim)
            k, v = (torch.cat((x, one.view(shape).expand(n, -1, -1, -1)), 2) for x, one in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v, (self.bias_k is not None) + self.add_zero_attn

    def _masks(self, attn_mask: Tensor | None, padding: Tensor | None, added: int, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`attention`'s mask and key_padding_mask for projected queries from torch's two; added keys are seen by all."""
        mask = attn_mask
        if attn_mask is not None:
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.view(q.shape[0], self.num_heads, *attn_mask.shape[1:])
            attn_mask = F.pad(attn_mask, (0, added)) if added else attn_mask
            mask = ~attn_mask if attn_mask.dtype == torch.bool else _widened(attn_mask, q)
        if padding is None:
            return mask, None
        padding = padding if padding.ndim == 2 else padding[None]
        padding = F.pad(padding, (0, added)) if added else padding
        if padding.dtype == torch.bool:
            return mask, padding
        bias = _widened(padding, q)[:, None, None, :]
        if mask is None:
            return bias, None
        return torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else mask + bias, None

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> None:
        alone = query is key and key is value and attn_mask is None and key_padding_mask is None and not is_causal
        if alone and not query.is_nested and query.ndim == 3 and query.shape[2] == self.embed_dim and self._qkv_same_embed_dim:
            return  # what most calls are: the rest would find nothing
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), tensor in zip(widths.items(), (query, key, value), strict=True):
            if tensor.is_nested:
                instead = "pad it and give a key_padding_mask, or use torch.nn.MultiheadAttention in evaluation"
                refusals.refuse(NAME, f"attention over a nested {name}", instead)
            if tensor.ndim != query.ndim or tensor.ndim not in (2, 3):
                allowed = "2 (unbatched) or 3 dimensions, as many for query, key and value"
                raise ArgumentError(NAME, name, f"has shape {tuple(tensor.shape)}; allowed: {allowed}")
            if tensor.shape[-1] != width:
                raise ArgumentError(NAME, name, f"has width {tensor.shape[-1]}; allowed: {width}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ArgumentError(NAME, "value", f"has shape {tuple(value.shape)}; allowed: key's, {tuple(key.shape)}, but for the width")
        batched = query.ndim == 3
        lengths, batch = (1, 0) if self.batch_first else (0, 1)
        n, m, keys = (query.shape[batch], query.shape[lengths], key.shape[lengths]) if batched else (1, query.shape[0], key.shape[0])
        if batched and key.shape[batch] != n:
            raise ArgumentError(NAME, "key", f"has batch size {key.shape[batch]}; allowed: query's, {n}")
        if is_causal and attn_mask is None:
            raise ArgumentError(NAME, "is_causal", "is True without an attn_mask; it only says that a given attn_mask is causal")
        padded: tuple[int, ...] = (n, keys) if batched else (keys,)
        shapes: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
            ("attn_mask", attn_mask, [(m, keys), (n * self.num_heads, m, keys)]),
            ("key_padding_mask", key_padding_mask, [padded]),
        ]
        for name, mask, allowed_shapes in shapes:
            if mask is None:
                continue
            if arguments.causal_bias(mask):
                raise ArgumentTypeError(NAME, name, "is a CausalBias, which holds no numbers; allowed: a tensor that does")
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise ArgumentError(NAME, name, f"has dtype {mask.dtype}; allowed: torch.bool (True = ignore), or floating to be added")
            if mask.dtype == torch.float64 != query.dtype:
                raise ArgumentTypeError(NAME, name, f"has dtype {mask.dtype}; allowed: torch.bool, torch.float32 and what is narrower")
            if tuple(mask.shape) not in allowed_shapes:
                raise ArgumentError(NAME, name, f"has shape {tuple(mask.shape)}; allowed: {' or '.join(map(str, allowed_shapes))}")


def _widened(mask: Tensor, q: Tensor) -> Tensor:
    """A floating mask in a dtype that `attention` takes beside the queries', with every number as it was."""
    return mask if mask.dtype in (q.dtype, torch.float32) else mask.to(torch.promote_types(mask.dtype, q.dtype))
