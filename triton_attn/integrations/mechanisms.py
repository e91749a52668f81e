"""Any mechanism that takes tokens, called as models call torch's attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_attn import ArgumentError, Unsupported, refusals, use_backend
from triton_attn.nn import MultiheadAttention
from triton_attn.nn._causal_masks import is_causal
from triton_attn.nn.token_attention import DROPLESS, MECHANISMS

# what a model says at each call, and not the person who switches it
SAID_BY_THE_MODEL = ("query", "key", "value", "causal", "key_padding_mask", "mask", "dropout_p", "scale", "return_lse", "return_state")


@dataclass(frozen=True)
class Choice:
    """A mechanism and its own options."""

    mechanism: str
    options: Mapping[str, Any]

    @property
    def exact(self) -> bool:
        """Whether it computes what torch's call computes."""
        return self.mechanism == "attention"

    @property
    def causal(self) -> bool:
        """Whether it can hide the future."""
        return "causal" in inspect.signature(MECHANISMS[self.mechanism]).parameters

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        causal: bool | str = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """`attention`'s arguments. A mask (True = attend, or added) has to be the causal one; others have no place in a pattern.

        Raises:
            Unsupported: the mechanism has no such mask, no dropout.
        """
        if mask is not None:
            if not is_causal(~mask if mask.dtype == torch.bool else mask):
                raise Unsupported(
                    f"{self.mechanism} takes no attn_mask of shape {tuple(mask.shape)} but the causal one; "
                    "give a key_padding_mask, or take mechanism='attention'"
                )
            causal = True
        given: dict[str, Any] = {"key_padding_mask": key_padding_mask, "scale": scale, **self.options}
        if causal:
            if causal == "top_left" and query.shape[2] != key.shape[2]:
                raise Unsupported(f"{self.mechanism} is causal among tokens, not from {query.shape[2]} to {key.shape[2]} others")
            given["causal"] = True
        if dropout_p:
            if self.mechanism in DROPLESS:
                raise Unsupported(f"{self.mechanism} has no attention weights to drop; set the model's attention dropout to 0")
            given["dropout_p"] = dropout_p
        return MECHANISMS[self.mechanism](query, key, value, **given)

    def as_torchs(self) -> Callable[..., Tensor]:
        """The mechanism with the signature of torch.nn.functional.scaled_dot_product_attention."""

        def scaled_dot_product_attention(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            *,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            padding = None
            if attn_mask is not None and attn_mask.dtype == torch.bool and attn_mask.ndim == 4 and attn_mask.shape[1:3] == (1, 1):
                padding, attn_mask = ~attn_mask[:, 0, 0].expand(query.shape[0], -1), None
            causal = "top_left" if is_causal else False
            return self.attend(query, key, value, mask=attn_mask, key_padding_mask=padding, causal=causal, dropout_p=dropout_p, scale=scale)

        return scaled_dot_product_attention


def chosen(caller: str, mechanism: str, options: Mapping[str, Any]) -> Choice:
    """The checked choice: it is tried on eight tokens.

    Raises:
        ArgumentError: there is no such mechanism, or an option is none of its own, missing or out of range.
    """
    if mechanism not in MECHANISMS:
        raise ArgumentError(caller, "mechanism", f"is {mechanism!r}; allowed: {', '.join(map(repr, MECHANISMS))}")
    parameters = inspect.signature(MECHANISMS[mechanism]).parameters
    own = [name for name in parameters if name not in SAID_BY_THE_MODEL]
    for name in options:
        if name not in own:
            raise ArgumentError(caller, name, f"is no option of {mechanism}; allowed: {', '.join(own) or 'none'}")
    missing = [name for name in own if parameters[name].default is inspect.Parameter.empty and name not in options]
    if missing:
        raise ArgumentError(caller, missing[0], f"is missing; {mechanism} needs it")
    choice = Choice(mechanism, dict(options))
    tokens = torch.zeros(1, 1, 8, 8)
    with use_backend("portable"), torch.no_grad():
        choice.attend(tokens, tokens, tokens)
    return choice


class PatchedMultiheadAttention(MultiheadAttention):
    """`triton_attn.nn.MultiheadAttention` with another mechanism between its projections; made by `patch`, not by hand."""

    choice: Choice

    def extra_repr(self) -> str:
        return f"mechanism={self.choice.mechanism!r}, options={dict(self.choice.options)}"

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
        """As its base class, without weights.

        Raises:
            Unsupported: weights, or a mask that the mechanism does not have.
        """
        if need_weights:
            refusals.refuse(self.choice.mechanism, "attention weights inside of a model", "pass need_weights=False")
        if key_padding_mask is not None and key_padding_mask.is_floating_point():  # nn.TransformerEncoder makes one of a boolean one
            key_padding_mask = _hidden(self.choice.mechanism, key_padding_mask)
        return super().forward(query, key, value, key_padding_mask, False, attn_mask, average_attn_weights, is_causal)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool | str, dropout: float
    ) -> Tensor:
        return self.choice.attend(q, k, v, mask=mask, key_padding_mask=padding, causal=causal, dropout_p=dropout)


def _hidden(mechanism: str, mask: Tensor) -> Tensor:
    """The boolean mask (True = ignore) that a floating one of 0 and -inf stands for; on a GPU it is checked without waiting."""
    hidden = mask == -torch.inf
    said = f"{mechanism} takes no key_padding_mask that adds other numbers than 0 and -inf to the scores"
    fine = (hidden | (mask == 0)).all()
    if mask.is_cpu and not torch.compiler.is_compiling():
        if not fine:
            raise Unsupported(said)
    else:
        torch._assert_async(fine, said)
    return hidden
