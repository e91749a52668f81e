"""Dilated attention with its projections: drop-ins for torch.nn.MultiheadAttention's call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments, refusals
from triton_attn.nn.dilated_attention import DilatedAttention, ImprovedDilatedAttention, how, pattern


class MultiheadDilatedAttention(nn.Module):
    """out = W_o LN(concat(dilated_attention(x W_q, x W_k, x W_v))): LongNet's attention with MAGNETO's sub-layer norm.

    Args:
        embed_dim: width of tokens.
        num_heads: a divisor of embed_dim.
        segment_lengths: of each branch. Some versions of the original have the rates first: what can only be that order raises.
        dilation_rates: of each branch.
        dropout: share of attention weights dropped in training.
        bias: of the projections.
        layer_norm: normalise the heads before the output projection (MAGNETO's sub-LN).
        layer_norm_eps: its epsilon.
        gamma_init: gain of the initial values of the value and output projections: sqrt(log(2 N)) for N layers of an encoder or a
            decoder, as `magneto_gain` computes it.
        batch_first: (B, N, embed_dim); False: (N, B, embed_dim).
        qk_norm: normalise queries and keys over embed_dim.
        softmax_scale, mode, offset_rule, overlap, detach_mixing: as in `DilatedAttention`.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: MultiheadDilatedAttention of dilated-attention-pytorch, whose state dicts load; Wang et al., "Foundation Transformers"
    (MAGNETO), 2022.
    """

    fused = False
    # nn.TransformerEncoder and its layers ask for these, to leave attention that is not torch's out of their own fused call
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: Any = None,
        dtype: Any = None,
        *,
        batch_first: bool = True,
        qk_norm: bool = False,
        softmax_scale: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        arguments.whole(self, "embed_dim", embed_dim, 1)
        arguments.whole(self, "num_heads", num_heads, 1)
        if embed_dim % num_heads:
            raise ArgumentError(self.name, "num_heads", f"is {num_heads}; allowed: a divisor of embed_dim, {embed_dim}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        for argument, number in (("gamma_init", gamma_init), ("layer_norm_eps", layer_norm_eps)):
            if arguments.finite(self, argument, number) < 0:
                raise ArgumentError(self.name, argument, f"is {number}; allowed: 0 and more")
        for argument, flag in (("bias", bias), ("layer_norm", layer_norm), ("qk_norm", qk_norm)):
            arguments.flag(self, argument, flag)
        self.gamma_init = float(gamma_init)
        self.batch_first = arguments.flag(self, "batch_first", batch_first)
        # checked here too, where errors name this class
        arguments.probability(self, "dropout", dropout)
        if softmax_scale is not None:
            arguments.finite(self, "softmax_scale", softmax_scale)
        how(self, **{name: options[name] for name in ("mode", "offset_rule", "overlap", "detach_mixing") if name in options})
        lengths, rates = pattern(self, segment_lengths, dilation_rates)
        self.attention = self._attention(lengths, rates, dropout, {"softmax_scale": softmax_scale, **options})
        factory = {"device": device, "dtype": dtype}
        if self.fused:
            self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, **factory)
        else:
            for projection in ("q_proj", "k_proj", "v_proj"):
                setattr(self, projection, nn.Linear(embed_dim, embed_dim, bias=bias, **factory))
        norm = {"eps": layer_norm_eps, **factory}
        self.q_ln = nn.LayerNorm(embed_dim, **norm) if qk_norm else None
        self.k_ln = nn.LayerNorm(embed_dim, **norm) if qk_norm else None
        self.norm = nn.LayerNorm(embed_dim, **norm) if layer_norm else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.reset_parameters()

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def _attention(self, lengths: Sequence[int], rates: Sequence[int], dropout: float, options: dict[str, Any]) -> DilatedAttention:
        return DilatedAttention(lengths, rates, attention_dropout=dropout, **options)

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def reset_parameters(self) -> None:
        """MAGNETO's: normal after Xavier, with gain gamma_init for values and output; biases 0."""
        weights = self.qkv_proj.weight.chunk(3) if self.fused else (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        for weight, gain in zip((*weights, self.out_proj.weight), (1.0, 1.0, self.gamma_init, self.gamma_init), strict=True):
            nn.init.xavier_normal_(weight, gain=gain)
        for layer in self.children():
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Project, attend, normalise, project back.

        Args:
            query: (B, N, embed_dim), without batch_first (N, B, embed_dim), unbatched (N, embed_dim).
            key, value: of query's shape; None: the query.
            key_padding_mask: (B, N), unbatched (N). Boolean: True = ignore. Floating: -inf = ignore, else 0; that nothing else is in it is
                looked at on a CPU alone, because a GPU would have to be waited for.
            need_weights: False; branches have no weights of all pairs.
            attn_mask: None, or the causal mask, which is_causal promises it to be.
            average_attn_weights: of no meaning without weights.
            is_causal: no token sees a later one.

        Returns:
            The output, of query's shape, and None.

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
            Unsupported: weights, or a mask that nobody promised to be causal.
        """
        if need_weights:
            refusals.refuse(self.name, "attention weights", "pass need_weights=False")
        if attn_mask is not None and not is_causal:
            refusals.refuse(self.name, "an attn_mask", "pass is_causal=True with a causal one, key_padding_mask for padding")
        key, value = query if key is None else key, query if value is None else value
        for argument, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor) or x.ndim not in (2, 3) or x.shape[-1] != self.embed_dim or x.shape != query.shape:
                found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ArgumentError(self.name, argument, f"has shape {found}; allowed: query's, (B, N, {self.embed_dim})")
        batched = query.ndim == 3
        padding = _ignored(self.name, key_padding_mask)
        padding = padding if padding is None or batched else padding[None]
        projected = [self._rows(x) for x in self._projected(query, key, value)]
        out = self.attention(*(x.unflatten(-1, (self.num_heads, self.head_dim)) for x in projected), is_causal, padding)  # type: ignore[no-untyped-call]
        out = out.flatten(2)
        if self.norm is not None:
            out = self.norm(out)
        out = self.out_proj(out)
        if not batched:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _rows(self, x: Tensor) -> Tensor:
        """(B, N, embed_dim)"""
        if x.ndim == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not self.fused:
            parts: tuple[Tensor, ...] = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        elif query is key and key is value:
            parts = self.qkv_proj(query).chunk(3, -1)
        else:
            bias = (None,) * 3 if self.qkv_proj.bias is None else self.qkv_proj.bias.chunk(3)
            given = zip((query, key, value), self.qkv_proj.weight.chunk(3), bias, strict=True)
            parts = tuple(F.linear(x, weight, shift) for x, weight, shift in given)
        if self.q_ln is None or self.k_ln is None:
            return parts
        return self.q_ln(parts[0]), self.k_ln(parts[1]), parts[2]


class ImprovedMultiheadDilatedAttention(MultiheadDilatedAttention):
    """`MultiheadDilatedAttention` with queries, keys and values in one product.

    Args:
        use_tf32: as in `ImprovedDilatedAttention`, for the attention.

    The others are those of `MultiheadDilatedAttention`.

    Source: ImprovedMultiheadDilatedAttention of a fork of dilated-attention-pytorch, whose state dicts load.
    """

    fused = True

    def _attention(self, lengths: Sequence[int], rates: Sequence[int], dropout: float, options: dict[str, Any]) -> DilatedAttention:
        if options.get("use_tf32") is not None:
            arguments.flag(self, "use_tf32", options["use_tf32"])
        return ImprovedDilatedAttention(lengths, rates, dropout, options.pop("use_tf32", None), **options)


def magneto_gain(layers: int, other_layers: int | None = None, *, part: str = "encoder") -> float:
    """MAGNETO's gain of value, output and MLP weights.

    sqrt(log(2 layers)) for an encoder or a decoder alone; with other_layers, those of the other half of an encoder-decoder,
    sqrt(log(3 M) log(2 N) / 3) for the encoder of N layers and sqrt(log(3 M)) for the decoder of M.
    """
    if other_layers is None:
        return math.sqrt(math.log(2 * layers))
    if part == "encoder":
        return math.sqrt(math.log(3 * other_layers) * math.log(2 * layers) / 3)
    return math.sqrt(math.log(3 * layers))


def _ignored(name: str, mask: Tensor | None) -> Tensor | None:
    """True = ignore, of either kind of mask."""
    if mask is not None and not isinstance(mask, Tensor):
        raise arguments.ArgumentTypeError(name, "key_padding_mask", f"is a {type(mask).__name__}; allowed: None or torch.Tensor")
    if mask is None or mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ArgumentError(name, "key_padding_mask", f"has dtype {mask.dtype}; allowed: torch.bool, or floating with -inf = ignore")
    ignored = mask == -math.inf
    seen = mask.device.type == "cpu" and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if seen and type(mask) is Tensor and not (ignored | (mask == 0)).all():
        raise ArgumentError(name, "key_padding_mask", "has values beside 0 and -inf; allowed: those two, or a boolean mask")
    return ignored
