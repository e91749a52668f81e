"""Local-global attention by its definition, in naive PyTorch: a window around every query, and keys that all of them see."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn.reference import _softmax


def local_global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    global_key: Tensor | None = None,
    global_value: Tensor | None = None,
    global_tokens: int = 0,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax over |i - j| <= window // 2 and the globals: positions N, N + 1, ... in dropout's eyes if they are summaries."""
    seen = visible(query, global_key, window, global_tokens, key_padding_mask, causal)
    key, value = _joined(key, value, global_key, global_value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _softmax.attend(query, key, value, seen, scale=scale, dropout_p=dropout_p, seed=seed)
    return (out, lse) if return_lse else out


def visible(
    query: Tensor, global_key: Tensor | None, window: int, global_tokens: int, key_padding_mask: Tensor | None, causal: bool | str
) -> Tensor:
    """Boolean, broadcastable to (B, H, N, N + G): which key, and which summary, each query sees."""
    n = query.shape[2]
    place = torch.arange(n, device=query.device)
    i, j = place[:, None], place[None, :]
    rule = ((i - j).abs() <= window // 2) | (i < global_tokens) | (j < global_tokens)
    rule = rule & _softmax.visible(n, n, key_padding_mask, causal, query.device)
    if global_key is None:
        return rule
    return torch.cat((rule, rule.new_ones(*rule.shape[:-1], global_key.shape[2])), -1)


def _joined(
    key: Tensor, value: Tensor, global_key: Tensor | None, global_value: Tensor | None, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    if global_key is None or global_value is None:
        return key, value
    return torch.cat((key, global_key), 2), torch.cat((value, global_value), 2)


def bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    window: int,
    global_key: Tensor | None = None,
    global_value: Tensor | None = None,
    global_tokens: int = 0,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S; see `_softmax.bound`."""
    n = key.shape[2]
    seen = visible(query, global_key, window, global_tokens, key_padding_mask, causal)
    key, value = _joined(key, value, global_key, global_value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    sizes = _softmax.bound(query, key, value, seen, grad_out, grad_lse, scale=scale, dropout_p=dropout_p, seed=seed)
    for name in ("key", "value"):
        sizes[name], sizes[f"global_{name}"] = sizes[name][:, :, :n], sizes[name][:, :, n:]
    return sizes
