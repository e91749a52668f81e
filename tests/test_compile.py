"""torch.compile and torch.export take every row in one graph, in both directions, at any length."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.calls import BOTH, Call, alone, assert_same, differentiable, draw, each, eager, fixed, gradients, kinds, random, seeded
from triton_attn import CATALOG, operators, use_backend
from triton_attn.mechanism import Case, Mechanism

LENGTHS = "mn"
# portable, whose other graphs run here too, waits for test-all: half a minute
OURS_FIRST = pytest.mark.parametrize("backend", [pytest.param("portable", marks=pytest.mark.slow), "triton"])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(call: Call, **how: Any) -> Any:
    """The public function, compiled, as a function of the leaves."""
    function = torch.compile(call.row.call, fullgraph=True, **how)
    return lambda *leaves, **changed: function(**{**call.arguments(*leaves), **changed})


@each(kinds)
@BOTH
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(row: Mechanism, case: Case, backend: str, compiler: str) -> None:
    call = draw(row, case)
    compare_with_eager(call, backend, compiler)


@each(alone)
@BOTH
@pytest.mark.slow  # aot_eager asks for more
def test_is_captured_in_one_graph(row: Mechanism, case: Case, backend: str) -> None:
    compare_with_eager(draw(row, case), backend, "eager")


def compare_with_eager(call: Call, backend: str, compiler: str) -> None:
    expected = eager(call, backend)
    function = compiled(call, backend=compiler)
    # Inductor would draw seeds of its own
    with use_backend(backend), torch._inductor.config.patch(fallback_random=True):
        out = seeded(function, *call.leaves)
        assert_same(out, expected[0], backend)
        assert_same(gradients(out, call.leaves), expected[1], backend)
        with torch.no_grad():
            assert_same(seeded(function, *call.leaves), expected[0], backend)


@each(alone)
@BOTH
def test_some_inputs_may_require_no_gradient(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    *frozen, leaf = call.plain
    with use_backend(backend):
        out = compiled(call, backend="aot_eager")(*frozen, leaf.requires_grad_())
    assert_same(gradients(out, [leaf]), eager(call, backend)[1][-1:], backend)


@each(alone)
@BOTH
def test_every_output_is_compiled(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    with use_backend(backend):
        found = compiled(call, backend="aot_eager")(*call.leaves, **{row.more: True})
        expected = call(*call.leaves, **{row.more: True})
        assert_same(tuple(found), tuple(expected), backend)
    a, b = (
        torch.autograd.grad(differentiable(row, outputs)[-1].sum(), call.leaves, materialize_grads=True) for outputs in (found, expected)
    )
    assert_same(a, b, backend)


@each(alone)
@BOTH
def test_autocast_is_compiled_inside_of_a_graph_and_around_it(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)

    def cast(**arguments: Any) -> Any:
        with torch.autocast("cpu", torch.float16):
            return row.call(**arguments)

    arguments = call.arguments(*call.leaves)
    # or a graph's backward pass is traced under its forward's autocast, which eager code never does
    with use_backend(backend), torch._functorch.config.patch(backward_pass_autocast="off"):
        expected = cast(**arguments)
        inside = torch.compile(cast, fullgraph=True, backend="aot_eager")(**arguments)
        with torch.autocast("cpu", torch.float16):
            around = compiled(call, backend="aot_eager")(*call.leaves)
    assert expected.dtype == torch.float16
    gradient = tuple(x.half() for x in gradients(expected, call.leaves))  # as they were before the cast's own gradient
    for found in (inside, around):
        assert_same(found, expected, backend)
        assert_same(tuple(x.half() for x in gradients(found, call.leaves)), gradient, backend)


# lengths


def of_other_lengths(case: Case) -> list[Case]:
    """Three shorter cases. No length equals another axis: equal sizes share a symbol."""
    others = {size for axis, size in case.sizes.items() if axis not in LENGTHS}
    found = []
    for shorter in range(16):
        sizes = {axis: size - shorter if axis in LENGTHS else size for axis, size in case.sizes.items()}
        if not others & {sizes[axis] for axis in LENGTHS if axis in sizes} and shorter % 3 == 0:
            found.append(replace(case, sizes=sizes))
    assert len(found) >= 3
    return found[-3:]


def laden(row: Mechanism) -> list[Case]:
    """What training is not shown at other lengths."""
    return [case for case in fixed(row) if case not in alone(row)]


def without_a_new_graph(row: Mechanism, case: Case, backend: str, *, training: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(row.call, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    with use_backend(backend):
        for other in of_other_lengths(case):
            call = draw(row, other)
            leaves = call.leaves if training else call.plain
            found, expected = (seeded(which, **call.arguments(*leaves)) for which in (function, row.call))
            assert_same(found, expected, backend)
            if training:
                assert_same(gradients(found, leaves), gradients(expected, leaves), backend)
            graphs.append(counter.frame_count)
    # torch counts a graph that it began anew as two
    assert graphs == graphs[:1] * len(graphs)


@pytest.fixture
def _symbolic(request: pytest.FixtureRequest, row: Mechanism, case: Case, backend: str) -> None:
    if (row.name, case.name, backend) == ("strided_attention", "padded keys", "portable"):
        request.applymarker(
            pytest.mark.xfail(strict=True, reason="torch asks whether a slice of the keys is dense: odd lengths, even ones")
        )


@each(laden)
@BOTH
@pytest.mark.usefixtures("_symbolic")
def test_lengths_change_without_a_new_graph(row: Mechanism, case: Case, backend: str) -> None:
    without_a_new_graph(row, case, backend, training=False)


@each(alone)
@OURS_FIRST
@pytest.mark.usefixtures("_symbolic")
def test_lengths_change_without_a_new_graph_in_training(row: Mechanism, case: Case, backend: str) -> None:
    without_a_new_graph(row, case, backend, training=True)


@each(random)
@OURS_FIRST
def test_lengths_change_without_a_new_graph_under_dropout(row: Mechanism, case: Case, backend: str) -> None:
    without_a_new_graph(row, case, backend, training=False)


# torch.func


@each(alone)
def test_torch_func_inside_of_a_graph_is_refused_to_kernels(row: Mechanism, case: Case) -> None:
    """Dynamo would run the forward operator alone: gradients of zero."""
    call = draw(row, case)
    differentiate, mapped = torch.func.grad(call.total, call.positions), torch.vmap(call)
    for function, leaves in ((differentiate, call.plain), (mapped, [x[None] for x in call.plain])):
        with use_backend("triton"), pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.func around an autograd function"):
            torch.compile(function, fullgraph=True, backend="eager")(*leaves)


@each(alone)
def test_torch_func_inside_of_a_graph_differentiates_portable(row: Mechanism, case: Case) -> None:
    call = draw(row, case)
    differentiate = torch.compile(torch.func.grad(call.total, call.positions), fullgraph=True, backend="aot_eager")
    with use_backend("portable"):
        assert_same(differentiate(*call.plain), eager(call, "portable")[1], "portable")


# export

RELOAD = """
import sys
import torch
import triton_attn
for path in sys.argv[1:]:
    program = torch.export.load(path).module()
    torch.save([program(tensors) for tensors in torch.load(path.replace("pt2", "inputs"))], path.replace("pt2", "outputs"))
"""


class Exported(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.row, self.options = call.row, call.options

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        return self.row.call(**tensors, **self.options)


def tensors_of(call: Call) -> dict[str, Tensor]:
    return {name: x for name, x in call.arguments(*call.plain).items() if isinstance(x, Tensor)}


@pytest.fixture(scope="module")
def reloaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], tuple[list[Tensor], list[Tensor]]]:
    """(row, case, backend) -> outputs at three lengths, here and of the program that another process loaded."""
    folder = tmp_path_factory.mktemp("programs")
    expected: dict[tuple[str, str, str], list[Tensor]] = {}
    paths: dict[tuple[str, str, str], Path] = {}
    asked = [item for item in request.session.items if "reloaded" in getattr(item, "fixturenames", ())]
    wanted = {(item.callspec.params["row"].name, item.callspec.params["case"].name) for item in asked}  # type: ignore[attr-defined]
    for row in CATALOG.values():
        for case, backend in [*((case, "triton") for case in fixed(row)), *((case, "portable") for case in alone(row))]:
            if (row.name, case.name) not in wanted:
                continue
            calls = [draw(row, other) for other in of_other_lengths(case)]
            given = [tensors_of(call) for call in calls]
            axes = {name: row.inputs[name].axes.split() for name in given[0]}
            dynamic = {name: {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(axes[name]) if axis in LENGTHS} for name in axes}
            with use_backend(backend):
                program = torch.export.export(Exported(calls[0]), (given[0],), dynamic_shapes=(dynamic,))
                expected[row.name, case.name, backend] = [call(*call.plain) for call in calls]
            targets = {node.target for node in program.graph.nodes}
            assert (operators._OPERATORS[row.name].forward in targets) == (backend == "triton")
            path = folder / f"{len(paths)}.pt2"
            torch.export.save(program, path)
            torch.save(given, path.with_suffix(".inputs"))
            paths[row.name, case.name, backend] = path
    subprocess.run([sys.executable, "-c", RELOAD, *paths.values()], check=True, timeout=300)
    return {which: (expected[which], torch.load(path.with_suffix(".outputs"))) for which, path in paths.items()}


@each(alone)
def test_an_exported_program_runs_in_another_process_at_any_length(row: Mechanism, case: Case, reloaded: Any) -> None:
    expected, found = reloaded[row.name, case.name, "triton"]
    assert len(found) == 3
    assert_same(found, expected, "triton")


@each(laden)
@pytest.mark.slow
def test_an_exported_program_takes_more_tensors(row: Mechanism, case: Case, reloaded: Any) -> None:
    expected, found = reloaded[row.name, case.name, "triton"]
    assert len(found) == 3
    assert_same(found, expected, "triton")


@each(alone)
def test_an_exported_portable_program_does_too(row: Mechanism, case: Case, reloaded: Any) -> None:
    expected, found = reloaded[row.name, case.name, "portable"]
    assert_same(found, expected, "portable")
