"""What rides along with a call of the softmax loop, whatever its pattern: masks, padding, scale, dropout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from triton_attn.kernels import _softmax
from triton_attn.kernels._softmax_walks import Walk
from triton_attn.tiles import WIDEST_TF32, WIDTHS, Key, bucket


@dataclass(frozen=True)
class Extras:
    """What may ride along with a call: masks already checked, scale and dropout already chosen."""

    mask: Tensor | None
    key_padding_mask: Tensor | None  # (B, N), or (B, Hk, N)
    scale: float
    dropout_p: float
    seed: Tensor | None
    causal: bool = False  # tiles are chosen by it; what is seen, the pattern says

    @classmethod
    def of(
        cls,
        query: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        scale: float | None,
        dropout_p: float,
        seed: Tensor | None,
        causal: bool | str = False,
    ) -> Extras:
        """With the scale that None stands for."""
        return cls(mask, key_padding_mask, query.shape[-1] ** -0.5 if scale is None else scale, dropout_p, seed, bool(causal))

    @property
    def plain(self) -> bool:
        return self.mask is None and self.key_padding_mask is None and self.dropout_p == 0.0


def key_of(query: Tensor, value: Tensor, extras: Extras) -> Key:
    """What this call's tiles depend on."""
    width = max(WIDTHS[0], padded(query.shape[-1]), padded(value.shape[-1]))
    return Key(operands(query, width), width, extras.plain, (bucket(query.shape[2]), bucket(value.shape[2])), extras.causal)


def operands(query: Tensor, width: int) -> str:
    """How a product's operands are held: "16bit", "float32" or "tf32"."""
    if query.element_size() == 2:
        return "16bit"
    exact = torch.get_float32_matmul_precision() == "highest" or width > WIDEST_TF32
    return "float32" if exact else "tf32"


def riders(extras: Extras, b: int, h: int, g: int, m: int, n: int) -> tuple[tuple[Tensor | None, ...], tuple[tuple[int, ...], ...]]:
    """(mask, padding, end of the unpadded keys, seed) and the strides of the first two."""
    mask, padding, end = extras.mask, extras.key_padding_mask, None
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    padding_strides: tuple[int, ...] = (0, 0, 0)
    if mask is not None:
        mask = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).expand(b, h, m, n)
        mask_strides = mask.stride()
    if padding is not None and n:
        # keys after the last visible one are never visited
        padding = (padding if padding.ndim == 3 else padding[:, None]).expand(b, g, n)
        places = torch.arange(1, n + 1, dtype=torch.int32, device=padding.device)
        end = places.masked_fill(padding, 0).amax((1, 2)) if padding.stride(1) else places.masked_fill(padding[:, 0], 0).amax(1)
        padding = padding.view(torch.uint8)
        padding_strides = padding.stride()
    else:
        padding = None
    return (mask, padding, end, extras.seed), (mask_strides, padding_strides)


def constants(walk: Walk, query: Tensor, value: Tensor, extras: Extras) -> dict[str, Any]:
    d, e, n = query.shape[-1], value.shape[-1], value.shape[2]
    return {
        "OWNS": walk.owns,
        "RUNS": walk.runs,
        "KEEP": walk.keep,
        "EDGES": walk.edges,
        "FOURS": walk.fours,
        "MASK": mask_kind(extras),
        "PADDING": extras.key_padding_mask is not None and n > 0,
        "DROPOUT": extras.dropout_p > 0.0,
        "D": d,
        "E": e,
        "BLOCK_D": padded(d),
        "BLOCK_E": padded(e),
        "PRECISION": "tf32" if operands(query, max(padded(d), padded(e))) == "tf32" else "ieee",
    }


def mask_kind(extras: Extras) -> int:
    if extras.mask is None:
        return int(_softmax.NO_MASK.value)
    return int((_softmax.BOOLEAN if extras.mask.dtype == torch.bool else _softmax.ADDITIVE).value)


def score_scale(extras: Extras) -> float:
    additive = extras.mask is not None and extras.mask.dtype != torch.bool
    return extras.scale if additive else extras.scale * math.log2(math.e)


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
