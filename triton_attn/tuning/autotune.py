"""Tune at first use, where a program asks for it, and the same tiles on every rank."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triton_attn import device, operators, tiles
from triton_attn.arguments import ArgumentError
from triton_attn.mechanism import Case, Mechanism

if TYPE_CHECKING:
    from triton_attn.tuning.ledger import Ledger
    from triton_attn.tuning.tune import Clock

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
NOWHERE = "is None; allowed: a path, or None where TRITON_ATTN_TILES is set or platformdirs installed"
FILE = "is None and TRITON_ATTN_TILES is a file; allowed: a folder"
_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def autotune(folder: str | Path | None = None, *, clock: Clock | None = None) -> Iterator[None]:
    """Inside, a kernel's first call at new sizes tries every tile of its launches, forward and backward, and keeps the fastest right one.

    Nowhere else does the package time anything. A call that is being captured into a CUDA graph is not tuned; nor is a key that the
    tables of `folder` have already. Tuning a call takes seconds to minutes, and memory for further copies of its inputs.

    Args:
        folder: where trials and table go, and where this process looks for tables from then on; by default where it does anyway:
            TRITON_ATTN_TILES, or the user's data folder.
        clock: how a launch is timed; by default with `triton.testing.do_bench`.

    Raises:
        ArgumentError: there is no such folder: TRITON_ATTN_TILES names a file, or is not set and platformdirs is not installed.
        ModuleNotFoundError: tiles are judged by `triton_attn.testing`, whose packages are not installed.
    """
    # judging needs more packages than calling
    from triton_attn.tuning.ledger import Ledger
    from triton_attn.tuning.tune import gpu_clock, tasks_of, tune

    place = Path(folder) if folder is not None else device.user_tables()
    if place is None:
        raise ArgumentError("autotune", "folder", NOWHERE)
    if folder is None and place.is_file():
        raise ArgumentError("autotune", "folder", FILE)
    if folder is not None:
        tiles.use_tables(place)
    ledgers: dict[int, Ledger] = {}
    done: set[tuple[str, str]] = set()

    def at_call(row: Mechanism, tensors: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        first = next(iter(tensors.values()))
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        with _one_at_a_time:
            index = first.device.index or 0
            profile = device.profile(index)
            ledger = ledgers.setdefault(index, Ledger(place, profile))
            case = case_of(row, tensors, options)
            new = [task for task in tasks_of(row, case, _dtype(first), profile) if (task.name, str(task.key)) not in done]
            done.update((task.name, str(task.key)) for task in new)

            def all_of() -> None:
                with device.guard(first):
                    for task, trials in tune(
                        new, first.device, profile=profile, clock=clock or gpu_clock, known=ledger.known, tried=ledger.keep
                    ):
                        ledger.note(task, trials)

            with paused(), ThreadPoolExecutor(1) as aside:
                # in this thread, inside of an operator, nothing is differentiated
                aside.submit(all_of).result()

    before, operators.before_kernel = operators.before_kernel, at_call
    try:
        yield
    finally:
        operators.before_kernel = before


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Inside, calls are not tuned: those that tuning itself makes, and their backward passes."""
    before, operators.before_kernel = operators.before_kernel, None
    try:
        yield
    finally:
        operators.before_kernel = before


def case_of(row: Mechanism, tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Case:
    """A call's sizes and options as a case: what rides along is drawn anew."""
    sizes: dict[str, int] = {}
    drawn: dict[str, Any] = {}
    for name, given in row.inputs.items():
        tensor = tensors[name]
        if tensor is None or given.kind == "seed":
            continue
        if given.required or given.kind in ("values", "offsets"):
            sizes.update(zip(given.axes.split(), tensor.shape, strict=True))
        if given.kind != "values" or given.optional:
            drawn[name] = _how(given.kind, tensor)
    return Case("at first use", {**sizes, **row.derived(sizes, options)}, {**options, **drawn})


def _how(kind: str, tensor: Tensor) -> str:
    if kind == "mask":
        return "boolean" if tensor.dtype == torch.bool else "additive"
    return {"values": "normal", "index": "distinct", "offsets": "drawn", "padding": "suffix" if tensor.ndim == 2 else "random"}[kind]


def _dtype(tensor: Tensor) -> str:
    exact = torch.get_float32_matmul_precision() == "highest"
    return _NAMES.get(tensor.dtype, "float32" if exact else "tf32")


def broadcast_tables(group: Any = None, *, source: int = 0, folder: str | Path | None = None) -> Path:
    """Give every rank of a process group the tile tables of one of them, so that all compute the same bits.

    The ranks' own user tables are not read any more, in this process: calls look into `folder`.

    Args:
        group: a `torch.distributed` group; None: the default one.
        source: the global rank whose tables count.
        folder: where this rank writes them; by default a folder for this rank and source beside the user's tables.

    Returns:
        The folder.

    Raises:
        ArgumentError: there is no process group, or no folder: TRITON_ATTN_TILES may name a file that every rank can read instead.
    """
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        raise ArgumentError(
            "broadcast_tables", "group", "is None and no process group is initialised: torch.distributed.init_process_group comes first"
        )
    own = device.user_tables()
    place = Path(folder) if folder is not None else own / f"rank{distributed.get_rank()}" if own else None
    if place is None:
        raise ArgumentError("broadcast_tables", "folder", NOWHERE)
    if own is not None and own.is_file():
        raise ArgumentError(
            "broadcast_tables", "TRITON_ATTN_TILES", f"is the file {own}; allowed: a folder, or the same file on every rank"
        )
    held: list[Any] = [None]
    if distributed.get_rank() == source:
        held = [{path.name: path.read_text(encoding="utf-8") for path in sorted(own.glob("*.json"))} if own and own.is_dir() else {}]
    distributed.broadcast_object_list(held, src=source, group=group)
    place.mkdir(parents=True, exist_ok=True)
    for stale in place.glob("*.json"):
        stale.unlink()
    for name, text in held[0].items():
        path = place / f"{tiles.slug(name.removesuffix('.json'))}.json"
        path.write_text(text, encoding="utf-8")
        tiles.read(path)  # what one rank cannot read, no rank uses
    tiles.use_tables(place)
    return place
