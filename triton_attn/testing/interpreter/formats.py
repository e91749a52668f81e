"""Number formats that NumPy lacks: bfloat16 and float8, held as their bits, and tf32, a float32 with 10 bits of mantissa."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BFLOAT16_NAN = 0x7FC1
# by Triton's names; fp8e4b15 is nobody else's
FLOAT8 = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 values of bfloat16 bits: exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: NDArray[Any], *, nearest: bool = True) -> NDArray[np.uint16]:
    """bfloat16 bits of the nearest values, ties to even, or of the nearest towards zero; NaN stays NaN."""
    single = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values))
    bits = single.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    added = even + np.uint32(0x7FFF) if nearest else np.uint32(0)
    rounded = ((bits + added) >> np.uint32(16)).astype(np.uint16)
    # a NaN's payload may lie in the bits that rounding drops
    return np.where(np.isnan(single), np.uint16(0x7FC0) | (bits >> np.uint32(16)).astype(np.uint16), rounded)


def tf32(values: NDArray[Any]) -> NDArray[np.float32]:
    """What tensor cores see of float32 operands: they ignore the last 13 bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values)).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def widen_float8(bits: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    """float32 values of float8 bits: exact."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(FLOAT8[name]).float().numpy().reshape(np.shape(bits))


def narrow_float8(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """float8 bits of the nearest values, ties to even; what is beyond the largest becomes it, as in the GPU's own instruction."""
    single = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    most = torch.finfo(FLOAT8[name]).max
    return single.clamp(-most, most).to(FLOAT8[name]).view(torch.uint8).numpy().reshape(np.shape(values))


def poison(dtype: np.dtype[Any], shape: tuple[int, ...], bfloat16: bool) -> NDArray[Any]:
    """What a masked-off lane holds: NaN, a huge integer, or True."""
    if bfloat16:
        value: Any = BFLOAT16_NAN
    elif dtype.kind == "f":
        value = np.nan
    elif dtype.kind in "iu":
        value = np.iinfo(dtype).max // 3
    else:
        value = True
    return np.full(shape, value, dtype)
