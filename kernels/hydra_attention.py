"""Hydra attention: linear attention's walks, the branches being members of a key head, read and written where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_attn.kernels import _carried_tiles, _linear
from triton_attn.kernels._carried_launch import State, key_of
from triton_attn.tiles import Key, Tiles

POINTERS = "hydra_attention/pointers"
SPACES = _carried_tiles.by_pointers(_linear)


def hydra_attention(
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "crelu",
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    return_state: bool = False,
    tile: Tiles = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Forward by pointers: sm_80 and up. The state of a head is summed once, whatever the number of branches."""
    out = torch.empty((*query_branches.shape[:4], value.shape[-1]), dtype=query_branches.dtype, device=query_branches.device)
    of = _linear.Attention(POINTERS, SPACES, tile, feature_map, causal, True, scale, eps, key_padding_mask)
    last = _linear.forward(of, query_branches.transpose(1, 2), key, value, out.transpose(1, 2), State(None))
    return (out, last.state, last.side) if return_state else out  # type: ignore[return-value]


def hydra_attention_backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    grad_normalizer: Tensor | None,
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    state: Tensor,
    normalizer: Tensor,
    *,
    feature_map: str = "crelu",
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
    tile: Tiles = None,
) -> tuple[Tensor, ...]:
    """Gradients of queries, key and value from the inputs and what the forward gave; an empty tensor where not needed."""
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    grad_query = torch.empty(query_branches.shape, dtype=out.dtype, device=out.device) if needs[0] else None
    query, made = query_branches.transpose(1, 2), None if grad_query is None else grad_query.transpose(1, 2)
    of = _linear.Attention(POINTERS, SPACES, tile, feature_map, causal, True, scale, eps, key_padding_mask)
    grad_last, last = State(grad_state, grad_normalizer), State(state, normalizer)
    grads = _linear.backward(
        of, grad_out.transpose(1, 2), grad_last, query, key, value, out.transpose(1, 2), last, State(None), made, needs[1:]
    )
    return (query.new_empty(0) if grad_query is None else grad_query, *grads)


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on."""
    plain, causal = tensors["key_padding_mask"] is None, bool(options.get("causal"))
    return key_of(tensors["query_branches"], tensors["value"], options.get("feature_map", "crelu"), plain, causal)
