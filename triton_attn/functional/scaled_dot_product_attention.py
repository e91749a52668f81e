"""torch.nn.functional.scaled_dot_product_attention, argument for argument, on `attention`. A name for it, and no mechanism of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_attn import operators
from triton_attn.arguments import FLOATS, ArgumentError, ArgumentTypeError, autocast_dtype, causal_bias, finite, probability
from triton_attn.functional.attention import ROW, attention

NAME = "scaled_dot_product_attention"
HALVES = (torch.float16, torch.bfloat16)
_OURS = {"mask": "attn_mask", "causal": "is_causal"}  # attention's name of an argument -> torch's


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention on our kernels: change the import and nothing else.

    out = dropout(softmax(scale query key^T + attn_mask)) value

    Leading dimensions, any number of them, broadcast as in torch and are never copied up to two; beyond two they are viewed as
    two where the strides allow it.

    Args:
        query: (..., H, L, E), float16, bfloat16, float32 or float64; 2 dimensions or more.
        key: (..., Hk, S, E). Hk is H or 1, or with enable_gqa any divisor of H.
        value: (..., Hk, S, Ev). E and Ev of any size; kernels serve up to 256.
        attn_mask: broadcastable to (..., H, L, S), 2 dimensions or more. Boolean: True = attend. Floating, of the query's dtype or
            float32: added to the scores; one that requires a gradient gets it, from the portable path. Or a CausalBias of
            torch.nn.attention.bias: causal from the top left, at any lengths, or to the bottom right, of the call's lengths.
        dropout_p: share of weights set to zero, applied whenever it is positive, in evaluation too.
        is_causal: query i sees keys 0..i, also where L and S differ. Not together with attn_mask.
        scale: multiplies the scores; E ** -0.5 if None.
        enable_gqa: query head h uses key head h // (H / Hk), as `attention` always does.

    Returns:
        (..., H, L, Ev) in the inputs' dtype, or autocast's. A query that sees no key gives 0.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: torch.nn.functional.scaled_dot_product_attention, torch 2.13. The differences are in docs/drop_in.md.
    """
    if is_causal is not True and is_causal is not False:
        raise ArgumentTypeError(NAME, "is_causal", f"is {is_causal!r}; allowed: True, False")
    leading: Sequence[int] = (0, 0)
    try:
        plain = _plain(query, key, value)
        if plain and (attn_mask is None or (not is_causal and _plain_mask(attn_mask, query, key))):
            # what most calls are: all that `attention` checks, in a third of the time
            mask = attn_mask if attn_mask is None or attn_mask.ndim == 4 else attn_mask[(None,) * (4 - attn_mask.ndim)]
            tensors = {"query": query, "key": key, "value": value, "mask": mask, "key_padding_mask": None, "seed": None}
            options = {
                "causal": "top_left" if is_causal else "",
                "scale": query.shape[3] ** -0.5 if scale is None else finite(ROW, "scale", scale),
                "dropout_p": 0.0 if dropout_p == 0.0 else probability(ROW, "dropout_p", dropout_p),
            }
            return operators.run(ROW, tensors, options, False)  # type: ignore[no-any-return]
        if attn_mask is not None and is_causal:
            raise ArgumentError(NAME, "is_causal", "is True beside an attn_mask; allowed: one of the two")
        causal: bool | str = "top_left" if is_causal else False
        if causal_bias(attn_mask):
            attn_mask, causal = None, _alignment(attn_mask, query, key)
        if not plain:
            query, key, value, leading = _folded(query, key, value, enable_gqa)
        mask = _folded_mask(_kept(attn_mask), leading) if isinstance(attn_mask, Tensor) else attn_mask
        out: Tensor = attention(query, key, value, mask=mask, causal=causal, scale=scale, dropout_p=dropout_p)
    except ArgumentError as error:
        said = str(error).partition(f": {error.argument} ")[2]
        raise type(error)(NAME, _OURS.get(error.argument, error.argument), said) from None
    return out if len(leading) == 2 else out.view(*leading, *out.shape[2:])


def _plain(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` would take three tensors as they are, with as many key heads as query heads."""
    if not (type(query) is Tensor and type(key) is Tensor and type(value) is Tensor):
        return False
    if query.layout is not torch.strided or key.layout is not torch.strided or value.layout is not torch.strided:
        return False
    if query.is_nested or key.is_nested or value.is_nested:
        return False
    dtype, where, shape = query.dtype, query.device, key.shape
    if not (dtype in FLOATS and key.dtype is dtype and value.dtype is dtype and key.device == where and value.device == where):
        return False
    if not (query.ndim == 4 and len(shape) == 4 and value.shape == shape):
        return False
    b, h, _, d = query.shape
    return b == shape[0] and h == shape[1] and d == shape[3] and d >= 1


def _plain_mask(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether it is a mask for whole sequences of plain tensors, of their dtype, that is the same or given for each item and head."""
    if type(mask) is not Tensor or mask.layout is not torch.strided or mask.is_nested or mask.device != query.device:
        return False
    shape, of_query = mask.shape, query.shape
    if not 2 <= len(shape) <= 4 or shape[-2] != of_query[2] or shape[-1] != key.shape[2] or mask.dtype not in (torch.bool, query.dtype):
        return False
    if mask.dtype in HALVES and autocast_dtype(query.device.type) not in (None, mask.dtype):
        return False
    # written out: a generator takes another microsecond
    heads, items = shape[-3] if len(shape) > 2 else 1, shape[0] if len(shape) == 4 else 1
    return (heads == 1 or heads == of_query[1]) and (items == 1 or items == of_query[0])


def _kept(mask: Tensor) -> Tensor:
    """Under autocast a mask of another half precision, which torch casts: float32 keeps it as it is."""
    return mask.float() if mask.dtype in HALVES and autocast_dtype(mask.device.type) not in (None, mask.dtype) else mask


def _alignment(bias: Any, query: Tensor, key: Tensor) -> str:
    """`attention`'s name of what a CausalBias says."""
    variant = getattr(bias, "variant", None)
    if variant is None:
        raise ArgumentTypeError(NAME, "attn_mask", "is what an operator made of a CausalBias; allowed: the CausalBias itself")
    if variant.name == "UPPER_LEFT":
        return "top_left"
    for tensor, length in ((query, bias.seq_len_q), (key, bias.seq_len_kv)):
        if isinstance(tensor, Tensor) and not tensor.is_nested and tensor.ndim >= 2 and tensor.shape[-2] != length:
            said = f"is a CausalBias of {bias.seq_len_q} queries and {bias.seq_len_kv} keys; allowed: as many as the call has"
            raise ArgumentError(NAME, "attn_mask", said)
    return "bottom_right"


def _folded(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> tuple[Tensor, Tensor, Tensor, Sequence[int]]:
    """Tensors of four dimensions, and the leading sizes of the output that they stand for."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.is_nested:
            return query, key, value, (0, 0)  # for `attention` to refuse
        if tensor.ndim < 2 + grouped:
            least = "3 with enable_gqa, whose heads are the third from the end" if grouped else "2"
            raise ArgumentError(NAME, name, f"has shape {tuple(tensor.shape)}; allowed: dimensions from {least}")
    own = 3 if grouped else 2  # dimensions that do not broadcast
    leading = _broadcast({name: tensor.shape[:-own] for name, tensor in tensors.items()})
    query, key, value = (_fold(tensor.expand(*leading, *tensor.shape[-own:])) for tensor in tensors.values())
    return query, key, value, [*leading, query.shape[1]] if grouped else leading


def _broadcast(shapes: Mapping[str, Sequence[int]]) -> list[int]:
    """What leading sizes broadcast to, counted from the right."""
    common: list[int] = []
    for name, shape in shapes.items():
        common = [1] * (len(shape) - len(common)) + common
        for axis in range(-len(shape), 0):
            if common[axis] == 1:
                common[axis] = shape[axis]
            elif shape[axis] not in (1, common[axis]):
                wanted = f"broadcastable to {tuple(common)}; fewer key heads than query heads need enable_gqa=True"
                raise ArgumentError(NAME, name, f"has leading sizes {tuple(shape)}; allowed: {wanted}")
    return common


def _fold(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -4) if tensor.ndim > 4 else tensor[(None,) * (4 - tensor.ndim)]


def _folded_mask(mask: Tensor, leading: Sequence[int]) -> Tensor:
    """The mask, folded as the tensors are; the dimensions that are folded away are the only ones ever expanded."""
    most = len(leading) + 2
    if not 2 <= mask.ndim <= most:
        raise ArgumentError(NAME, "attn_mask", f"has shape {tuple(mask.shape)}; allowed: 2 to {most} dimensions")
    if mask.ndim < 4 or most < 5:
        return mask
    away = leading[:-1]
    sizes = [1] * (most - mask.ndim) + list(mask.shape[:-3])
    if all(size == 1 for size in sizes):
        return _fold(mask)
    if any(size not in (1, wanted) for size, wanted in zip(sizes, away, strict=True)):
        raise ArgumentError(NAME, "attn_mask", f"has leading sizes {tuple(sizes)}; allowed: broadcastable to {tuple(away)}")
    return _fold(mask.expand(*away, *mask.shape[-3:]))
