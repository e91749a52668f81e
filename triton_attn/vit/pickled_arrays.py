"""Pickles of arrays, numbers, strings and containers; whatever else one names is refused before it is looked up.

The only file here that reads pickles: the CIFAR datasets are published as such.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from triton_attn import ArgumentError

DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "b1")


class _Array:
    """Stands for numpy.ndarray, which itself would make arrays of any size of memory as it is."""


def _empty(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    # all that numpy ever pickles: an empty array, to which the content is given afterwards
    if kind is not _Array or shape != (0,):
        raise pickle.UnpicklingError(f"an array of shape {shape!r} that is not filled")
    return np.ndarray((0,), np.uint8)


def _dtype(code: Any, *flags: Any) -> np.dtype[Any]:
    text = code.decode("ascii", "replace") if isinstance(code, bytes) else code
    if text not in DTYPES:
        raise pickle.UnpicklingError(f"an array of {text!r}")
    return np.dtype(text)


def _bytes(text: Any, encoding: Any) -> bytes:
    # how protocol 2 writes bytes
    if encoding not in ("latin1", b"latin1") or not isinstance(text, str):
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty,
    ("numpy._core.multiarray", "_reconstruct"): _empty,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _bytes,
}


class ArraysAlone(pickle.Unpickler):
    """An unpickler that knows five names, and none of them runs code of the file's choice."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ADMITTED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name}, which is no array") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a reference to something outside of the file")


def load(path: Path) -> dict[bytes, Any]:
    """The mapping that a pickle of Python 2 or 3 holds; keys are bytes.

    Raises:
        ArgumentError: it holds something else, or is cut off; the message names the file.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            held = ArraysAlone(file, encoding="bytes").load()
        except (MemoryError, RecursionError, OSError):
            raise
        except Exception as broken:
            said = str(broken) or type(broken).__name__
            raise ArgumentError("vit", "dataset", f"{path} cannot be read: {said}; allowed: a pickle of arrays alone") from broken
    if not isinstance(held, dict):
        raise ArgumentError("vit", "dataset", f"{path} holds a {type(held).__name__}; allowed: a mapping")
    return {key.encode() if isinstance(key, str) else key: value for key, value in held.items()}
