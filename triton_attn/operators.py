"""torch operators made from the rows: schema, fake, autograd, vmap and FLOP formulas. Free of triton until a kernel runs.

Each row gives two operators, `triton_attn::<name>` and `triton_attn::<name>_backward`, opaque to the compiler, and two
autograd functions around them: torch.func and torch.compile need one with `setup_context`, which costs an eager call three
times as much as one without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_attn import arguments, device, dispatch, flops
from triton_attn.mechanism import Mechanism, Options, Tensors

NAMESPACE = "triton_attn"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_OPERATORS: dict[str, Operator] = {}
# `triton_attn.autotune` sets it while it is on. No thread-local: autograd has threads of its own
before_kernel: Callable[[Mechanism, Tensors, Options], None] | None = None


def define(rows: Sequence[Mechanism]) -> None:
    """Make the operators of the catalogue's rows."""
    for row in rows:
        _OPERATORS[row.name] = Operator(row)


def operator(row: Mechanism) -> Operator:
    """The operators of a row."""
    return _OPERATORS[row.name]


def draw_seed(where: torch.device) -> Tensor:
    """One int64 from torch's generator of the device: checkpointing replays it, manual_seed fixes it."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=where)


def run(row: Mechanism, tensors: dict[str, Any], options: Options, more: bool) -> Any:
    """Run a checked call by whatever dispatch chooses: the first output, or with `more` all of them."""
    first = next(iter(tensors.values()))
    kind = first.device.type
    cast = arguments.autocast_dtype(kind)
    if cast is not None:
        tensors = arguments.autocast(row, tensors, cast)
    if dispatch.explaining():
        dispatch.stop_and_explain(row, tensors, options)
    path = dispatch.choose(row, tensors, options)
    if options.get("dropout_p"):
        # after everything that can refuse the call: a refused one leaves the generator alone
        tensors["seed"] = draw_seed(first.device)
    if path == "kernel":
        outputs = _OPERATORS[row.name](tensors, options)
        return outputs if more else outputs[0]
    if path == "portable" and first.is_cuda:
        dispatch.warn_once(row, tensors, options)
    function = row.portable if path == "portable" else row.reference
    if cast is not None:
        # inputs are cast already; nothing inside may be cast again
        with torch.autocast(kind, enabled=False):
            return function(**tensors, **options, **{row.more: more})
    return function(**tensors, **options, **{row.more: more})


class Operator:
    """The forward and backward operators of one row, and the differentiable call."""

    def __init__(self, row: Mechanism) -> None:
        self.row = row
        self.inputs, self.options = tuple(row.inputs), tuple(row.options)
        inputs = ", ".join(f"Tensor{'' if given.required else '?'} {name}" for name, given in row.inputs.items())
        options = "".join(f", {kind} {name}" for name, kind in row.options.items())
        grads = ", ".join(f"Tensor? grad_{name}" for name in row.outputs)
        outputs = ", ".join(f"Tensor {name}" for name in row.outputs)
        returned = ", ".join("Tensor" for _ in row.outputs)
        gradients = ", ".join(["Tensor"] * max(len(row.differentiable), 2))
        self.forward = self._define(row.name, f"({inputs}{options}) -> ({returned})", self._run, self._fake)
        self.backward = self._define(
            f"{row.name}_backward",
            f"({grads}, {inputs}, {outputs}{options}, bool[] needs) -> ({gradients})",
            self._run_backward,
            self._fake_backward,
        )
        self._register_vmap()
        self._register_flops()
        self.eager, self.transformable = _functions(self)

    def __call__(self, tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        args = (*(tensors[name] for name in self.inputs), *(options[name] for name in self.options))
        if _transforming():
            if torch.compiler.is_compiling():
                # Dynamo would run the forward operator alone, and its derivative would be lost
                torch._dynamo.graph_break(msg="torch.func around an autograd function")
            return self.transformable.apply(*args)  # type: ignore[no-any-return,no-untyped-call]
        if not (torch.is_grad_enabled() and any(_requires_grad(tensors[name]) for name in self.row.differentiable)):
            return self.forward(*args)  # type: ignore[no-any-return]
        if torch.compiler.is_compiling():
            # Dynamo refuses one tensor in two places
            distinct = [x.view_as(x) if isinstance(x, Tensor) and any(x is y for y in args[:i]) else x for i, x in enumerate(args)]
            return self.transformable.apply(*distinct)  # type: ignore[no-any-return,no-untyped-call]
        return self.eager.apply(*args)  # type: ignore[no-any-return,no-untyped-call]

    def _define(self, name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload[..., Any]:
        _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, run, key)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        return packet.default  # type: ignore[no-any-return]

    def _named(self, args: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        split = len(self.inputs)
        return dict(zip(self.inputs, args[:split], strict=True)), dict(zip(self.options, args[split:], strict=True))

    def _run(self, *args: Any) -> tuple[Tensor, ...]:
        tensors, options = self._named(args)
        kernel = dispatch.pick(self.row, tensors, options)
        with device.guard(args[0]):
            if before_kernel is not None:
                before_kernel(self.row, tensors, options)
            return kernel.load().forward(**tensors, **options, **{self.row.more: True})  # type: ignore[no-any-return]

    def _run_backward(self, *args: Any) -> tuple[Tensor, ...]:
        grads, tensors, saved, options, needs = self._split_backward(args)
        # the variants share one backward; the row's most general kernel has it
        code = self.row.kernels[-1].load()
        with device.guard(args[len(grads)]):
            computed = code.backward(*grads, **tensors, **saved, **options, needs=tuple(needs))
        if all(needs):
            return _two(computed)
        # as the fake says; and an operator may not return one tensor twice
        return _two(tuple(gradient if need else gradient.new_empty(0) for gradient, need in zip(computed, needs, strict=True)))

    def _split_backward(self, args: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any], dict[str, Any], dict[str, Any], Sequence[bool]]:
        first = len(self.row.outputs)
        second = first + len(self.inputs)
        third = second + first
        saved = dict(zip(self.row.outputs, args[second:third], strict=True))
        tensors, options = self._named((*args[first:second], *args[third:-1]))
        return args[:first], tensors, saved, options, args[-1]

    def _fake(self, *args: Any) -> tuple[Tensor, ...]:
        tensors = dict(zip(self.inputs, args, strict=False))
        sizes = self._sizes(dict(zip((*self.inputs, *self.options), args, strict=False)))
        like = args[0]
        empty = []
        for given in self.row.outputs.values():
            dtype = torch.float32 if given.dtype == "float32" else like.dtype
            shape = [sizes[axis] for axis in given.axes.split()]
            empty.append(torch.empty_like(tensors[given.ordered_as]) if given.ordered_as else like.new_empty(shape, dtype=dtype))
        return tuple(empty)

    def _fake_backward(self, *args: Any) -> tuple[Tensor, ...]:
        _, tensors, _, _, needs = self._split_backward(args)
        like = next(iter(tensors.values()))
        return _two(
            tuple(
                (torch.empty_like(tensors[name]) if self.row.inputs[name].ordered else tensors[name].new_empty(tensors[name].shape))
                if need
                else like.new_empty(0)
                for name, need in zip(self.row.differentiable, needs, strict=True)
            )
        )

    def _sizes(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        sizes: dict[str, Any] = {}
        for name, given in self.row.inputs.items():
            if given.required or (given.kind in ("values", "offsets") and shapes[name] is not None):
                sizes.update(zip(given.axes.split(), getattr(shapes[name], "shape", shapes[name]), strict=True))
        sizes.update(self.row.derived(sizes, shapes))
        return sizes

    def _register_vmap(self) -> None:
        """A mapped axis is folded into the batch, and taken out of the results; a loop, where something has no batch."""
        if any(given.kind == "values" and not given.axes.startswith("b ") for given in self.row.inputs.values()):
            for operator in (self.forward, self.backward):
                torch.library.register_vmap(operator, _looping(operator), lib=_LIBRARY)
            return
        axes = [given.axes for given in self.row.inputs.values()]
        outputs = [given.axes for given in self.row.outputs.values()]
        for operator, all_axes, first in ((self.forward, axes, 0), (self.backward, outputs + axes + outputs, len(outputs))):
            torch.library.register_vmap(operator, _folding(operator, all_axes, first), lib=_LIBRARY)

    def _register_flops(self) -> None:
        def forward_flops(*shapes: Any, **kwargs: Any) -> int:
            named = dict(zip((*self.inputs, *self.options), shapes, strict=False))
            return int(self.row.work(self._sizes(named), named, 2).flops)

        def backward_flops(*shapes: Any, **kwargs: Any) -> int:
            first = len(self.row.outputs)
            inputs = shapes[first : first + len(self.inputs)]
            return int(forward_flops(*inputs, *shapes[2 * first + len(self.inputs) :]) * self.row.backward_share)

        for operator, formula in ((self.forward, forward_flops), (self.backward, backward_flops)):
            flops.register(operator.overloadpacket, formula)


def _functions(operator: Operator) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    forward, backward = operator.forward, operator.backward
    split = len(operator.inputs)
    positions = tuple(operator.inputs.index(name) for name in operator.row.differentiable)
    constant = tuple(i for i, given in enumerate(operator.row.outputs.values()) if not given.differentiable)

    def save(ctx: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        ctx.save_for_backward(*args[:split], *outputs)
        ctx.options = args[split:]
        ctx.mark_non_differentiable(*(outputs[i] for i in constant))
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * (split + len(ctx.options))
        if all(grad is None for grad in grads):
            return tuple(result)
        needs = [ctx.needs_input_grad[position] for position in positions]
        # a plain backward pass goes straight to the operator
        watched = _transforming() or (torch.is_grad_enabled() and not torch.compiler.is_compiling())
        computed = (Last.apply if watched else backward)(*grads, *ctx.saved_tensors, *ctx.options, needs)  # type: ignore[no-untyped-call]
        for position, needed, gradient in zip(positions, needs, computed[: len(needs)], strict=True):
            result[position] = gradient if needed else None
        return tuple(result)

    class Last(torch.autograd.Function):
        """The backward operator where its results may be differentiated again, which `once_differentiable` would not always see."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return backward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise dispatch.Unsupported(f"{operator.row.name}: kernels differentiate once, not twice; use_backend('reference') does")

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = forward(*args)
            save(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return forward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

    return Eager, Transformable


def _two(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An empty vector beside a single gradient: torch takes a tuple of one for the tensor itself."""
    return gradients if len(gradients) > 1 else (*gradients, gradients[0].new_empty(0))


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _transforming() -> bool:
    """Whether torch.func or forward-mode differentiation is looking."""
    return bool(torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0)


def _looping(operator: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        calls = []
        for i in range(info.batch_size):
            # options have no dimension, lists of them a list of none
            calls.append(operator(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True))))
        return tuple(torch.stack(same) for same in zip(*calls, strict=True)), (0,) * len(calls[0])

    return rule


def _folding(operator: Callable[..., Any], all_axes: Sequence[str], first: int) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        count = info.batch_size
        batch = (args[first] if in_dims[first] is None else args[first].select(in_dims[first], 0)).shape[0]
        folded = [
            _fold(tensor, dim, axes, count, batch, info.randomness)
            for tensor, dim, axes in zip(args[: len(all_axes)], in_dims, all_axes, strict=False)
        ]
        results = operator(*folded, *args[len(all_axes) :])
        # an empty vector stands for a gradient nobody needs
        dims = tuple(None if result.shape == (0,) else 0 for result in results)
        return tuple(x if dim is None else x.unflatten(0, (count, x.shape[0] // count)) for x, dim in zip(results, dims, strict=True)), dims

    return rule


def _fold(tensor: Tensor | None, dim: int | None, axes: str, count: int, batch: int, randomness: str) -> Tensor | None:
    if tensor is None:
        return None
    if not axes:  # the seed: entries differ by batch index anyhow
        if randomness == "same":
            raise dispatch.Unsupported("vmap(randomness='same') with dropout: use 'different'")
        return tensor if dim is None else tensor.select(dim, 0)
    if dim is None:
        if tensor.shape[0] == 1 and len(tensor.shape) == 4 and axes.endswith("m n"):
            return tensor
        tensor, dim = tensor.expand(count, *tensor.shape), 0
    mapped = tensor.movedim(dim, 0)
    if mapped.shape[1] != batch:  # one mask for the whole batch
        mapped = mapped.expand(count, batch, *mapped.shape[2:])
    return mapped.flatten(0, 1)
