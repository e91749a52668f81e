"""Reductions and scans: bfloat16 in float32, and any combine function on whole slices instead of one element at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter as plain

from triton_attn.testing.interpreter.builder import narrowed, require_fit, widened
from triton_attn.testing.interpreter.handles import poisoned

Block = Any  # tl.tensor


class _Strict:
    """What reductions and scans share."""

    def apply(self: Any, input: Any) -> Any:
        if not isinstance(input, tuple):
            return self.apply((input,))[0]
        wide = tuple(_wide(block) if block.dtype == tl.bfloat16 else block for block in input)
        results = super().apply(wide)  # type: ignore[misc]
        # an index beside a value, or a value by itself: only what was bfloat16 becomes it again
        return tuple(
            _narrow(result) if i < len(input) and input[i].dtype == tl.bfloat16 and result.dtype == tl.float32 else result
            for i, result in enumerate(results)
        )

    def combined(self: Any, left: Sequence[NDArray[Any]], right: Sequence[NDArray[Any]], like: Sequence[Block]) -> list[NDArray[Any]]:
        """The combine function on two tuples of slices."""
        blocks = [self.to_tensor(x, block.dtype) for x, block in [*zip(left, like, strict=True), *zip(right, like, strict=True)]]
        results = self.combine_fn(*blocks)
        results = results if isinstance(results, tuple) else (results,)
        return [np.broadcast_to(_data(result), x.shape).astype(x.dtype) for result, x in zip(results, right, strict=True)]


class StrictReduceOps(_Strict, plain.ReduceOps):  # type: ignore[misc]
    def sum(self, input: Block) -> Block:
        _fits(input, np.sum, axis=self.axis)
        return super().sum(input)

    def unravel(self, input: Sequence[Block], axis: int | None) -> tuple[Sequence[Block], int]:
        """Triton's own flattens only the first of several inputs."""
        if axis is not None:
            return input, axis
        return [self.to_tensor(block.handle.data.reshape(-1), block.dtype) for block in input], 0

    def generic_reduce(self, input: Sequence[Block]) -> list[Block]:
        blocks, axis = self.unravel(input, self.axis)
        slices = [np.moveaxis(block.handle.data, axis, 0) for block in blocks]
        total = [x[0] for x in slices]
        for i in range(1, len(slices[0])):
            total = self.combined(total, [x[i] for x in slices], blocks)
        if self.keep_dims:
            rank = len(input[0].handle.data.shape)
            total = [np.expand_dims(x, axis) if self.axis is not None else x.reshape((1,) * rank) for x in total]
        return [self.to_tensor(x if x.ndim else x.item(), block.dtype) for x, block in zip(total, blocks, strict=True)]


def _fits(input: Block, total: Callable[..., Any], **how: Any) -> None:
    """IntegerOverflow where a sum does not fit the type that it is summed in."""
    kind = input.dtype.scalar
    if plain.interpreter_builder.overflow and kind.is_int() and 8 <= kind.int_bitwidth < 64 and poisoned(input.handle) is None:
        require_fit(np.asarray(total(input.handle.data, dtype=np.int64, **how)), kind, "a sum gives")


class StrictScanOps(_Strict, plain.ScanOps):  # type: ignore[misc]
    def cumsum(self, input: Block) -> list[Block]:
        _fits(input, np.cumsum, axis=self.axis)
        return super().cumsum(input)  # type: ignore[no-any-return]

    def generic_scan(self, input: Sequence[Block]) -> list[Block]:
        slices = [np.moveaxis(block.handle.data, self.axis, 0) for block in input]
        running = [x[0] for x in slices]
        steps = [running]
        for i in range(1, len(slices[0])):
            running = self.combined(running, [x[i] for x in slices], input)
            steps.append(running)
        stacked = [np.stack([step[j] for step in steps], self.axis) for j in range(len(input))]
        return [self.to_tensor(x, block.dtype) for x, block in zip(stacked, input, strict=True)]


def _wide(block: Block) -> Block:
    return tl.core.tensor(widened(block.handle), _like(block, tl.float32))


def _narrow(block: Block) -> Block:
    return tl.core.tensor(narrowed(block.handle), _like(block, tl.bfloat16))


def _like(block: Block, element: Any) -> Any:
    """The type of a block, or of a scalar, with other elements."""
    return tl.block_type(element, list(block.shape)) if block.shape else element


def _data(value: Any) -> NDArray[Any]:
    data = np.asarray(value.handle.data if isinstance(value, tl.core.tensor) else value)
    return data.reshape(()) if data.size == 1 else data  # a scalar of Triton's is an array of one
