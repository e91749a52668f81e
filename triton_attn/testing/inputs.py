"""Tensors for a case of the catalogue: values of any spread and layout, masks, padding, seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triton_attn.mechanism import Case, Input, Mechanism, Sizes

CONTIGUOUS, PERMUTED, SLICED, STRIDED, EXPANDED, OFFSET = "contiguous", "permuted", "sliced", "strided", "expanded", "offset"
NARROW = "narrow"  # a parameter in the inputs' own dtype
FAR = "far"  # beyond 2^31 elements along one axis: the first that is long enough, or this one
FAR_ALONG = ("far along 0", "far along 1", "far along 2", "far along 3")
LAYOUTS = (CONTIGUOUS, PERMUTED, SLICED, STRIDED, EXPANDED, OFFSET)


def shape(axes: str, sizes: Sizes) -> tuple[int, ...]:
    """Sizes of a string of axis letters."""
    return tuple(sizes[axis] for axis in axes.split())


def draw(
    row: Mechanism,
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    spread: float = 1.0,
    layout: str = CONTIGUOUS,
) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """(tensors by input name, options) for one call. Options that name an input say how to draw it."""
    generator = torch.Generator().manual_seed(seed)
    wanted, options = _wanted(row, case)
    tensors: dict[str, Tensor | None] = {}
    for name, given, how, size in wanted:
        if how is None:
            tensors[name] = None
        elif given.kind == "values":
            values = VALUES[how](torch.randn(size, generator=generator) * spread)
            values = values.abs() * given.sign if given.sign else values
            values = values.to(dtype if how == NARROW else _held(given, dtype))
            if layout == EXPANDED and given.axes[0] in "mn":  # a token that stands for all leaves nothing to attend to: a head does
                tensors[name] = values[:, :1].expand(values.shape).to(device)
            else:
                tensors[name] = laid_out(values, layout).to(device)
        elif given.kind == "seed":
            tensors[name] = torch.randint(2**62, (), generator=generator).to(device)
        elif given.kind == "offsets":
            offsets = OFFSETS[how](size[0], case.sizes[given.into], generator).to(torch.int32)
            tensors[name] = (offsets if layout == CONTIGUOUS else offsets.repeat_interleave(2)[::2]).to(device)
        elif given.kind == "index":
            indices = INDICES[how](size, case.sizes[given.into], generator)
            tensors[name] = (laid_out(indices, layout) if layout in (FAR, PERMUTED, *FAR_ALONG) else indices).to(device)
        else:
            mask = MASKS[how](size, generator)
            tensors[name] = laid_out(mask, layout).to(device)
    return tensors, options


def meta(row: Mechanism, case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """The same without storage, for the compiler. Nothing is drawn, so sizes may be large."""
    wanted, options = _wanted(row, case)
    dtypes = {"seed": torch.int64, "index": torch.int64, "offsets": torch.int32, "padding": torch.bool}
    tensors: dict[str, Tensor | None] = {}
    for name, given, how, size in wanted:
        kind = dtypes.get(given.kind, torch.float32 if how == "additive" else torch.bool)
        kind = (dtype if how == NARROW else _held(given, dtype)) if given.kind == "values" else kind
        tensors[name] = None if how is None else torch.empty(size, dtype=kind, device="meta")
    return tensors, options


def _wanted(row: Mechanism, case: Case) -> tuple[list[tuple[str, Input, Any, tuple[int, ...]]], dict[str, Any]]:
    """(name, input, how to draw it or None for absent, size) of every input, and the options that are none."""
    options = dict(case.options)
    wanted = []
    for name, given in row.inputs.items():
        how = options.pop(name, None)
        if given.kind == "seed":
            how = options.get("dropout_p") or None
        if given.required:
            how = how or ("random" if given.kind == "index" else "normal")
        # a case does without the axes of what it leaves out
        wanted.append((name, given, how, () if how is None else shape(given.axes, case.sizes)))
    return wanted, options


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another layout; what lies between them is NaN."""
    if layout in FAR_ALONG:
        return _far(tensor, FAR_ALONG.index(layout))
    if layout == CONTIGUOUS or tensor.ndim < (1 if layout in (SLICED, STRIDED, OFFSET) else 2):
        return tensor
    if layout == PERMUTED:  # batch, length, heads, width underneath; or batch, length, channels
        other = 2 if tensor.ndim == 3 else -2
        return tensor.transpose(1, other).contiguous().transpose(1, other)
    if layout == EXPANDED:  # one item serves the batch
        return tensor[:1].expand(tensor.shape)
    if layout == FAR:
        return _far(tensor)
    if layout == OFFSET:  # not aligned to 16 bytes
        flat = torch.full((tensor.numel() + 1,), math.nan, dtype=tensor.dtype)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    widened = {SLICED: (*tensor.shape[:-1], tensor.shape[-1] + 3), STRIDED: (*tensor.shape[:-1], 2 * tensor.shape[-1])}[layout]
    storage = torch.full(widened, math.nan, dtype=tensor.dtype)
    view = storage[..., 1 : 1 + tensor.shape[-1]] if layout == SLICED else storage[..., ::2]
    return view.copy_(tensor)


def _far(tensor: Tensor, axis: int | None = None) -> Tensor:
    """Along an axis that is long enough, the last index times its stride does not fit into int32, though the stride does.

    The last axis counts only where there are three: then it is time.

    The memory between is never touched, so it is only mapped.
    """
    if axis is None:
        axes = tensor.shape if tensor.ndim == 3 else tensor.shape[:-1]
        axis = next((axis for axis, size in enumerate(axes) if size > 2), None)
    if axis is None or axis >= tensor.ndim or tensor.shape[axis] < 3:
        return tensor
    step = -(-(2**31) // (tensor.shape[axis] - 1) // 8) * 8  # a descriptor wants rows of 16 aligned bytes
    strides = [*tensor.movedim(axis, 0)[0].contiguous().stride()]
    strides.insert(axis, step)
    reach = 1 + sum(stride * (size - 1) for stride, size in zip(strides, tensor.shape, strict=True))
    storage = torch.from_numpy(np.zeros(reach * tensor.element_size(), np.uint8)).view(tensor.dtype)
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


def _boolean(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    mask = torch.rand(size, generator=generator) < 0.7
    if mask.numel():
        mask[..., 0, :] = False  # a row that sees nothing
    return mask


def _additive(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = torch.randn(size, generator=generator).masked_fill(~_boolean(size, generator), -math.inf)
    return drawn.masked_fill(torch.rand(size, generator=generator) < 0.2, 0.0) if drawn.numel() else drawn


def _random(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator) < 0.4


def _any_indices(size: tuple[int, ...], length: int, generator: torch.Generator) -> Tensor:
    """Positions below a length, in any order and some of them twice."""
    return torch.randint(length, size, generator=generator) if length else torch.zeros(*size[:-1], 0, dtype=torch.int64)


def _distinct_indices(size: tuple[int, ...], length: int, generator: torch.Generator) -> Tensor:
    """Positions below a length, in order and none of them twice."""
    return torch.rand(*size[:-1], length, generator=generator).argsort(-1)[..., : size[-1]].sort(-1)[0]


def _offsets(count: int, length: int, generator: torch.Generator) -> Tensor:
    """0, the length, and in order between them others, so that some sequences are empty."""
    inner = torch.randint(length + 1, (max(count - 2, 0),), generator=generator)
    return torch.cat((torch.zeros(1), inner.sort()[0], torch.full((1,), length)))[:count]


def _growing_offsets(count: int, length: int, generator: torch.Generator) -> Tensor:
    """0, the length, and between them sequences each longer than the one before: the same wherever they are drawn."""
    places = torch.arange(count)
    return places * (places + 1) * length // max(count * (count - 1), 1)


def _held(given: Input, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an input of a call in `dtype`."""
    return torch.promote_types(dtype, torch.float32) if given.dtype != "like inputs" else dtype


def _suffix(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Sequences of 70 % of the length on average, padded at the end."""
    lengths = (torch.rand(size[0], 1, generator=generator) * 0.6 + 0.4) * size[1]
    return torch.arange(size[1]) >= lengths


def _prefix(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Sequences of 30 to 60 % of the length, padded before their beginning: whole tiles in which a row sees nothing yet."""
    hidden = (torch.rand(size[0], 1, generator=generator) * 0.3 + 0.4) * size[1]
    return torch.arange(size[1]) < hidden


INDICES: dict[str, Callable[[tuple[int, ...], int, torch.Generator], Tensor]] = {"random": _any_indices, "distinct": _distinct_indices}
OFFSETS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {"drawn": _offsets, "growing": _growing_offsets}
VALUES: dict[str, Callable[[Tensor], Tensor]] = {"normal": lambda x: x, "positive": Tensor.abs, NARROW: lambda x: x}
MASKS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "boolean": _boolean,
    "additive": _additive,
    "random": _random,
    "suffix": _suffix,
    "prefix": _prefix,
}
