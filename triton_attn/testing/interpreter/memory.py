"""A model of global memory for one launch: what belongs to each tensor argument, and who has touched it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triton_attn.testing.interpreter.faults import DuplicateStore, Misaligned, OutOfBounds, Race

Access = Literal["load", "store", "atomic"]
Bounds = Literal["view", "storage", False]
NOBODY, SEVERAL = 0, -1  # otherwise a program's number, from 1


class View:
    """One tensor argument: the bytes it may touch, holes between its rows excluded."""

    def __init__(self, name: str, tensor: Tensor, bounds: Bounds) -> None:
        storage = tensor.untyped_storage()
        self.name, self.shape, self.strides = name, tuple(tensor.shape), tensor.stride()
        self.itemsize, self.start = tensor.element_size(), tensor.data_ptr()
        self.storage = storage.data_ptr()
        self.low, self.high = 0, 0
        self.covered: NDArray[np.bool_] | None = None
        if bounds == "storage":
            self.low = self.storage - self.start
            self.high = self.low + storage.nbytes()
        elif tensor.numel():
            axes = [(stride, size) for stride, size in zip(self.strides, self.shape, strict=True) if size > 1 and stride]
            self.high = (1 + sum(stride * (size - 1) for stride, size in axes)) * self.itemsize
            if not _packed(axes):
                self.covered = np.zeros(self.high // self.itemsize, np.bool_)  # lazily mapped: a far stride costs nothing
                strides, sizes = [stride for stride, _ in axes], [size for _, size in axes]
                np.lib.stride_tricks.as_strided(self.covered, sizes, strides)[...] = True

    def outside(self, addresses: NDArray[np.int64], width: int) -> NDArray[np.bool_] | None:
        """Which lanes do not lie in it wholly; None if all do."""
        offsets = addresses - self.start
        if offsets.min() >= self.low and offsets.max() + width <= self.high:
            if self.covered is None:
                return None
            wrong = ~self.covered[offsets // self.itemsize]
            if width > self.itemsize:
                wrong |= ~self.covered[(offsets + (width - 1)) // self.itemsize]
            return wrong if wrong.any() else None
        wrong = (offsets < self.low) | (offsets + width > self.high)
        if self.covered is not None:
            wrong |= ~self.covered[np.clip(offsets, self.low, self.high - 1) // self.itemsize]
        return wrong

    def __str__(self) -> str:
        return f"{self.name}, shape {self.shape}, strides {self.strides}"


class Shadow:
    """Per cell of one storage, the number of the program that stored it, loaded it, updated it atomically."""

    def __init__(self, start: int, size: int, cell: int) -> None:
        self.start, self.cell = start, cell
        count = -(-size // cell)
        self.stored, self.loaded, self.updated = (np.zeros(count, np.int32) for _ in range(3))
        self.written = False

    def cells(self, addresses: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        first = (addresses - self.start) // self.cell
        if width > self.cell:
            return (first[:, None] + np.arange(width // self.cell)).reshape(-1)
        return first

    def others(self, kind: Access, cells: NDArray[np.int64], program: int) -> tuple[NDArray[np.bool_], str] | None:
        """Which cells another program touched in a way that conflicts with this access, and how; else remember it."""
        against = {"load": "stored updated", "store": "stored loaded updated", "atomic": "stored loaded"}[kind]
        for deed in against.split():
            if deed == "loaded" or self.written:
                by = getattr(self, deed)[cells]
                conflict = (by != NOBODY) & (by != program)
                if conflict.any():
                    return conflict, deed
        mine: NDArray[np.int32] = {"load": self.loaded, "store": self.stored, "atomic": self.updated}[kind]
        if kind == "store":
            mine[cells] = program
        else:
            before = mine[cells]
            mine[cells] = np.where((before == NOBODY) | (before == program), program, SEVERAL)
        self.written |= kind != "load"
        return None


class Memory:
    """All tensors that a launch can reach."""

    def __init__(self, tensors: Mapping[str, Tensor], also: Sequence[Tensor], bounds: Bounds, races: bool) -> None:
        self.bounds, self.races = bounds, races
        self.views = {name: View(name, tensor, bounds) for name, tensor in tensors.items()}
        self.anonymous = [View(f"reachable[{i}]", tensor, bounds) for i, tensor in enumerate(also)]
        self.shadows: dict[int, Shadow] = {}
        if races:
            everything = [*tensors.values(), *also]
            cells: dict[int, int] = {}
            for tensor in everything:
                start = tensor.untyped_storage().data_ptr()
                cells[start] = min(cells.get(start, 16), tensor.element_size())
            for tensor in everything:
                storage = tensor.untyped_storage()
                start = storage.data_ptr()
                if storage.nbytes() and start not in self.shadows:
                    self.shadows[start] = Shadow(start, storage.nbytes(), cells[start])

    def touch(self, kind: Access, pointers: Any, mask: NDArray[np.bool_] | None, width: int, program: int) -> None:
        """Check one access of all lanes of a program, and remember it. `pointers` is the interpreter's handle."""
        addresses = np.ascontiguousarray(pointers.data).view(np.int64).reshape(-1)
        if mask is not None and not mask.all():
            addresses = addresses[np.broadcast_to(mask, pointers.data.shape).reshape(-1)]
        if addresses.size == 0:
            return
        if width > 1 and (addresses % width).any():
            raise Misaligned(f"{kind} of {width} bytes at an address that is no multiple of {width}")
        origins = pointers.attr.get("origins", ())
        view = self._holder([self.views[name] for name in origins] or [*self.views.values(), *self.anonymous], addresses, width, kind)
        shadow = self.shadows.get(view.storage) if self.races and view else None
        if shadow is None or view is None:
            return
        cells = shadow.cells(addresses, width)
        if kind == "store" and not (cells[1:] > cells[:-1]).all() and np.unique(cells).size != cells.size:
            values, counts = np.unique(cells, return_counts=True)
            twice = int(values[counts > 1][0])
            raise DuplicateStore(f"two lanes of one store write {self._element(view, shadow, twice)}", tensor=view.name)
        found = shadow.others(kind, cells, program)
        if found is not None:
            conflict, deed = found
            cell = int(cells[conflict][0])
            did = {"load": "loads", "store": "stores", "atomic": "atomically updates"}[kind]
            how = {"stored": "stores", "loaded": "loads", "updated": "atomically updates"}[deed]
            text = f"race: this program {did} {self._element(view, shadow, cell)}, which another program of the launch {how}"
            raise Race(text, tensor=view.name, index=self._index(view, shadow, cell))

    def _holder(self, views: Sequence[View], addresses: NDArray[np.int64], width: int, kind: Access) -> View | None:
        """The view that all lanes lie in."""
        if not self.bounds:
            return next((view for view in views if (addresses >= view.storage).all()), None) if len(views) == 1 else None
        wrong = None
        for view in views:
            wrong = view.outside(addresses, width)
            if wrong is None:
                return view
        if len(views) > 1:
            # lanes may be spread over several tensors, for instance by tl.where between pointers
            left = np.ones(addresses.shape, np.bool_)
            for view in views:
                missing = view.outside(addresses, width)
                left &= False if missing is None else missing
            if not left.any():
                return None
            wrong = left
        lanes = 0 if wrong is None else int(wrong.sum())
        first = int(addresses[0] if wrong is None else addresses[wrong][0])
        nearest = min(views, key=lambda view: abs(first - view.start), default=None)
        if nearest is None:
            raise OutOfBounds(f"{kind} through a pointer, but no tensor was passed")
        index = (first - nearest.start) // nearest.itemsize
        place = "in a hole of" if nearest.low <= first - nearest.start < nearest.high else "outside"
        text = f"out of bounds: {lanes} of {addresses.size} lanes {kind} {place} {nearest}; the first is element {index} from its start"
        raise OutOfBounds(text, tensor=nearest.name, index=index)

    @staticmethod
    def _index(view: View, shadow: Shadow, cell: int) -> int:
        return (shadow.start + cell * shadow.cell - view.start) // view.itemsize

    def _element(self, view: View, shadow: Shadow, cell: int) -> str:
        return f"element {self._index(view, shadow, cell)} of {view}"


def _packed(axes: Sequence[tuple[int, int]]) -> bool:
    """Whether (stride, size) pairs fill their span without a hole."""
    expected = 1
    for stride, size in sorted(axes):
        if stride != expected:
            return False
        expected *= size
    return True


def tensors_in(name: str, argument: Any) -> dict[str, Tensor]:
    """Every tensor of an argument by a readable name: tuples, descriptors and reinterpreted tensors are opened."""
    if isinstance(argument, Tensor):
        return {name: argument}
    if isinstance(argument, tuple):
        return {key: tensor for i, inner in enumerate(argument) for key, tensor in tensors_in(f"{name}[{i}]", inner).items()}
    base = getattr(argument, "base", None)  # triton's TensorDescriptor and TensorWrapper
    return {name: base} if isinstance(base, torch.Tensor) else {}
