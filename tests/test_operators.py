"""Every row as a torch operator: checked schema, compiled, transformed, cast, and clear about what it cannot do.

Kernels run in the interpreter; `portable` goes through the same public call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triton_attn import CATALOG, Unsupported, operators, use_backend
from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import inputs

ROWS = [pytest.param(row, id=row.name) for row in CATALOG.values()]
BACKENDS = ["triton", "portable"]


def drawn(row: Mechanism, case: Case | None = None, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    """(differentiable tensors that require gradients, the other arguments) of a public call."""
    tensors, options = inputs.draw(row, case or row.cases[0], dtype=dtype)
    tensors.pop("seed", None)
    leaves = [tensors.pop(name).requires_grad_() for name in row.differentiable]  # type: ignore[union-attr]
    return leaves, {**{name: x for name, x in tensors.items() if x is not None}, **options}


def operator_arguments(row: Mechanism, case: Case) -> tuple[Any, ...]:
    tensors, options = inputs.draw(row, case)
    defaults = {"causal": "", "scale": 0.25, "dropout_p": 0.0}
    given = {**defaults, **options}
    given["causal"] = "top_left" if given["causal"] is True else given["causal"] or ""
    return (*(tensors[name] for name in row.inputs), *(given[name] for name in row.options))


@pytest.mark.parametrize("row", ROWS)
def test_operators_keep_the_rules_of_torch(row: Mechanism) -> None:
    operator = operators._OPERATORS[row.name]
    for case in row.cases:
        args = operator_arguments(row, case)
        torch.library.opcheck(operator.forward, args)
        outputs = operator.forward(*args)
        grads = [torch.randn_like(x) for x in outputs]
        split = len(row.inputs)
        torch.library.opcheck(operator.backward, (*grads, *args[:split], *outputs, *args[split:], [True] * len(row.differentiable)))


@pytest.mark.parametrize("row", ROWS)
def test_unneeded_gradients_are_not_computed(row: Mechanism) -> None:
    leaves, others = drawn(row)
    for i, leaf in enumerate(leaves):
        alone = [x.detach().requires_grad_(j == i) for j, x in enumerate(leaves)]
        with use_backend("triton"):
            (whole,) = torch.autograd.grad(row.function(*leaves, **others).sum(), leaf)
            row.function(*alone, **others).sum().backward()
        assert torch.equal(alone[i].grad, whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(row: Mechanism, backend: str, compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(row.function, fullgraph=True, backend=compiler)
    for case in (row.cases[0], row.cases[2]):
        leaves, others = drawn(row, case)
        with use_backend(backend):
            eager, graph = row.function(*leaves, **others), compiled(*leaves, **others)
            torch.testing.assert_close(graph, eager)
            weight = torch.randn_like(eager)
            for a, b in zip(*(torch.autograd.grad((out * weight).sum(), leaves) for out in (eager, graph)), strict=True):
                torch.testing.assert_close(a, b)
            with torch.no_grad():
                torch.testing.assert_close(compiled(*leaves, **others), eager)


@pytest.mark.parametrize("row", ROWS)
def test_dropout_compiles_in_one_graph(row: Mechanism) -> None:
    torch._dynamo.reset()
    leaves, others = drawn(row)
    for backend in BACKENDS:
        with use_backend(backend):
            out = torch.compile(row.function, fullgraph=True, backend="aot_eager")(*leaves, **others, dropout_p=0.5)
            out.sum().backward()


@pytest.mark.parametrize("row", ROWS)
def test_lengths_change_without_a_new_graph(row: Mechanism) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(module: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(row.function, fullgraph=True, backend=count, dynamic=True)
    for length in (20, 33, 47):  # none equal to a width: equal sizes share a symbol
        sizes = {**row.cases[0].sizes, "m": length, "n": length + 3}
        leaves, others = drawn(row, Case("dynamic", sizes))
        with torch.no_grad(), use_backend("triton"):
            torch.testing.assert_close(compiled(*leaves, **others), row.function(*leaves, **others))
    assert len(graphs) == 1


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_decides_the_dtype(row: Mechanism, backend: str) -> None:
    leaves, others = drawn(row)
    dtypes = (torch.float16,) if backend == "triton" else (torch.float16, torch.bfloat16)
    for dtype in dtypes:
        with use_backend(backend), torch.autocast("cpu", dtype):
            out = row.function(*leaves, **others)
            assert out.dtype == dtype
            for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
                assert gradient.dtype == leaf.dtype
            doubles = [leaf.double() for leaf in leaves]
            if backend == "portable":
                assert row.function(*doubles, **others).dtype == torch.float64


@pytest.mark.parametrize("row", ROWS)
def test_torch_func_differentiates_and_maps(row: Mechanism) -> None:
    leaves, others = drawn(row)
    plain = [leaf.detach() for leaf in leaves]

    def loss(*tensors: Tensor) -> Tensor:
        return row.function(*tensors, **others).square().sum()  # type: ignore[no-any-return]

    positions = tuple(range(len(plain)))
    with use_backend("triton"):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, b in zip(torch.func.grad(loss, positions)(*plain), expected, strict=True):
            assert torch.equal(a, b)
        stacked = [torch.stack((x, 2 * x)) for x in plain]
        mapped = torch.func.vmap(row.function)(*stacked, **others)
        assert torch.equal(mapped[1], row.function(*(2 * x for x in plain), **others))
        per_sample = torch.func.vmap(torch.func.grad(loss, positions))(*stacked)
        for a, b in zip(per_sample, expected, strict=True):
            torch.testing.assert_close(a[0], b)


@pytest.mark.parametrize("row", ROWS)
def test_vmap_folds_masks_and_refuses_equal_randomness(row: Mechanism) -> None:
    for case in row.cases:
        if case.options.get("dropout_p"):
            continue
        leaves, others = drawn(row, case)
        plain = [leaf.detach() for leaf in leaves]
        with use_backend("triton"):
            stacked = [torch.stack((x, 2 * x)) for x in plain]
            mapped = torch.func.vmap(lambda *t, others=others: row.function(*t, **others))(*stacked)
            assert torch.equal(mapped[1], row.function(*(2 * x for x in plain), **others)), case.name
    with use_backend("triton"), pytest.raises(Unsupported, match="same"):
        torch.func.vmap(lambda *t: row.function(*t, dropout_p=0.5), randomness="same")(*stacked)


@pytest.mark.parametrize("row", ROWS)
def test_forward_mode_and_double_backward_raise(row: Mechanism) -> None:
    leaves, others = drawn(row)
    with use_backend("triton"):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(leaves[0].detach(), torch.ones_like(leaves[0]))  # type: ignore[no-untyped-call]
            with pytest.raises(NotImplementedError):
                row.function(dual, *(x.detach() for x in leaves[1:]), **others)
        (first,) = torch.autograd.grad(row.function(*leaves, **others).square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("row", ROWS)
def test_flops_are_counted_in_both_directions(row: Mechanism) -> None:
    leaves, others = drawn(row)
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        row.function(*leaves, **others).sum().backward()
    work = row.work(row.cases[0].sizes, {}, 4)
    assert counter.get_total_flops() == int(work.flops) + int(work.flops) * 5 // 2


@pytest.mark.parametrize("row", ROWS)
def test_saved_tensors_may_be_packed_and_inputs_must_stay(row: Mechanism) -> None:
    leaves, others = drawn(row)
    with use_backend("triton"):
        (expected,) = torch.autograd.grad(row.function(*leaves, **others).sum(), leaves[0])
        with torch.autograd.graph.save_on_cpu():
            out = row.function(*leaves, **others)
        assert torch.equal(torch.autograd.grad(out.sum(), leaves[0])[0], expected)
        out = row.function(*leaves, **others)
        with torch.no_grad():
            leaves[1].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("row", ROWS)
def test_fake_cuda_tensors_have_the_right_shapes(row: Mechanism) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    operator = operators._OPERATORS[row.name]
    with FakeTensorMode():
        args = operator_arguments(row, row.cases[1])
        args = tuple(torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x for x in args)
        outputs = operator.forward(*args)
    for given, found in zip(row.outputs.values(), outputs, strict=True):
        assert found.shape == inputs.shape(given.axes, row.cases[1].sizes)
        assert found.device.type == "cuda"
