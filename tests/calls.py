"""Calls of any row, drawn from its cases, and what they give eagerly: what every transformation is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_attn import CATALOG, operators, use_backend
from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import inputs

_Result = TypeVar("_Result")
BOTH = pytest.mark.parametrize("backend", ["triton", "portable"])


@dataclass(frozen=True)
class Call:
    """One public call: `leaves` are what it is differentiated by, `others` its other tensors."""

    row: Mechanism
    case: Case
    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]
    others: dict[str, Tensor]
    options: dict[str, Any]

    def arguments(self, *leaves: Tensor) -> dict[str, Any]:
        """The keyword arguments, with other leaves."""
        return {**dict(zip(self.names, leaves, strict=True)), **self.others, **self.options}

    def __call__(self, *leaves: Tensor, **changed: Any) -> Any:
        return self.row.call(**{**self.arguments(*leaves), **changed})

    @property
    def plain(self) -> tuple[Tensor, ...]:
        """The leaves, requiring nothing."""
        return tuple(leaf.detach() for leaf in self.leaves)

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(range(len(self.leaves)))

    def total(self, *leaves: Tensor) -> Tensor:
        """One number, whose gradients are those of `gradients`."""
        out: Tensor = self(*leaves)
        return (out * cotangent(out)).sum()


def draw(row: Mechanism, case: Case, **how: Any) -> Call:
    """A call whose leaves require gradients; `how` goes to `inputs.draw`."""
    drawn, options = inputs.draw(row, case, **how)
    tensors = {name: x for name, x in drawn.items() if x is not None and row.inputs[name].kind != "seed"}
    names = tuple(name for name in row.differentiable if name in tensors)
    leaves = tuple(tensors.pop(name).requires_grad_() for name in names)
    return Call(row, case, names, leaves, tensors, options)


def carried(row: Mechanism, case: Case) -> tuple[Any, ...]:
    """Which tensors a call has, and of which dtypes."""
    tensors, _ = inputs.meta(row, case, torch.float32)
    return tuple((name, x.dtype) for name, x in tensors.items() if x is not None)


def kinds(row: Mechanism) -> list[Case]:
    """The cheapest case of each set of tensors: alone, with each mask, with a seed."""
    cheapest: dict[tuple[Any, ...], Case] = {}
    for case in sorted(row.cases, key=lambda case: row.work(case.sizes, case.options, 4).flops):
        cheapest.setdefault(carried(row, case), case)
    return sorted(cheapest.values(), key=row.cases.index)


def alone(row: Mechanism) -> list[Case]:
    """The cheapest case with nothing but values."""
    return [min(kinds(row), key=lambda case: len(carried(row, case)))]


def random(row: Mechanism) -> list[Case]:
    """The kinds that draw a seed."""
    seeds = {name for name, given in row.inputs.items() if given.kind == "seed"}
    return [case for case in kinds(row) if any(name in seeds for name, _ in carried(row, case))]


def fixed(row: Mechanism) -> list[Case]:
    """The kinds that draw nothing at random."""
    return [case for case in kinds(row) if case not in random(row)]


def each(choose: Callable[[Mechanism], list[Case]]) -> pytest.MarkDecorator:
    """Parametrise over (row, case) of every row. Rows of the same outputs share code: what one of them shows is slow for the others."""
    shown: set[tuple[frozenset[str], frozenset[tuple[str, bool]]]] = set()
    params = []
    for row in CATALOG.values():
        for case in choose(row):
            kinds = frozenset((row.inputs[name].kind, row.inputs[name].optional) for name, _ in carried(row, case))
            marks = [pytest.mark.slow] if (frozenset(row.outputs), kinds) in shown else []
            shown.add((frozenset(row.outputs), kinds))
            params.append(pytest.param(row, case, id=f"{row.name}-{case.name}", marks=marks))
    return pytest.mark.parametrize(("row", "case"), params)


def seeded(function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """The call, with the generator where `eager` had it."""
    torch.manual_seed(7)
    return function(*args, **kwargs)


def cotangent(out: Tensor) -> Tensor:
    """A gradient for an output: no two elements are alike."""
    return torch.linspace(-1.0, 1.0, out.numel(), device=out.device).to(out.dtype).view(out.shape)


def differentiable(row: Mechanism, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs that have gradients."""
    return tuple(out for out, given in zip(outputs, row.outputs.values(), strict=True) if given.differentiable)


def gradients(out: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, cotangent(out))


def eager(call: Call, backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of a call as drawn by default. Kernels are slow in the interpreter, so each is run once."""
    return _eager(call.row.name, call.case.name, backend)


@functools.cache
def _eager(name: str, case: str, backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    row = CATALOG[name]
    call = draw(row, next(known for known in row.cases if known.name == case))
    with use_backend(backend):
        out = seeded(call, *call.leaves)
    return out.detach(), gradients(out, call.leaves)


def assert_same(found: Any, expected: Any, backend: str) -> None:
    """A kernel gives equal bits whatever is done to the call; what torch computes itself may be ordered anew."""
    exact = 0.0 if backend == "triton" else None
    if isinstance(expected, Tensor) and expected.dtype == torch.float16 and exact is None:
        # another formulation rounds other sums, each to a unit of the largest
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2 * torch.finfo(torch.float16).eps * expected.abs().max().item())
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b, backend)
    else:
        torch.testing.assert_close(found, expected, rtol=exact, atol=exact)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what each of our operators was last called with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == operators.NAMESPACE:
            self.calls[operator] = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        return operator(*args, **(kwargs or {}))


def recorded(row: Mechanism, case: Case, **how: Any) -> tuple[operators.Operator, tuple[Any, ...], tuple[Any, ...]]:
    """The operators of a row, and what a call and its backward pass, through every output, hand to each."""
    call, operator = draw(row, case, **how), operators._OPERATORS[row.name]
    with use_backend("triton"), Recording() as recording:
        outputs = seeded(call, *call.leaves, **{row.more: True})
        outputs = differentiable(row, outputs)
        torch.autograd.backward(outputs, [cotangent(out) for out in outputs])
    assert recording.calls.keys() == {operator.forward, operator.backward}
    return operator, recording.calls[operator.forward], recording.calls[operator.backward]
