"""torch's own registry of flash attention implementations: on a GPU every caller of its attention switches, and no model changes.

    from triton_attn.integrations import torch_sdpa

    torch_sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("triton_attn")
    ...
    torch.nn.attention.restore_flash_attention_impl()

What torch gives to its flash kernels goes to `triton_attn.attention`'s: float16 and bfloat16 without a mask. The rest stays torch's.
Dropout raises. `triton_attn.sdpa_override()` does the same for one block of code, on any device, masks included.

Source: torch.nn.attention.register_flash_attention_impl, of torch 2.10 and later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from triton_attn import CATALOG, Unsupported, attention, refusals, use_backend

NAME = "triton_attn"


def register() -> str:
    """Make the implementation known to torch under the name that is returned; it is not active yet. A second call changes nothing.

    Raises:
        Unsupported: this torch has no such registry.
    """
    registry: Any = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if registry is None:
        raise Unsupported(f"torch {torch.__version__} has no register_flash_attention_impl; allowed: 2.10 and later")
    registry(NAME, register_fn=_activate)
    return NAME


class _Active:
    """What holds the kernels in torch's dispatcher; torch calls `remove`."""

    def __init__(self) -> None:
        library = Library("aten", "IMPL", "CUDA")  # type: ignore[no-untyped-call]
        library.impl("_scaled_dot_product_flash_attention", _forward, "CUDA")  # type: ignore[no-untyped-call]
        library.impl("_scaled_dot_product_flash_attention_backward", _backward, "CUDA")  # type: ignore[no-untyped-call]
        self.library: Library | None = library

    def remove(self) -> None:
        self.library = None


def _activate() -> _Active:
    return _Active()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention."""
    _refuse(dropout_p)
    # a portable path would call torch's function, and that this one
    with use_backend("triton"):
        out, lse = attention(query, key, value, causal="top_left" if is_causal else False, scale=scale, return_lse=True)
    nothing = torch.zeros((), dtype=torch.uint64, device=query.device)  # of the random numbers that dropout would have used
    return out, lse, None, None, query.shape[2], key.shape[2], nothing.expand(2), nothing, query.new_empty(0)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *random: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward."""
    _refuse(dropout_p)
    row = CATALOG["attention"]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found: tuple[Tensor, ...] = (
        row.kernels[-1]
        .load()
        .backward(grad_out, None, query, key, value, out, logsumexp, causal="top_left" if is_causal else False, scale=scale)
    )
    return found[:3]


def _refuse(dropout_p: float) -> None:
    if dropout_p:
        refusals.refuse(
            NAME, f"dropout_p={dropout_p} inside of torch's call", "call triton_attn.scaled_dot_product_attention, or restore torch's"
        )
