"""Run kernels against the reference: rows of the catalogue in, result rows out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_attn import device, dispatch
from triton_attn.mechanism import Case, Code, Kernel, Mechanism
from triton_attn.testing import inputs, numerics


@dataclass(frozen=True)
class Verdict:
    """One case of one implementation in one dtype: the worst share of its bound over outputs and gradients, and the time taken."""

    mechanism: str
    implementation: str  # a kernel's name, or "portable"
    case: str
    dtype: str
    where: str  # the GPU's name, "interpreter", or "cpu"
    share: float
    worst: str  # which output or gradient
    seconds: float
    fault: str = ""
    forward: float = 0.0  # of outputs alone
    backward: float = 0.0  # of gradients alone


def verify(
    rows: Sequence[Mechanism], where: torch.device, *, seconds: float = float("inf"), tick: Callable[[str], None] = lambda text: None
) -> Iterator[Verdict]:
    """Every case of every row: each kernel that runs here, and portable. Past a row's share of `seconds` its other cases wait."""
    name = device.profile(where.index or 0).name if where.type == "cuda" else "interpreter" if device.interpreting() else "cpu"
    for row in rows:
        start = time.perf_counter()
        for dtype in _dtypes(where):
            for case in row.cases:
                for implementation, run in implementations(row, where):
                    if time.perf_counter() - start > seconds:
                        break
                    if implementation != "portable" and refused(row, implementation, case, dtype):
                        continue
                    tick(f"{row.name} {implementation} {case.name} {dtype}")
                    began = time.perf_counter()
                    comparisons = judge(row, case, run, dtype=dtype, where=where, borrowed=implementation == "portable")
                    worst = max(comparisons, key=lambda c: c.share)
                    faults = "; ".join(c.fault for c in comparisons if c.fault)
                    spent = time.perf_counter() - began
                    short = str(dtype).removeprefix("torch.")
                    shown = name if implementation != "portable" or where.type == "cuda" else "cpu"
                    sides = [[c.share for c in comparisons if c.name.startswith("grad ") == side] for side in (False, True)]
                    shares = [max(side, default=0.0) for side in sides]
                    yield Verdict(row.name, implementation, case.name, short, shown, worst.share, worst.name, spent, faults, *shares)


def refused(row: Mechanism, implementation: str, case: Case, dtype: torch.dtype) -> list[str]:
    """Why a kernel does not serve a case."""
    kernel = next(kernel for kernel in row.kernels if kernel.name == implementation)
    return kernel.refuses(*inputs.meta(row, case, dtype))


Run = Callable[[Mapping[str, Any], Mapping[str, Any], Sequence[Tensor | None]], tuple[Sequence[Tensor], Sequence[Tensor]]]


def implementations(row: Mechanism, where: torch.device) -> Iterator[tuple[str, Run]]:
    """(name, run) of whatever computes this row here; run(tensors, options, grads) gives outputs and gradients."""
    for kernel in row.kernels:
        if where.type == "cuda":
            runs = not dispatch.capability_refusal(kernel, device.profile(where.index or 0).capability)
        else:
            runs = device.interpreting()
        if runs:
            yield kernel.name, kernel_run(row, kernel.load())
    yield "portable", differentiable_run(row, row.portable)


def kernel_run(row: Mechanism, code: Code, tile: Any = None) -> Run:
    """Forward and backward of a kernel, called directly; as autograd does, nobody asks for the gradient of what is absent."""

    def run(
        tensors: Mapping[str, Any], options: Mapping[str, Any], grads: Sequence[Tensor | None]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        outputs = code.forward(**tensors, **options, **{row.more: True}, tile=tile)
        named = dict(zip(row.outputs, outputs, strict=True))
        needs = tuple(tensors[name] is not None for name in row.differentiable)
        return outputs, code.backward(*grads, **tensors, **named, **options, needs=needs, tile=tile)

    return run


def differentiable_run(row: Mechanism, function: Callable[..., Any], *, more: bool = True) -> Run:
    """The same of an ordinary differentiable function; without `more` it is asked for its first output alone."""

    def run(
        tensors: Mapping[str, Any], options: Mapping[str, Any], grads: Sequence[Tensor | None]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        given = [name for name in row.differentiable if tensors[name] is not None]
        leaves = {name: tensors[name].detach().requires_grad_() for name in given}
        found_out = function(**{**tensors, **leaves}, **options, **{row.more: more})
        outputs = found_out if more else (found_out,)
        # where every step is masked, or there is none, an output depends on nothing
        pairs = [(x, grad) for x, grad in zip(outputs, grads[: len(outputs)], strict=True) if grad is not None and x.requires_grad]
        wanted, given_grads = zip(*pairs, strict=True) if pairs else ((), ())
        found_in = torch.autograd.grad(wanted, list(leaves.values()), given_grads, materialize_grads=True) if pairs else ()
        gradients = found_in or [torch.zeros_like(leaf) for leaf in leaves.values()]
        found = dict(zip(given, gradients, strict=True))
        return outputs, [found.get(name, torch.empty(0)) for name in row.differentiable]

    return run


def judge(
    row: Mechanism,
    case: Case,
    run: Run,
    *,
    dtype: torch.dtype,
    where: torch.device,
    seed: int = 0,
    spread: float = 1.0,
    layout: str = inputs.CONTIGUOUS,
    tf32: bool = False,
    borrowed: bool = False,
    more: bool = True,
) -> list[numerics.Comparison]:
    """Compare outputs and gradients of `run` with the reference in float64, by every tier; without `more` the first output alone."""
    tensors, options = inputs.draw(row, case, dtype=dtype, device=where, seed=seed, spread=spread, layout=layout)
    if "scale" in row.options:
        options.setdefault("scale", None)
    # beside large scores the yardstick is no measure: a log-sum-exp held in float32 errs by its own magnitude
    expected = expect(row, tensors, options, case.sizes, dtype=dtype, seed=seed, statistical=spread <= 1.0, layout=layout, more=more)
    return expected.judge(run, tf32=tf32, borrowed=borrowed)


@dataclass(frozen=True)
class Expected:
    """A call and everything its results are judged by."""

    row: Mechanism
    tensors: Mapping[str, Any]
    options: Mapping[str, Any]
    grads: Sequence[Tensor]
    dtype: torch.dtype
    truth: Mapping[str, Tensor]  # by output, and "grad <input>"
    naive: Mapping[str, Tensor]  # likewise, or empty
    size: Mapping[str, Tensor]

    def judge(self, run: Run, *, tf32: bool = False, borrowed: bool = False) -> list[numerics.Comparison]:
        """Run the call and compare outputs and gradients."""
        found = _by_name(self.row, self.tensors, *run(self.tensors, self.options, self.grads))
        return [
            numerics.compare(
                name,
                found[name],
                true,
                self.size[name.removeprefix("grad ")],
                dtype=self.dtype,
                borrowed=borrowed,
                gradient=name.startswith("grad "),
                yardstick=self.naive.get(name),
                tf32=tf32,
            )
            for name, true in self.truth.items()
        ]


def expect(
    row: Mechanism,
    tensors: Mapping[str, Any],
    options: Mapping[str, Any],
    sizes: Mapping[str, int],
    *,
    dtype: torch.dtype,
    seed: int = 0,
    statistical: bool = True,
    layout: str = inputs.CONTIGUOUS,
    more: bool = True,
) -> Expected:
    """Truth, yardstick and bound of a call; `statistical` asks for tier 2. Its output gradients have the layout too."""
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in tensors.items()}
    generator = torch.Generator().manual_seed(seed + 1)
    first = next(iter(tensors.values()))
    grads = []
    for given in row.outputs.values() if more else [*row.outputs.values()][:1]:
        kind = torch.float32 if given.dtype == "float32" else dtype
        drawn = torch.randn(inputs.shape(given.axes, sizes), generator=generator).to(kind)
        grads.append(inputs.laid_out(drawn, layout).to(first.device))
    reference = differentiable_run(row, row.reference, more=more)
    truth = _by_name(row, tensors, *reference(wide, options, [grad.double() for grad in grads]))
    naive = _by_name(row, tensors, *reference(tensors, options, grads)) if statistical else {}
    size = row.bound(**wide, **{f"grad_{name}": grad.double() for name, grad in zip(row.outputs, grads, strict=False)}, **options)
    return Expected(row, tensors, options, grads, dtype, truth, naive, size)


def _by_name(row: Mechanism, tensors: Mapping[str, Any], outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    named = dict(zip(row.outputs, outputs, strict=False))
    # what is absent has no gradient
    present = [(name, x) for name, x in zip(row.differentiable, gradients, strict=True) if tensors[name] is not None]
    return {**named, **{f"grad {name}": x for name, x in present}}


def _dtypes(where: torch.device) -> tuple[torch.dtype, ...]:
    # Triton's plain interpreter computes bfloat16 wrongly
    return (torch.float32, torch.float16) if where.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16)


__all__ = ["Kernel", "Verdict", "differentiable_run", "expect", "implementations", "judge", "kernel_run", "verify"]
