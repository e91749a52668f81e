"""Peers that the package does not ship: `of_<row>()` gives those that run here. None is a dependency; `make bench` installs some.

A peer takes the row's arguments, and raises NotImplementedError for what it lacks. FlexAttention is in flex_peers.py; what a ratio is to
reach, in targets.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.dilated_peers import of_dilated_attention
from benchmarks.flex_peers import dense, flex, flex_local_global, flex_subset, strided
from benchmarks.linear_peers import of_linear_attention, of_meta_hydra_attention, of_performer_attention
from benchmarks.mamba_peers import of_causal_conv1d, of_selective_scan
from triton_attn.mechanism import Mechanism

Call = Callable[..., Any]


def beside(row: Mechanism) -> Mechanism:
    """The row with the peers of this file after its own."""
    return replace(row, peers={**row.peers, **globals().get(f"of_{row.name}", dict)()})


def of_attention() -> dict[str, Call]:
    """torch's own back ends, FlexAttention, FlashAttention 4; on a CPU there is one SDPA, which the row has."""
    if not torch.cuda.is_available():
        return {}
    peers: dict[str, Call] = {
        "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "FlexAttention": flex(dense),
    }
    if _has_fa4():
        peers["FA4"] = _fa4
    if importlib.util.find_spec("fla"):
        peers["fla"] = _fla_attention
    return peers


def of_attention_varlen() -> dict[str, Call]:
    return {"fla": _fla_varlen} if importlib.util.find_spec("fla") and torch.cuda.is_available() else {}


def of_strided_attention() -> dict[str, Call]:
    return {"FlexAttention": flex(strided)}


def of_local_global_attention() -> dict[str, Call]:
    peers: dict[str, Call] = {"FlexAttention": flex_local_global()}
    if importlib.util.find_spec("local_attention"):
        peers["local-attention"] = _local_attention()
    if importlib.util.find_spec("natten"):
        peers["natten"] = _natten
    if _has_fa4():
        peers["FA4"] = _fa4_window
    return peers


def of_subset_attention() -> dict[str, Call]:
    return {"FlexAttention": flex_subset()}


def of_add_layer_norm() -> dict[str, Call]:
    """fla's, which adds in the kernel, and Liger's, which does not."""
    peers: dict[str, Call] = {}
    if importlib.util.find_spec("fla"):
        peers["fla"] = _fla_norm
    if importlib.util.find_spec("liger_kernel"):
        peers["eager sum, Liger"] = _liger_norm
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


def _local_attention() -> Call:
    """A band by blocks of `window // 2` keys, each block beside its neighbours."""
    from local_attention import LocalAttention

    layers: dict[tuple[int, int], Any] = {}

    def call(query: Tensor, key: Tensor, value: Tensor, *, window: int, **options: Any) -> Any:
        if any(option is not None and option for option in options.values()):
            raise NotImplementedError("a window alone")
        half, width = window // 2, query.shape[-1]
        if (half, width) not in layers:
            layers[half, width] = LocalAttention(
                dim=width, window_size=half, look_backward=1, look_forward=1, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True
            )
        return layers[half, width](*(x.flatten(0, 1) for x in (query, key, value))).unflatten(0, query.shape[:2])

    return call


def _natten(query: Tensor, key: Tensor, value: Tensor, *, window: int, **options: Any) -> Any:
    """Its windows are shifted at both ends of the sequence, and not cut: there it is another function."""
    from natten.functional import na1d

    if any(option is not None and option for option in options.values()) or query.shape[1] != key.shape[1]:
        raise NotImplementedError("a window alone, one key head for each query head")
    return na1d(*(x.transpose(1, 2) for x in (query, key, value)), kernel_size=2 * (window // 2) + 1).transpose(1, 2)


def _has_fa4() -> bool:
    return bool(importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"))


def _fa4_window(query: Tensor, key: Tensor, value: Tensor, *, window: int, **options: Any) -> Any:
    from flash_attn.cute import flash_attn_func

    if any(option is not None and option for option in options.values()):
        raise NotImplementedError("a window alone")
    half = window // 2
    out = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), window_size=(half, half))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _fa4(
    query: Any, key: Any, value: Any, *, mask: Any = None, key_padding_mask: Any = None, causal: Any = False, dropout_p: float = 0.0
) -> Any:
    from flash_attn.cute import flash_attn_func

    if dropout_p or mask is not None or key_padding_mask is not None:
        raise NotImplementedError("no dropout, no mask")
    out = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=bool(causal))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _fla_attention(
    query: Any, key: Any, value: Any, *, mask: Any = None, key_padding_mask: Any = None, causal: Any = False, dropout_p: float = 0.0
) -> Any:
    """fla's softmax attention, which is causal."""
    from fla.ops.attn import parallel_attn

    if dropout_p or mask is not None or key_padding_mask is not None or not causal or query.shape[2] != key.shape[2]:
        raise NotImplementedError("causal attention of a sequence to itself, no dropout, no mask")
    return parallel_attn(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def _fla_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window_size: Any = (-1, -1),
    **options: Any,
) -> Any:
    """fla's softmax attention of packed sequences to themselves, all of what is before or a window of it."""
    from fla.ops.attn import parallel_attn

    before, after = window_size
    if not causal or after > 0 or query.shape[0] != key.shape[0] or any(option is not None and option for option in options.values()):
        raise NotImplementedError("causal attention of sequences to themselves, no dropout")
    window = None if before < 0 else before + 1
    q, k, v = (x[None] for x in (query, key, value))
    return parallel_attn(q, k, v, window_size=window, cu_seqlens=cu_seqlens_q.long())[0]


def _fla_norm(x: Any, residual: Any = None, weight: Any = None, bias: Any = None, *, alpha: float = 1.0, eps: float = 1e-5) -> Any:
    try:
        from fla.modules.norm.layernorm import layer_norm
    except ImportError:  # where other versions keep it
        from fla.modules.layernorm import layer_norm

    if alpha != 1.0 or weight is None:
        raise NotImplementedError("no alpha, and a weight")
    return layer_norm(x, weight, bias, residual=residual, eps=eps)


def _liger_norm(x: Any, residual: Any = None, weight: Any = None, bias: Any = None, *, alpha: float = 1.0, eps: float = 1e-5) -> Any:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    if weight is None or bias is None:
        raise NotImplementedError("a weight and a bias")
    return LigerLayerNormFunction.apply(x if residual is None else x + alpha * residual, weight, bias, eps)


__all__ = [
    "beside",
    "of_causal_conv1d",
    "of_dilated_attention",
    "of_linear_attention",
    "of_meta_hydra_attention",
    "of_performer_attention",
    "of_selective_scan",
]
