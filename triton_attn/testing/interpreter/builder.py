"""Triton's interpreter with its gaps filled: it computes bfloat16 and tf32 rightly, and looks at every access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import interpreter as plain

from triton_attn.testing.interpreter import formats
from triton_attn.testing.interpreter.faults import (
    AssertionFailed,
    FalsePromise,
    IntegerOverflow,
    InvalidDescriptor,
    Misaligned,
    OutOfBounds,
    SmallDot,
)
from triton_attn.testing.interpreter.handles import Handle, following, lanes_of, origins, poisoned, remember, spread
from triton_attn.testing.interpreter.memory import Access, Memory

_least_dot = nvidia.min_dot_size(GPUTarget("cuda", 80, 32))


def is_bfloat16(handle: Handle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def widened(handle: Handle) -> Handle:
    """bfloat16 as float32, anything else as it is."""
    return plain.TensorHandle(formats.widen(handle.data), tl.float32) if is_bfloat16(handle) else handle


def narrowed(handle: Handle) -> Handle:
    """A float32 result as bfloat16; a truth value stays one."""
    if handle.data.dtype == np.bool_:
        return plain.TensorHandle(handle.data, tl.int1)
    return plain.TensorHandle(formats.narrow(handle.data), tl.bfloat16)


def _on_bfloat16(name: str) -> Callable[..., Handle]:
    """The plain operation, computed in float32 and rounded once where it is given bfloat16."""
    operation = getattr(plain.InterpreterBuilder, name)

    def computed(self: Any, *handles: Any) -> Handle:
        if not any(isinstance(handle, plain.TensorHandle) and is_bfloat16(handle) for handle in handles):
            return operation(self, *handles)
        return narrowed(operation(self, *(widened(handle) if isinstance(handle, plain.TensorHandle) else handle for handle in handles)))

    return computed


class StrictBuilder(plain.InterpreterBuilder):  # type: ignore[misc]
    """Takes the place of Triton's own while strictness is on; `memory` and `program` are the launch's."""

    memory: Memory | None = None
    program: int = 0
    tf32 = poison = overflow = True
    multiplied_in_tf32 = other_given = False

    # pointers know where they come from

    create_addptr = following("create_addptr")
    create_bitcast = create_int_to_ptr = create_ptr_to_int = following("create_bitcast")
    create_broadcast = following("create_broadcast")
    create_cat = following("create_cat")
    create_expand_dims = following("create_expand_dims")
    _gather = following("create_gather")
    create_join = following("create_join")
    create_reshape = following("create_reshape")
    create_split = following("create_split")
    create_trans = following("create_trans")
    create_unsplat = following("create_unsplat")

    def create_gather(self, src: Handle, indices: Handle, axis: int) -> Handle:
        found, size = indices.data, src.data.shape[axis]
        wrong = found[(found < 0) | (found >= size)]
        if wrong.size:
            raise OutOfBounds(f"tl.gather of {wrong.flat[0]} along an axis of {size}", index=int(wrong.flat[0]))
        return self._gather(src, indices, axis)

    def create_splat(self, ret_ty: Any, arg: Handle) -> Handle:
        result = super().create_splat(ret_ty, arg)
        remember(result, origins((arg,)))
        return spread(result, arg)

    def create_select(self, cond: Handle, lhs: Handle, rhs: Handle) -> Handle:
        result = super().ternary_op(cond, lhs, rhs, np.where)  # bits are chosen, whatever they mean
        remember(result, origins((lhs, rhs)))
        if poisoned(lhs) is not None or poisoned(rhs) is not None:
            result.attr["poisoned"] = np.where(cond.data, lanes_of(lhs).data, lanes_of(rhs).data)
        return result

    # memory

    def _touch(self, kind: Access, pointers: Handle, mask: Any) -> None:
        if self.memory is not None:
            width = plain._get_np_dtype(pointers.get_element_ty()).itemsize
            self.memory.touch(kind, pointers, mask if mask is None else np.asarray(mask.data), width, self.program)

    def create_masked_load(self, ptrs: Handle, mask: Any, other: Handle | None, *cache: Any, **named: Any) -> Handle:
        self._touch("load", ptrs, mask)
        return self._load(ptrs, mask, other, *cache, **named)

    def _load(self, ptrs: Handle, mask: Any, other: Handle | None, *cache: Any, **named: Any) -> Handle:
        if other is None and not self.other_given and self.poison and not np.asarray(mask.data).all():
            element = ptrs.get_element_ty()
            data = formats.poison(plain._get_np_dtype(element), ptrs.data.shape, element == tl.bfloat16)
            other = plain.TensorHandle(data, element)
            result = super().create_masked_load(ptrs, mask, other, *cache, **named)
            if data.dtype.kind in "iu" and element.is_int():
                result.attr["poisoned"] = ~np.broadcast_to(np.asarray(mask.data), data.shape)
            return result
        return super().create_masked_load(ptrs, mask, other, *cache, **named)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Any, *cache: Any) -> Any:
        self._touch("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *cache)

    def create_atomic_load(self, ptr: Handle, mask: Handle, sem: Any, scope: Any) -> Handle:
        self._touch("atomic", ptr, mask)
        return self._load(ptr, mask, None, None, True)

    def create_atomic_store(self, ptr: Handle, val: Handle, mask: Handle, sem: Any, scope: Any) -> Any:
        self._touch("atomic", ptr, mask)
        return super().create_masked_store(ptr, val, mask, None)

    def create_atomic_poll(self, ptr: Handle, *rest: Any) -> Handle:
        self._touch("atomic", ptr, None)
        memory, self.memory = self.memory, None  # it waits by plain loads
        try:
            return super().create_atomic_poll(ptr, *rest)
        finally:
            self.memory = memory

    def create_atomic_cas(self, ptr: Handle, cmp: Handle, val: Handle, sem: Any, scope: Any) -> Handle:
        self._touch("atomic", ptr, None)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_atomic_rmw(self, rmwOp: Any, ptr: Handle, val: Handle, mask: Handle, sem: Any, scope: Any) -> Handle:
        self._touch("atomic", ptr, mask)
        if rmwOp == plain._ir.ATOMIC_OP.FADD and is_bfloat16(val):
            return self._updated(ptr, val, mask, np.add)
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def _updated(self, ptr: Handle, val: Handle, mask: Handle, combine: Callable[..., Any]) -> Handle:
        """One lane after the other, since lanes may share an address; Triton's own knows no bfloat16, and of float16 only sums."""
        kind = val.data.dtype
        before = np.zeros(ptr.data.shape, kind)
        for lane in np.ndindex(ptr.data.shape):
            if mask.data[lane]:
                here, always = ptr.data[lane].reshape(1), np.ones(1, np.bool_)
                before[lane] = plain._interpreter.load(here, always, np.zeros(1, kind), kind)[0]
                old, new = (widened(plain.TensorHandle(x[lane].reshape(1), val.dtype.scalar)).data for x in (before, val.data))
                after = combine(old, new)
                plain._interpreter.store(here, formats.narrow(after) if is_bfloat16(val) else after, always)
        return plain.TensorHandle(before, val.dtype.scalar)

    def create_descriptor_reduce(self, kind: Any, desc: Any, value: Handle, indices: Any) -> None:
        """A descriptor's atomic update, which Triton's own interpreter lacks."""
        pointers, mask = desc.materialize_pointers(indices)
        element, name = value.dtype.scalar, kind.name
        if element.is_floating() and name != "ADD":  # the language lets these pass in 16 bits alone
            self._touch("atomic", pointers, mask)
            self._updated(pointers, value, mask, {"MIN": np.fmin, "MAX": np.fmax}[name])
            return
        letter = "F" if element.is_floating() else "U" if element.is_int_unsigned() and name in ("MIN", "MAX") else ""
        operation = getattr(plain._ir.ATOMIC_OP, letter + name)
        self.create_atomic_rmw(operation, pointers, value, mask, plain._ir.MEM_SEMANTIC.RELAXED, plain._ir.MEM_SYNC_SCOPE.GPU)

    def create_make_tensor_descriptor(self, base: Handle, shape: Any, strides: Any, *rest: Any) -> Any:
        width = base.dtype.element_ty.primitive_bitwidth // 8
        if base.data.item() % 16:
            raise Misaligned("a tensor descriptor's base is no multiple of 16 bytes", tensor=", ".join(origins((base,))))
        for axis, stride in enumerate(strides[:-1]):
            if stride.data.item() * width % 16:
                text = f"a tensor descriptor's stride {axis} is {stride.data.item() * width} bytes, no multiple of 16"
                raise Misaligned(text, tensor=", ".join(origins((base,))))
        for axis, size in enumerate(shape):
            if not 1 <= size.data.item() <= 2**32:
                text = f"a tensor descriptor's axis {axis} is {size.data.item()}; CUDA takes 1 to 2**32"
                raise InvalidDescriptor(text, tensor=", ".join(origins((base,))))
        descriptor = super().create_make_tensor_descriptor(base, shape, strides, *rest)
        located = descriptor.materialize_pointers

        def materialize_pointers(offsets: Any) -> Any:
            if int(offsets[-1].data.item()) * width % 16:
                text = f"a block starts at column {offsets[-1].data.item()}, no multiple of 16 bytes"
                raise Misaligned(text, tensor=", ".join(origins((base,))))
            pointers, mask = located(offsets)
            remember(pointers, origins((base,)))
            return pointers, mask

        descriptor.materialize_pointers = materialize_pointers
        return descriptor

    def create_descriptor_load(self, desc: Any, indices: Any, *cache: Any) -> Handle:
        result = super().create_descriptor_load(desc, indices, *cache)
        if is_bfloat16(result) and desc.padding == plain._ir.PADDING_OPTION.PAD_NAN:
            _, there = desc.materialize_pointers(indices)
            result.data = np.where(there.data, result.data, np.uint16(formats.BFLOAT16_NAN))
        return result

    # Triton 3.6 has block pointers still

    def create_make_block_ptr(self, base: Handle, *rest: Any) -> Any:
        return self._located(super().create_make_block_ptr(base, *rest))

    def create_advance(self, ptr: Any, offsets: Any) -> Any:
        return self._located(super().create_advance(ptr, offsets))

    @staticmethod
    def _located(block: Any) -> Any:
        located = block.materialize_pointers

        def materialize_pointers(boundary_check: Any) -> Any:
            pointers, mask = located(boundary_check)
            remember(pointers, origins((block.base,)))
            return pointers, mask

        block.materialize_pointers = materialize_pointers
        return block

    # promises

    def create_assert(self, condition: Handle, message: str) -> None:
        wrong = ~np.asarray(condition.data, np.bool_)
        if wrong.any():
            raise AssertionFailed(f"device_assert failed in {int(wrong.sum())} of {wrong.size} lanes: {message}")

    def create_assume(self, condition: Handle) -> None:
        if not np.asarray(condition.data, np.bool_).all():
            raise FalsePromise("tl.assume of what does not hold")

    # numbers

    create_fma = _on_bfloat16("create_fma")
    create_clampf = _on_bfloat16("create_clampf")
    create_erf = _on_bfloat16("create_erf")
    create_rsqrt = _on_bfloat16("create_rsqrt")
    unary_op = _on_bfloat16("unary_op")

    def binary_op(self, lhs: Handle, rhs: Handle, op: Any) -> Handle:
        if lhs.dtype.scalar.is_fp8():
            raise TypeError(f"arithmetic in {lhs.dtype.scalar}, which the compiler refuses: cast to float32 first")
        if not is_bfloat16(lhs):
            result = super().binary_op(lhs, rhs, op)
            if result.data.dtype == np.bool_:
                result.dtype = tl.int1  # Triton leaves that of the operands, in which a splat would hold the truth value
            return spread(result, lhs, rhs)
        return narrowed(super().binary_op(widened(lhs), widened(rhs), op))

    def cast_impl(self, src: Handle, dst_type: Any) -> Handle:
        return spread(self._cast(src, dst_type), src)

    def _cast(self, src: Handle, dst_type: Any) -> Handle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return super().cast_impl(src, dst_type)
        if target == tl.bfloat16:
            return narrowed(plain.TensorHandle(src.data.astype(np.float32), tl.float32))
        return super().cast_impl(widened(src), dst_type) if target != tl.float32 or source != tl.bfloat16 else widened(src)

    def create_fp_to_fp(self, src: Handle, dst_type: Any, rounding_mode: Any) -> Handle:
        nearest = rounding_mode is None or rounding_mode == plain._ir.ROUNDING_MODE.RTNE
        source, target = src.dtype.scalar, dst_type.scalar
        if source.name in formats.FLOAT8:
            return self.cast_impl(plain.TensorHandle(formats.widen_float8(src.data, source.name), tl.float32), dst_type)
        if target.name in formats.FLOAT8 and nearest:
            wide = widened(src).data
            return plain.TensorHandle(formats.narrow_float8(wide, target.name), target)
        if tl.bfloat16 in (source, target) and nearest:
            return self.cast_impl(src, dst_type)
        if (source, target) == (tl.float32, tl.bfloat16):
            return plain.TensorHandle(formats.narrow(src.data, nearest=False), tl.bfloat16)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def get_bf16(self, value: float) -> Handle:
        return narrowed(self.get_fp32(value))

    def create_dot(self, a: Handle, b: Handle, d: Handle, input_precision: Any, max_num_imprecise_acc: Any) -> Handle:
        (m, k), n = a.data.shape[-2:], b.data.shape[-1]
        least = _least_dot(a.dtype, b.dtype)
        if m < least[0] or n < least[1] or k < least[2]:
            wanted = "M {}, N {}, K {}".format(*least)
            raise SmallDot(f"tl.dot of {m} x {k} and {k} x {n} in {a.dtype}: the compiler wants at least {wanted}")
        if self.tf32 and a.dtype.scalar == tl.float32 and input_precision == plain._ir.INPUT_PRECISION.TF32:
            self.multiplied_in_tf32 = True
            a, b = (plain.TensorHandle(formats.tf32(x.data), tl.float32) for x in (a, b))
        result = super().create_dot(widened(a), widened(b), widened(d), input_precision, max_num_imprecise_acc)
        return narrowed(result) if is_bfloat16(d) else result


def check_overflow(semantic: Any, lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
    """In place of Triton's own check, which interprets nine operations for each sum."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64 or kind.is_int_unsigned():
        return  # what is unsigned wraps by definition: hashes and packed keys count on it
    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    exact = compute(lhs.handle.data, rhs.handle.data, dtype=np.int64)
    for handle in (lhs.handle, rhs.handle):
        if (lanes := poisoned(handle)) is not None:
            exact = np.where(lanes, 0, exact)
    require_fit(
        exact,
        kind,
        f"{operation.__name__} gives",
        f"; a wrap that is meant is `tl.{operation.__name__}(..., sanitize_overflow=False)`",
    )


def require_fit(exact: NDArray[np.int64], kind: Any, gives: str, hint: str = "") -> None:
    """IntegerOverflow unless integers computed in 64 bits fit their type."""
    low, high = kind.get_int_min_value(), kind.get_int_max_value()
    if exact.size and (exact.min() < low or exact.max() > high):
        worst = exact.max() if exact.max() > high else exact.min()
        raise IntegerOverflow(f"{kind} overflow: {gives} {worst}, outside {low}..{high}{hint}")
