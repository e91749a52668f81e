"""Epochs as TensorBoard draws them, where it is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_attn.vit.training import Epoch

MISSING = "triton-attn: tensorboard is not installed, log.jsonl has the same numbers: pip install 'triton-attn[tensorboard]'"


@contextlib.contextmanager
def board(folder: Path, wanted: bool) -> Iterator[Callable[[Epoch], None]]:
    """What to call with each epoch. Without TensorBoard it says so once, on stderr, and does nothing."""
    writer = None
    if wanted:
        try:
            from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined,unused-ignore]
        except ImportError:
            print(MISSING, file=sys.stderr)
        else:
            writer = SummaryWriter

    opened = None

    def log(epoch: Epoch) -> None:
        nonlocal opened
        if writer is None:
            return
        if opened is None:  # not before a process has something to say
            opened = writer(folder)  # type: ignore[no-untyped-call,unused-ignore]
        for name in ("loss", "accuracy", "seconds", "step_ms"):
            opened.add_scalar(name, getattr(epoch, name), epoch.epoch + 1)  # type: ignore[no-untyped-call,unused-ignore]
        opened.flush()  # type: ignore[no-untyped-call,unused-ignore]

    try:
        yield log
    finally:
        if opened is not None:
            opened.close()  # type: ignore[no-untyped-call,unused-ignore]
