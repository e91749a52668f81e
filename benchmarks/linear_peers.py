"""Peers of the linear family, as peers.py has them for attention."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[..., Any]


def of_linear_attention() -> dict[str, Call]:
    """Sums over all keys by einsum; fla's two ways over chunks, which a CPU has not."""
    peers: dict[str, Call] = {"einsum": _einsum, "einsum, compiled": torch.compile(_einsum, dynamic=False)}
    if importlib.util.find_spec("fla") and torch.cuda.is_available():
        peers |= {"fla chunk": _fla_linear("chunk"), "fla fused chunk": _fla_linear("fused chunk")}
    return peers


def of_performer_attention() -> dict[str, Call]:
    return {"performer-pytorch": _performer_pytorch} if importlib.util.find_spec("performer_pytorch") else {}


def of_meta_hydra_attention() -> dict[str, Call]:
    return {"cosines": _cosines, "cosines, compiled": torch.compile(_cosines, dynamic=False)}


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "crelu": lambda x: torch.cat((x.relu(), (-x).relu()), -1),
    "identity": lambda x: x,
}


def _einsum(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    eps: float = 1e-6,
    **given: Any,
) -> Tensor:
    """One operator after the other, in the inputs' dtype."""
    if causal or query.shape[1] != key.shape[1] or any(x is not None for x in given.values()):
        raise NotImplementedError("sees all keys; one key head for each query head, no padding, states or scale")
    q, k = FEATURES[feature_map](query), FEATURES[feature_map](key)
    out = torch.einsum("bhmf,bhfe->bhme", q, torch.einsum("bhnf,bhne->bhfe", k, value))
    return out / (torch.einsum("bhmf,bhf->bhm", q, k.sum(2)) + eps).unsqueeze(-1) if normalize else out


def _fla_linear(way: str) -> Call:
    """Its features are made before, in memory."""

    def call(
        query: Any, key: Any, value: Any, *, feature_map: str = "elu", causal: bool = False, normalize: bool = True, **given: Any
    ) -> Any:
        from fla.ops.linear_attn import chunk_linear_attn, fused_chunk_linear_attn

        if not causal or query.shape[1] != key.shape[1] or any(x is not None for x in given.values()):
            raise NotImplementedError("causal, one key head for each query head, no padding, states, scale or eps")
        q, k = (FEATURES[feature_map](x).transpose(1, 2) for x in (query, key))
        attend = chunk_linear_attn if way == "chunk" else fused_chunk_linear_attn
        out, _ = attend(q, k, value.transpose(1, 2), scale=1.0, normalize=normalize)
        return out.transpose(1, 2)

    return call


def _performer_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    causal: bool = False,
    kernel_epsilon: float = 1e-4,
    key_padding_mask: Tensor | None = None,
    initial_state: Any = None,
    **options: Any,
) -> Any:
    """Its call, made once for these features; it has nothing else."""
    if query.shape[1] != key.shape[1] or key_padding_mask is not None or initial_state is not None or kernel_epsilon != 1e-4:
        raise NotImplementedError("no shared keys, padding or states")
    return _fast_attention(*projection.shape, causal, query.device)(query, key, value)


@functools.cache
def _fast_attention(features: int, width: int, causal: bool, where: torch.device) -> Any:
    from performer_pytorch import FastAttention

    return FastAttention(dim_heads=width, nb_features=features, causal=causal).to(where)


def _cosines(query_branches: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, key_padding_mask: Tensor | None = None) -> Tensor:
    """Hydra attention as its paper writes it, all branches at once, in the inputs' dtype."""
    if key_padding_mask is not None:
        raise NotImplementedError("no padding")
    q, k = F.normalize(query_branches, dim=-1), F.normalize(key, dim=-1)
    summed = (k * value).cumsum(2) if causal else (k * value).sum(2, keepdim=True)
    return q * summed[:, None]


__all__ = ["FEATURES", "of_linear_attention", "of_meta_hydra_attention", "of_performer_attention"]
