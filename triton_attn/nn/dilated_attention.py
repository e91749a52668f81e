"""Dilated attention as modules: the call alone, on heads that are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments, dilated_attention

MODES, RULES, OVERLAPS = ("longnet", "head_group"), ("block", "mod"), ("count", "unique")


class DilatedAttention(nn.Module):
    """`triton_attn.dilated_attention` with its pattern kept, on (B, N, H, D).

    Args:
        segment_lengths: of each branch, 1 and more.
        dilation_rates: of each branch, 1 and more.
        softmax_scale: multiplies the scores; D ** -0.5 if None.
        attention_dropout: share of attention weights dropped in training.
        op: None; the original's choice of an xformers kernel. `triton_attn.use_backend` chooses here.
        mode: "longnet": every head takes part in every branch. "head_group": heads in contiguous groups, each in one branch, as in
            dilated-attention-pytorch.
        offset_rule: which tokens a head selects, "block" (torchscale) or "mod" (the paper).
        overlap: whether a key that several branches share counts in each, "count", or once, "unique".
        detach_mixing: torchscale's gradient, without that of the mixture's weights.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: DilatedAttention of dilated-attention-pytorch, without its division by a sum of outputs; Ding et al., "LongNet", 2023.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        op: None = None,
        *,
        mode: str = "longnet",
        offset_rule: str = "block",
        overlap: str = "count",
        detach_mixing: bool = False,
    ) -> None:
        super().__init__()
        if op is not None:
            raise ArgumentError(self.name, "op", f"is {op!r}; allowed: None. triton_attn.use_backend chooses the implementation")
        self.segment_lengths, self.dilation_rates = pattern(self, segment_lengths, dilation_rates)
        self.softmax_scale = None if softmax_scale is None else arguments.finite(self, "softmax_scale", softmax_scale)
        self.attention_dropout = arguments.probability(self, "attention_dropout", attention_dropout)
        self.mode, self.offset_rule, self.overlap, self.detach_mixing = how(self, mode, offset_rule, overlap, detach_mixing)

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def extra_repr(self) -> str:
        return f"segment_lengths={self.segment_lengths}, dilation_rates={self.dilation_rates}, mode={self.mode!r}"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: (B, N, H, D).
            key: (B, N, Hk, D); Hk divides H.
            value: (B, N, Hk, E).
            is_causal: no token sees a later one.
            key_padding_mask: (B, N) boolean, True = ignore.

        Returns:
            (B, N, H, E). A token that no branch selects gets 0.

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
        """
        out: Tensor = dilated_attention(
            *(x.transpose(1, 2) if isinstance(x, Tensor) and x.ndim == 4 else x for x in (query, key, value)),
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            mode=self.mode,
            offset_rule=self.offset_rule,
            overlap=self.overlap,
            detach_mixing=self.detach_mixing,
            key_padding_mask=key_padding_mask,
            causal=is_causal,
            scale=self.softmax_scale,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return out.transpose(1, 2)


class ImprovedDilatedAttention(DilatedAttention):
    """`DilatedAttention` under the name and the arguments of its successor.

    Args:
        segment_lengths: of each branch.
        dilation_rates: of each branch.
        dropout: share of attention weights dropped in training.
        use_tf32: whether float32 products of the forward call may be rounded to TF32; None: torch's own setting, which it never changes
            beyond the call. Compiled, it is not looked at: a graph computes as torch's setting has it when the graph runs.
        softmax_scale, mode, offset_rule, overlap, detach_mixing: as in `DilatedAttention`.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: ImprovedDilatedAttention of a fork of dilated-attention-pytorch, which attends between the heads of a token.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        use_tf32: bool | None = None,
        *,
        softmax_scale: float | None = None,
        **options: Any,
    ) -> None:
        arguments.probability(self, "dropout", dropout)
        super().__init__(segment_lengths, dilation_rates, softmax_scale, dropout, **options)
        self.use_tf32 = use_tf32 if use_tf32 is None else arguments.flag(self, "use_tf32", use_tf32)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, key_padding_mask: Tensor | None = None) -> Tensor:
        """As `DilatedAttention.forward`."""
        # no graph can hold a change of the setting
        if self.use_tf32 is None or torch.compiler.is_compiling():
            return super().forward(query, key, value, is_causal, key_padding_mask)
        with tf32(self.use_tf32):
            return super().forward(query, key, value, is_causal, key_padding_mask)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may be rounded, and back."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's answer where somebody has set a backend's own, which is put back below
        before = "highest"
    every: Any = torch.backends
    backends = every.cuda.matmul, every.mkldnn.matmul
    own = [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, precision in zip(backends, own, strict=True):
            backend.fp32_precision = precision


def pattern(who: Any, segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both checked. Versions of the original differ in which comes first, so what can only be the other order is refused."""
    lengths = tuple(arguments.whole_numbers(who, "segment_lengths", segment_lengths))
    rates = tuple(arguments.whole_numbers(who, "dilation_rates", dilation_rates))
    if len(lengths) != len(rates):
        raise ArgumentError(who.name, "dilation_rates", f"has {len(rates)} numbers; allowed: {len(lengths)}, as segment_lengths")
    if max(lengths) < max(rates):
        complaint = f"is {list(rates)} and segment_lengths {list(lengths)}, which looks like the other order"
        raise ArgumentError(who.name, "dilation_rates", f"{complaint}; allowed: rates up to the longest segment")
    return lengths, rates


def how(
    who: Any, mode: str = "longnet", offset_rule: str = "block", overlap: str = "count", detach_mixing: bool = False
) -> tuple[str, str, str, bool]:
    """The choices, checked."""
    return (
        arguments.choice(who, "mode", mode, MODES),
        arguments.choice(who, "offset_rule", offset_rule, RULES),
        arguments.choice(who, "overlap", overlap, OVERLAPS),
        arguments.flag(who, "detach_mixing", detach_mixing),
    )
