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
        if self.covered is None and offsets.min() >= self.low and offsets.max() + width <= self.high:
            return None
        wrong = (offsets < self.low) | (offsets + width > self.high)
        if self.covered is not None:
            for past in range(0, width, self.itemsize):
                wrong |= ~self.covered[np.clip((offsets + past) // self.itemsize, 0, self.covered.size - 1)]
        return wrong if wrong.any() else None

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
        self.views = {name: View(name, tensor, bounds or "storage") for name, tensor in tensors.items()}
        self.anonymous = [View(f"reachable[{i}]", tensor, bounds or "storage") for i, tensor in enumerate(also)]
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
        origins = pointers.attr.get("origins", ()) if self.bounds else ()
        views = [self.views[name] for name in origins] or [*self.views.values(), *self.anonymous]
        if width > 1 and (addresses % width).any():
            name, index, _ = _place(views, int(addresses[addresses % width != 0][0]))
            raise Misaligned(f"{kind} of {width} bytes at an address that is no multiple of {width}", tensor=name, index=index)
        for view, held in self._holders(kind, views, addresses, width):
            if view.storage in self.shadows:
                self._remember(kind, view, self.shadows[view.storage], held, width, program)

    def _holders(
        self, kind: Access, views: Sequence[View], addresses: NDArray[np.int64], width: int
    ) -> list[tuple[View, NDArray[np.int64]]]:
        """The views that the lanes lie in, and which lanes: one view, unless tl.where chose between pointers."""
        found: list[tuple[View, NDArray[np.int64]]] = []
        left = addresses
        for view in views:
            wrong = view.outside(left, width)
            if wrong is None:
                return [*found, (view, left)]
            if not wrong.all():
                found.append((view, left[~wrong]))
                left = left[wrong]
        if self.bounds:
            name, index, place = _place(views, int(left[0]))
            raise OutOfBounds(f"out of bounds: {left.size} of {addresses.size} lanes {kind} {place}", tensor=name, index=index)
        return found

    def _remember(self, kind: Access, view: View, shadow: Shadow, addresses: NDArray[np.int64], width: int, program: int) -> None:
        """Race or DuplicateStore where two programs, or two lanes of a store, meet."""
        cells = shadow.cells(addresses, width)
        if kind == "store" and not (cells[1:] > cells[:-1]).all() and np.unique(cells).size != cells.size:
            values, counts = np.unique(cells, return_counts=True)
            index = self._index(view, shadow, int(values[counts > 1][0]))
            raise DuplicateStore(f"two lanes of one store write element {index} of {view}", tensor=view.name, index=index)
        found = shadow.others(kind, cells, program)
        if found is not None:
            conflict, deed = found
            index = self._index(view, shadow, int(cells[conflict][0]))
            did = {"load": "loads", "store": "stores", "atomic": "atomically updates"}[kind]
            how = {"stored": "stores", "loaded": "loads", "updated": "atomically updates"}[deed]
            text = f"race: this program {did} element {index} of {view}, which another program of the launch {how}"
            raise Race(text, tensor=view.name, index=index)

    @staticmethod
    def _index(view: View, shadow: Shadow, cell: int) -> int:
        return (shadow.start + cell * shadow.cell - view.start) // view.itemsize


def _place(views: Sequence[View], address: int) -> tuple[str, int | None, str]:
    """Name of the nearest tensor, the element of it, and both in words."""
    nearest = min(views, key=lambda view: abs(address - view.start), default=None)
    if nearest is None:
        return "", None, "through a pointer, but no tensor was passed"
    offset = address - nearest.start
    index = offset // nearest.itemsize
    place = "in a hole of" if nearest.low <= offset < nearest.high else "outside"
    return nearest.name, index, f"{place} {nearest}; the first is element {index} from its start"


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
