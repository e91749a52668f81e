"""Peers that are not torch itself, timed beside the row on a GPU where they are installed. None is a dependency."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[..., Any]


def of_attention() -> dict[str, Call]:
    """Name -> call with the arguments of triton_attn.attention; a peer raises NotImplementedError for what it lacks."""
    peers: dict[str, Call] = {
        "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "FlexAttention": _flex(),
    }
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        peers["FA4"] = _fa4
    return peers


def _sdpa(backend: SDPBackend) -> Call:
    def call(
        query: Any, key: Any, value: Any, *, mask: Any = None, key_padding_mask: Any = None, causal: Any = False, dropout_p: float = 0.0
    ) -> Any:
        if key_padding_mask is not None:
            if backend == SDPBackend.FLASH_ATTENTION:
                raise NotImplementedError("no mask")
            mask = ~key_padding_mask[:, None, None, :]
        with sdpa_kernel(backend):
            grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, bool(causal), enable_gqa=grouped)

    return call


def _flex() -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs")
    masks: dict[Any, Any] = {}

    def call(
        query: Any, key: Any, value: Any, *, mask: Any = None, key_padding_mask: Any = None, causal: Any = False, dropout_p: float = 0.0
    ) -> Any:
        if dropout_p or mask is not None:
            raise NotImplementedError("no dropout, no dense mask")
        name = (query.shape, key.shape, causal, key_padding_mask is None)
        if name not in masks:
            rule = None
            if causal:
                rule = lambda b, h, i, j: i >= j  # noqa: E731
            if key_padding_mask is not None:
                visible = ~key_padding_mask
                rule = lambda b, h, i, j: visible[b, j]  # noqa: E731
            batch = query.shape[0] if key_padding_mask is not None else None
            masks[name] = rule and create_block_mask(rule, batch, None, query.shape[2], key.shape[2], device=query.device)
        return compiled(query, key, value, block_mask=masks[name], enable_gqa=query.shape[1] != key.shape[1])

    return call


def _fa4(
    query: Any, key: Any, value: Any, *, mask: Any = None, key_padding_mask: Any = None, causal: Any = False, dropout_p: float = 0.0
) -> Any:
    from flash_attn.cute import flash_attn_func

    if dropout_p or mask is not None or key_padding_mask is not None:
        raise NotImplementedError("no dropout, no mask")
    out = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=bool(causal))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
