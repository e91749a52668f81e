"""Files that are whole or not there, of tensors, numbers and names alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from triton_attn import ArgumentError

LAST, BEST, LOG = "last.pt", "best.pt", "log.jsonl"
HELD = ("settings", "model", "optimizer", "random", "history")


def load(path: Path) -> dict[str, Any]:
    """Tensors, numbers and names only.

    Raises:
        FileNotFoundError: there is none.
        ArgumentError: it is not one of ours, such as one that pickles a class; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; `triton-attn vit train` writes it")
    try:
        held = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        allowed = "what `vit train` wrote; `vit convert` reads the tensors of Linear-ViT's own checkpoints"
        raise ArgumentError("vit", "checkpoint", f"{path} cannot be read ({type(error).__name__}); allowed: {allowed}") from error
    missing = set(HELD) - set(held if isinstance(held, dict) else ())
    if missing:
        raise ArgumentError("vit", "checkpoint", f"{path} lacks {', '.join(sorted(missing))}; allowed: what `vit train` wrote")
    return dict(held)


def save(held: dict[str, Any], path: Path) -> None:
    """All of it or nothing: a killed process and a full disk leave the file that was there.

    Raises:
        OSError: the disk is full, or the folder refuses; the message names the file.
    """
    _whole(path, lambda file: torch.save(held, file))


def write(text: str, path: Path) -> None:
    """The same for text."""
    _whole(path, lambda file: file.write(text.encode()))


def _whole(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError where the disk is full
        partial.unlink(missing_ok=True)
        kept = f"; {path} is as it was" if path.exists() else ""
        number = error.errno if isinstance(error, OSError) else None
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise OSError(number, f"cannot be written: {said}{kept}", str(path)) from error
