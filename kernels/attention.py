"""Dense, causal and cross attention: the softmax loop over one interval of keys."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from triton_attn.kernels import _softmax_launch as softmax
from triton_attn.kernels import _softmax_tiles
from triton_attn.kernels._softmax_riders import Extras, key_of
from triton_attn.kernels._softmax_walks import FULL, Pattern, causal_from, one_run
from triton_attn.tiles import Key

POINTERS, DESCRIPTORS = "attention/pointers", "attention/descriptors"
SPACES = _softmax_tiles.by_pointers(sys.modules[__name__])
DESCRIPTOR_SPACES = _softmax_tiles.by_descriptors(sys.modules[__name__])


def pattern(query: Tensor, key: Tensor, causal: bool | str) -> Pattern:
    """The pattern of a call."""
    if not causal:
        return FULL
    return causal_from(key.shape[2] - query.shape[2] if causal == "bottom_right" else 0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
    tile: softmax.Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward by pointers and asynchronous copies: sm_80 and up."""
    extras = Extras.of(query, mask, key_padding_mask, scale, dropout_p, seed)
    out, lse = softmax.forward(pattern(query, key, causal), SPACES, POINTERS, query, key, value, extras, tile)
    return (out, lse) if return_lse else out


def attention_by_descriptors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
    tile: softmax.Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward by tensor descriptors (bulk copies): sm_90, rows of 16 aligned bytes, no mask and no padding."""
    extras = Extras.of(query, mask, key_padding_mask, scale, dropout_p, seed)
    walk = pattern(query, key, causal)
    chosen = softmax.chosen_tile(tile, softmax.FORWARD, DESCRIPTOR_SPACES, DESCRIPTORS, query, value, extras)
    if chosen.warp_specialize and causal:
        chosen = replace(chosen, warp_specialize=False)  # the compiler specialises a single loop only
    elif chosen.warp_specialize:
        walk = replace(walk, queries=(replace(walk.queries[0], runs=one_run, edges=(True,)),))
    out, lse = softmax.forward(walk, DESCRIPTOR_SPACES, DESCRIPTORS, query, key, value, extras, chosen, descriptors=True)
    return (out, lse) if return_lse else out


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
    tile: softmax.Tiles = None,
) -> tuple[Tensor, ...]:
    """(dQ, dK, dV) from the saved out and lse."""
    extras = Extras.of(query, mask, key_padding_mask, scale, dropout_p, seed)
    grads = (grad_out, grad_lse)
    return softmax.backward(pattern(query, key, causal), SPACES, POINTERS, grads, query, key, value, out, lse, extras, needs, tile)


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on."""
    extras = Extras.of(tensors["query"], tensors["mask"], tensors["key_padding_mask"], options["scale"], options["dropout_p"], None)
    return key_of(tensors["query"], tensors["value"], extras)
