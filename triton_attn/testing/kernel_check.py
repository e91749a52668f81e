"""Property-test anybody's kernel in one call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from torch import Tensor

from triton_attn.device import interpreting
from triton_attn.testing import inputs as drawing
from triton_attn.testing import numerics, strategies
from triton_attn.testing.interpreter import Record, StrictnessError, require_interpreter, strict_interpreter
from triton_attn.testing.sensitivity import sensitivity
from triton_attn.testing.unwritten import poisoned_memory

Draw = Callable[[Mapping[str, int], torch.Generator], Tensor]  # sizes by axis name, generator -> tensor
Choice = Any  # a strategy, a sequence to sample from, or one value


class CheckError(ValueError):
    """`check_kernel` was asked for something that cannot be checked; the message says what to pass instead."""


@dataclass(frozen=True)
class Call:
    """One drawn call. Its repr is what a failure shows."""

    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    dtype: torch.dtype
    layouts: Mapping[str, str]
    spread: float
    seed: int


@dataclass
class Checked:
    """What a check has seen: calls, kernel launches, the most programs of one, and per result the worst share of what is allowed."""

    calls: int = 0
    launches: int = 0
    programs: int = 0  # 0 on a GPU, where nobody counts
    worst: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in self.worst.items())
        alone = "; every launch was one program: larger `sizes` would show what several do" if self.programs == 1 else ""
        return f"{self.calls} calls, {self.launches} launches; worst share of what is allowed: {shares}{alone}"


def check_kernel(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, str | Draw],
    *,
    gradients: bool | Sequence[str] = True,
    sizes: Mapping[str, Choice] | None = None,
    options: Mapping[str, Choice] | None = None,
    where: Callable[[Mapping[str, int]], bool] = lambda sizes: True,
    dtypes: Sequence[torch.dtype] = strategies.DTYPES,
    layouts: Sequence[str] = drawing.LAYOUTS,
    spreads: Sequence[float] = (1.0, 0.1, 8.0, 64.0),
    products: Literal["ieee", "tf32"] = "ieee",
    bound: Callable[..., Mapping[str, Tensor]] | None = None,
    deterministic: bool = True,
    device: torch.device | str = "cpu",
    examples: int = 50,
    **strict: Any,
) -> Checked:
    """Compare a function that launches Triton kernels with its definition, on calls that hypothesis draws and shrinks.

    Each result x of a call must satisfy |x - truth| <= K u S + eta elementwise, `truth` being the reference in float64 and u the
    unit roundoff of the dtype (`triton_attn.testing.numerics`). Without `bound`,
    S is measured (`triton_attn.testing.sensitivity`).

    Args:
        function: called as `function(**inputs, **options)`; returns a tensor or a tuple of tensors.
        reference: the same call in plain PyTorch, in whatever dtype it is given.
        inputs: for each argument its axes, "b h m d", equal names being equal sizes; or a function (sizes, generator) -> tensor
            for indices, masks and the like, which stay as drawn.
        gradients: compare gradients too: of every floating input, of these, or of none.
        sizes: for an axis a strategy, a sequence to sample, or a number; else 1 to 48, biased to the edges of tiles.
        options: further keyword arguments, likewise.
        where: keeps only sizes for which it is true.
        dtypes, layouts, spreads: of the drawn tensors. Layouts are names in `triton_attn.testing.inputs.LAYOUTS`.
        products: how exact those of float32 are meant to be; "tf32", which is `tl.dot`'s default, allows 2**-10 instead of 2**-24.
        bound: bound(**inputs in float64, **options, grad_0=..., ...) -> S by result name ("0", "1", ... and "grad <input>").
        deterministic: on a CPU the forward pass must give the same bits with its programs in another order.
        device: "cpu" runs under the strict interpreter, "cuda" for real.
        examples: how many calls.
        strict: settings of `strict_interpreter`, for instance races=False.

    Returns:
        What was seen; `print` it.

    Raises:
        AssertionError: the kernel is wrong, gives another dtype than the reference or a narrower one, or leaves some of `torch.empty`
            unwritten, which is full of NaN on a CPU; the message shows the smallest call found, every share, the worst element. A subclass
            of KernelFault if it did what a GPU does not forgive.
        CheckError: no kernel was launched, a signature does not fit, or axes do not parse.
        StrictnessError: on a CPU, if Triton is not interpreting.
    """
    options = dict(options or {})
    check = _Check(function, reference, inputs, gradients, bound, deterministic, torch.device(device), strict, products)
    check.validate(options)
    _validate_choices(dtypes, layouts, products)
    if check.device.type == "cpu":
        require_interpreter()
    elif interpreting():
        raise StrictnessError(f"device={str(device)!r} is for kernels that run for real, but TRITON_INTERPRET=1 is set; unset it")
    axes = {axis for given_axes in check.axes.values() for axis in given_axes}
    drawn_sizes = st.fixed_dictionaries(
        {axis: _choice((sizes or {}).get(axis, strategies.edges())) for axis in sorted(axes | set(sizes or {}))}
    )
    calls = st.builds(
        Call,
        sizes=drawn_sizes.filter(where),
        options=st.fixed_dictionaries({name: _choice(choice) for name, choice in options.items()}),
        dtype=strategies.dtypes(dtypes),
        layouts=st.fixed_dictionaries({name: st.sampled_from(list(layouts)) for name in check.axes}),
        spread=st.sampled_from(list(spreads)),
        seed=st.integers(0, 2**16),
    )

    # the explain phase traces every line: minutes for an interpreted kernel
    phases = (Phase.explicit, Phase.generate, Phase.shrink)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,  # several would come as a group, which no `except AssertionError` meets
    )
    @given(call=calls)
    def property_of_kernel(call: Call) -> None:
        check.run(call)

    try:
        property_of_kernel()
    except Unsatisfiable:
        raise CheckError("where is never true for the sizes that are drawn; widen sizes, or where") from None
    if check.device.type == "cpu" and not check.seen.launches:
        raise CheckError(f"{_name(function)} launched no Triton kernel in {check.seen.calls} calls; pass the function that launches it")
    return check.seen


@dataclass
class _Check:
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Mapping[str, str | Draw]
    gradients: bool | Sequence[str]
    bound: Callable[..., Mapping[str, Tensor]] | None
    deterministic: bool
    device: torch.device
    strict: Mapping[str, Any]
    products: str
    axes: dict[str, list[str]] = field(default_factory=dict)
    seen: Checked = field(default_factory=Checked)

    def validate(self, options: Mapping[str, Any]) -> None:
        if not isinstance(self.inputs, Mapping):
            raise CheckError(f'inputs is {self.inputs!r}; it maps each tensor argument to its axes, for instance {{"x": "rows columns"}}')
        for given_function, role in ((self.function, "function"), (self.reference, "reference")):
            if hasattr(given_function, "rewrite") or hasattr(given_function, "warmup"):
                raise CheckError(f"{role} is a Triton kernel, which needs a grid; pass the Python function that launches it")
            if not callable(given_function):
                raise CheckError(f"{role} is {given_function!r}, which cannot be called")
            try:
                inspect.signature(given_function).bind(**dict.fromkeys([*self.inputs, *options]))
            except ValueError:
                raise CheckError(f"{role} {_name(given_function)} tells no signature; wrap it, for instance in lambda x: ...") from None
            except TypeError as error:
                raise CheckError(f"{role} {_name(given_function)} cannot take {', '.join([*self.inputs, *options])}: {error}") from None
        if not self.inputs:
            raise CheckError('inputs is empty; name each tensor argument with its axes, for instance {"x": "rows columns"}')
        for name, axes in self.inputs.items():
            if callable(axes):
                continue
            if not isinstance(axes, str) or not re.fullmatch(r"\s*([A-Za-z_]\w*\s*)*", axes):
                raise CheckError(f'inputs[{name!r}] is {axes!r}; it wants axis names separated by spaces, for instance "b h m d"')
            self.axes[name] = axes.split()
        if not isinstance(self.gradients, bool) and (unknown := set(self.gradients) - set(self.axes)):
            raise CheckError(f"gradients names {', '.join(sorted(unknown))}; the drawn inputs are {', '.join(self.axes)}")

    def run(self, call: Call) -> None:
        generator = torch.Generator().manual_seed(call.seed)
        tensors: dict[str, Tensor] = {}
        for name, axes in self.inputs.items():
            if callable(axes):
                drawn = axes(call.sizes, generator)
                if not isinstance(drawn, Tensor):
                    raise CheckError(f"inputs[{name!r}] gives {type(drawn).__name__}; it wants (sizes, generator) -> tensor")
                tensors[name] = drawn.to(self.device)
            else:
                values = (torch.randn([call.sizes[axis] for axis in self.axes[name]], generator=generator) * call.spread).to(call.dtype)
                tensors[name] = drawing.laid_out(values, call.layouts[name]).to(self.device)
        wanted = [name for name in self.axes if self.gradients is True or (self.gradients and name in self.gradients)]
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        on_cpu = self.device.type == "cpu"
        with (
            strict_interpreter(**self.strict) if on_cpu else nullcontext(Record()) as record,
            poisoned_memory() if on_cpu else nullcontext(),
        ):
            outputs = self._outputs(self.function, tensors, call, wanted)
            grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
            found = [*outputs, *self._gradients(outputs, grads, wanted)]
        self.seen.launches += record.launches
        self.seen.calls += 1
        self.seen.programs = max(self.seen.programs, record.programs)
        for name, tensor in before.items():
            if not torch.equal(tensor.nan_to_num(), tensors[name].detach().nan_to_num()):
                raise AssertionError(f"{call}\nthe call changed its input {name}")
        if self.deterministic and self.device.type == "cpu":
            with strict_interpreter(**{**self.strict, "order": call.seed}), poisoned_memory(), torch.no_grad():
                for i, (x, again) in enumerate(zip(outputs, self._outputs(self.function, tensors, call, []), strict=True)):
                    if not torch.equal(x.detach().nan_to_num(), again.nan_to_num()):
                        said = "has other bits when the programs run in another order; atomics may, with deterministic=False"
                        raise AssertionError(f"{call}\nresult {i} {said}")
        self._judge(call, tensors, grads, found, wanted, record.tf32)

    def _judge(
        self, call: Call, tensors: Mapping[str, Tensor], grads: Sequence[Tensor], found: Sequence[Tensor], wanted: list[str], tf32: bool
    ) -> None:
        wide = {name: x.detach().double() if name in self.axes else x for name, x in tensors.items()}
        wide_grads = [grad.double() for grad in grads]

        def everything(grads: Sequence[Tensor], **arguments: Tensor) -> list[Tensor]:
            outputs = self._outputs(self.reference, arguments, call, wanted)
            if len(outputs) != len(grads):
                raise CheckError(f"the function returns {len(grads)} tensors, the reference {len(outputs)}")
            return [x.detach() for x in (*outputs, *self._gradients(outputs, grads, wanted))]

        truth = everything(wide_grads, **wide)
        names = [str(i) for i in range(len(grads))] + [f"grad {name}" for name in wanted]
        if self.bound is not None:
            given_grads = {f"grad_{i}": grad for i, grad in enumerate(wide_grads)}
            by_name = self.bound(**wide, **call.options, **given_grads)
            sizes = [by_name[name] for name in names]
        else:
            sizes = sensitivity(partial(everything, wide_grads), wide, truth, seed=call.seed)
        yardstick = everything(grads, **{name: x.detach() for name, x in tensors.items()})
        comparisons = []
        for name, x, true, size, naive in zip(names, found, truth, sizes, yardstick, strict=True):
            if _narrower(x.dtype, naive.dtype):
                raise AssertionError(f"{call}\nresult {name} is of {x.dtype}, where the reference gives {naive.dtype}")
            dtype = x.dtype if x.dtype in numerics.ROUNDOFF else call.dtype
            unit = max(dtype, call.dtype, key=lambda kind: numerics.ROUNDOFF[kind])
            comparisons.append(
                numerics.compare(
                    name,
                    x,
                    true,
                    size,
                    dtype=unit,
                    measured=self.bound is None,
                    gradient=name.startswith("grad"),
                    yardstick=naive if call.spread <= 1.0 else None,
                    tf32=self.products == "tf32",
                )
            )
        hint = "\nits tl.dot multiplies float32 in tf32: input_precision='ieee' is exact, check_kernel(products='tf32') allows for it"
        numerics.assert_right(comparisons, f"{call}{hint if tf32 and self.products == 'ieee' else ''}")
        for comparison in comparisons:
            self.seen.worst[comparison.name] = max(comparison.share, self.seen.worst.get(comparison.name, 0.0))

    def _outputs(self, function: Callable[..., Any], tensors: Mapping[str, Tensor], call: Call, wanted: Sequence[str]) -> list[Tensor]:
        for name in wanted:
            tensors[name].requires_grad_()
        outputs = function(**tensors, **call.options)
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        odd = [type(x).__name__ for x in outputs if not isinstance(x, Tensor)]
        if odd:
            raise CheckError(f"{_name(function)} returns {odd[0]}; a tensor or a tuple of tensors is compared")
        self._leaves = [tensors[name] for name in wanted]
        return outputs

    def _gradients(self, outputs: Sequence[Tensor], grads: Sequence[Tensor], wanted: Sequence[str]) -> Sequence[Tensor]:
        if not wanted:
            return []
        pairs = [(x, grad) for x, grad in zip(outputs, grads, strict=True) if x.requires_grad]
        if not pairs:
            raise CheckError("no result requires a gradient: the function is not differentiable; pass gradients=False")
        return torch.autograd.grad([x for x, _ in pairs], self._leaves, [grad for _, grad in pairs], materialize_grads=True)


def _narrower(found: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a result has less in it than what was wanted, or is of another kind. Statistics in float32 beside half operands may be."""
    if not (found.is_floating_point and wanted.is_floating_point):
        return found.is_floating_point != wanted.is_floating_point
    return numerics.ROUNDOFF.get(found, 1.0) > numerics.ROUNDOFF.get(wanted, 1.0)


def _validate_choices(dtypes: Sequence[torch.dtype], layouts: Sequence[str], products: str) -> None:
    for name, given_values, allowed in (("dtypes", dtypes, numerics.ROUNDOFF), ("layouts", layouts, drawing.LAYOUTS)):
        unknown = [value for value in given_values if value not in allowed]
        if unknown or not given_values:
            raise CheckError(f"{name} has {unknown[0] if unknown else 'nothing'}; allowed: {', '.join(map(str, allowed))}")
    if products not in ("ieee", "tf32"):
        raise CheckError(f"products is {products!r}; allowed: 'ieee', 'tf32'")


def _choice(choice: Choice) -> st.SearchStrategy[Any]:
    if isinstance(choice, st.SearchStrategy):
        return choice
    return st.sampled_from(list(choice)) if isinstance(choice, (list, tuple, range)) else st.just(choice)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
