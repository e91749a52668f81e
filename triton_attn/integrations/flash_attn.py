"""flash-attn's functions, under its names and with its arguments: for code that imports them from `flash_attn`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from triton_attn import attention, attention_varlen
from triton_attn.refusals import refuse

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn.flash_attn_func`: (B, N, H, D), causal from the bottom right.

    Every call is deterministic. With `return_attn_probs` the result is (out, lse (B, H, N), None): the probabilities of flash-attn are for
    its own tests.

    Raises:
        Unsupported: softcap, alibi_slopes or a window, which this function does not compute.
        ArgumentError: an argument is wrong.
    """
    _refuse("flash_attn_func", softcap, alibi_slopes)
    if tuple(window_size) != (-1, -1):
        refuse("flash_attn_func", f"window_size={tuple(window_size)}", "flash_attn_varlen_func and local_global_attention have windows")
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention(
        query, key, value, causal="bottom_right" if causal else False, scale=softmax_scale, dropout_p=dropout_p, return_lse=True
    )
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flash_attn.flash_attn_varlen_func`; `triton_attn.attention_varlen` says what it computes. The longest lengths are not needed.

    Raises:
        Unsupported: softcap, alibi_slopes or block_table, which this function does not compute.
        ArgumentError: an argument is wrong.
    """
    _refuse("flash_attn_varlen_func", softcap, alibi_slopes)
    if block_table is not None:
        refuse("flash_attn_varlen_func", "block_table", "keys and values have to lie in one tensor each")
    options: dict[str, Any] = {"causal": causal, "window_size": tuple(window_size), "scale": softmax_scale, "dropout_p": dropout_p}
    if return_attn_probs:
        return (*attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **options), None)
    return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)


def _refuse(name: str, softcap: float, alibi_slopes: Tensor | None) -> None:
    if softcap:
        refuse(name, f"softcap={softcap}", "flash-attn does, on a GPU")
    if alibi_slopes is not None:
        refuse(name, "alibi_slopes", "triton_attn.attention takes them as an additive mask")
