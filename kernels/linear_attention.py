"""Linear attention: the shared walks of the carried state, with an initial state before them and the last one after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_attn.kernels import _carried_tiles, _linear
from triton_attn.kernels._carried_launch import State, key_of
from triton_attn.tiles import Key, Tiles

POINTERS = "linear_attention/pointers"
SPACES = _carried_tiles.by_pointers(_linear)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    return_state: bool = False,
    tile: Tiles = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Forward by pointers: sm_80 and up."""
    out = torch.empty((*query.shape[:3], value.shape[-1]), dtype=query.dtype, device=query.device)
    of = _linear.Attention(POINTERS, SPACES, tile, feature_map, causal, normalize, scale, eps, key_padding_mask)
    last = _linear.forward(of, query, key, value, out, State(initial_state, initial_normalizer))
    return (out, last.state, last.side) if return_state else out  # type: ignore[return-value]


def linear_attention_backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    grad_normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    state: Tensor,
    normalizer: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True, True, True),
    tile: Tiles = None,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and the initial state from the inputs and what the forward gave; an empty tensor where not needed."""
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device) if needs[0] else None
    of = _linear.Attention(POINTERS, SPACES, tile, feature_map, causal, normalize, scale, eps, key_padding_mask)
    grad_last, last, initial = State(grad_state, grad_normalizer), State(state, normalizer), State(initial_state, initial_normalizer)
    others = _linear.backward(of, grad_out, grad_last, query, key, value, out, last, initial, grad_query, needs[1:])
    return (query.new_empty(0) if grad_query is None else grad_query, *others)


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on."""
    plain, causal = tensors["key_padding_mask"] is None, bool(options.get("causal"))
    return key_of(tensors["query"], tensors["value"], options.get("feature_map", "elu"), plain, causal)
