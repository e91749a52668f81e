"""What autograd and torch.func may do to a call of any row: differentiate it, checkpoint it, cast it, count it, or be refused.

Kernels run in the interpreter; `portable` goes through the same public call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import combinations, compress
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.calls import (
    BOTH,
    Call,
    Recording,
    alone,
    assert_same,
    cotangent,
    draw,
    each,
    eager,
    fixed,
    gradients,
    kinds,
    random,
    recorded,
    seeded,
)
from triton_attn import operators, use_backend
from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import inputs

# gradients


@each(kinds)
@BOTH
def test_torch_func_gives_the_gradients_of_autograd(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    with use_backend(backend):
        found = seeded(torch.func.grad(call.total, call.positions), *call.plain)
    assert_same(found, eager(call, backend)[1], backend)


@each(alone)
@BOTH
def test_any_part_of_the_inputs_may_require_a_gradient(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    expected = eager(call, backend)[1]
    for count in {1, len(call.leaves) - 1} - {0}:
        for wanted in combinations(call.positions, count):
            leaves = [x.requires_grad_(i in wanted) for i, x in enumerate(draw(row, case).plain)]
            with use_backend(backend), Recording() as recording:
                out = call(*leaves)
                out.backward(cotangent(out))
            asked = recording.calls.get(operators._OPERATORS[row.name].backward)
            assert (asked is not None) == (backend == "triton")
            assert asked is None or asked[-1] == [name in {call.names[i] for i in wanted} for name in row.differentiable]
            for i, leaf in enumerate(leaves):
                assert (leaf.grad is not None) == (i in wanted)
            assert_same([leaves[i].grad for i in wanted], [expected[i] for i in wanted], backend)


@each(alone)
@BOTH
def test_without_gradients_the_output_is_the_same_and_requires_none(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    for off in (torch.no_grad, torch.inference_mode):
        with use_backend(backend), off():
            out = call(*call.leaves)
        assert not out.requires_grad
        assert_same(out.clone(), eager(call, backend)[0], backend)


@each(alone)
@BOTH
def test_a_sum_hands_back_one_number_for_every_element(row: Mechanism, case: Case, backend: str) -> None:
    """Its gradient is expanded: every stride is 0."""
    call = draw(row, case)
    with use_backend(backend):
        out = call(*call.leaves)
        call(*call.leaves).sum().backward()
    expected = torch.autograd.grad(out, call.leaves, torch.ones_like(out))
    assert_same(tuple(leaf.grad for leaf in call.leaves), expected, backend)


@each(alone)
@BOTH
def test_every_output_alone_has_a_gradient(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    for position in [i for i, given in enumerate(row.outputs.values()) if given.differentiable]:
        found = []
        for which in (backend, "reference"):
            with use_backend(which):
                out = call(*call.leaves, **{row.more: True})[position]
            found.append(torch.autograd.grad(out, call.leaves, cotangent(out), materialize_grads=True))
        torch.testing.assert_close(*found)


@each(fixed)
@BOTH
def test_a_tensor_changed_after_the_call_is_noticed(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    for name in (*call.names, *call.others, *row.outputs):
        with use_backend(backend):
            outputs = dict(zip(row.outputs, call(*call.leaves, **{row.more: True}), strict=True))
        total = torch.stack([out.sum() for out in outputs.values()]).sum()
        expected = torch.autograd.grad(total, call.leaves, retain_graph=True) if backend == "portable" else ()
        changed = {**call.arguments(*call.leaves), **outputs}[name]
        before = changed.detach().clone()
        with torch.no_grad():
            changed.zero_()
        found, said = outcome(torch.autograd.grad, total, call.leaves)
        with torch.no_grad():
            changed.copy_(before)
        if said or backend == "triton":
            assert "modified by an inplace operation" in said
        else:  # what was changed had not been saved
            assert_same(found, expected, backend)


def outcome(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What a function gives, or what it says instead."""
    try:
        return function(*args), ""
    except RuntimeError as error:
        return None, str(error)


# recomputing and moving what is saved


@each(lambda row: [*alone(row), *random(row)])
@BOTH
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_bit(row: Mechanism, case: Case, backend: str, reentrant: bool) -> None:
    call = draw(row, case)
    with use_backend(backend):
        out = seeded(checkpoint, call, *call.leaves, use_reentrant=reentrant)
        torch.rand(3)  # the generator has moved on when the call is repeated
        out.backward(cotangent(out))
    expected = eager(call, backend)
    assert torch.equal(out, expected[0])
    for leaf, gradient in zip(call.leaves, expected[1], strict=True):
        assert torch.equal(leaf.grad, gradient)  # type: ignore[arg-type]


@each(lambda row: [*alone(row), *random(row)])
@BOTH
def test_what_is_saved_may_be_packed(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    hooks = (torch.autograd.graph.saved_tensors_hooks(pack, packed.__getitem__), torch.autograd.graph.save_on_cpu())
    for hook in hooks:
        with use_backend(backend), hook:
            out = seeded(call, *call.leaves)
        assert_same(gradients(out, call.leaves), eager(call, backend)[1], backend)
    assert packed


@each(kinds)
def test_a_kernel_saves_its_inputs_and_outputs_and_nothing_else(row: Mechanism, case: Case) -> None:
    call = draw(row, case)
    saved: list[Tensor] = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        outputs = seeded(call, *call.leaves, **{row.more: True})
    saved = [x for x in saved if x.numel()]
    known = {x.data_ptr() for x in (*call.leaves, *call.others.values(), *outputs) if x.numel()}
    seeds = [x for x in saved if x.data_ptr() not in known]
    assert len(saved) == len(known) + len(seeds)
    assert all(x.ndim == 0 and x.dtype == torch.int64 for x in seeds)
    assert len(seeds) == (case in random(row))


# casting


@each(kinds)
@pytest.mark.parametrize(("backend", "dtype"), [("triton", torch.float16), ("portable", torch.float16), ("portable", torch.bfloat16)])
def test_autocast_is_casting_by_hand(row: Mechanism, case: Case, backend: str, dtype: torch.dtype) -> None:
    call = draw(row, case)
    cast = [x.to(dtype) if row.inputs[name].dtype == "like inputs" else x for name, x in zip(call.names, call.leaves, strict=True)]
    with use_backend(backend):
        by_hand = seeded(call, *cast)
        with torch.autocast("cpu", dtype):
            out = seeded(call, *call.leaves)
            sdpa = F.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 2, 2))
    assert out.dtype == sdpa.dtype == dtype
    assert torch.equal(out, by_hand)
    if backend == "portable" or case in alone(row):
        for x, y, leaf in zip(gradients(out, call.leaves), gradients(by_hand, call.leaves), call.leaves, strict=True):
            assert x.dtype == leaf.dtype
            assert torch.equal(x, y)


@each(alone)
def test_autocast_leaves_doubles_alone_as_torch_does(row: Mechanism, case: Case) -> None:
    call = draw(row, case, dtype=torch.float64)
    with use_backend("portable"), torch.autocast("cpu", torch.float16):
        out = call(*call.leaves)
        sdpa = F.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 2, 2, dtype=torch.float64))
    assert out.dtype == sdpa.dtype == torch.float64
    with use_backend("portable"):
        assert torch.equal(out, call(*call.leaves))


# what a kernel cannot do, it refuses


def of_a_function(call: Call, output: Callable[..., Tensor]) -> Any:
    return torch.func.jvp(output, call.plain, call.plain)[1]


def of_a_dual_tensor(call: Call, output: Callable[..., Tensor]) -> Any:
    with forward_ad.dual_level():
        first, *rest = call.plain
        return tangent(output(forward_ad.make_dual(first, first), *rest))  # type: ignore[no-untyped-call]


def of_a_dual_tensor_without_gradients(call: Call, output: Callable[..., Tensor]) -> Any:
    with torch.no_grad():
        return of_a_dual_tensor(call, output)


def of_the_gradient_of_a_function(call: Call, output: Callable[..., Tensor]) -> Any:
    return torch.func.jvp(torch.func.grad(lambda *x: output(*x).square().sum(), call.positions), call.plain, call.plain)[1]


def of_a_dual_gradient(call: Call, output: Callable[..., Tensor]) -> Any:
    out = output(*call.leaves)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(cotangent(out), torch.ones_like(out))  # type: ignore[no-untyped-call]
        return tuple(map(tangent, torch.autograd.grad(out, call.leaves, dual)))


def of_a_gradient(call: Call, output: Callable[..., Tensor]) -> Any:
    found = torch.autograd.grad(output(*call.leaves).square().sum(), call.leaves, create_graph=True)
    return torch.autograd.grad(found[0].sum(), call.leaves)


def of_a_gradient_under_torch_func(call: Call, output: Callable[..., Tensor]) -> Any:
    def total(*leaves: Tensor) -> Tensor:
        found = torch.func.grad(lambda *x: output(*x).sum(), call.positions)(*leaves)
        return torch.stack([x.square().sum() for x in found]).sum()

    return torch.func.grad(total, call.positions)(*call.plain)


def of_a_gradient_penalty(call: Call, output: Callable[..., Tensor]) -> Any:
    """The gradient handed to the call is a constant: its own graph would end here."""
    total = output(*call.leaves).sum()
    found = torch.autograd.grad(total, call.leaves, create_graph=True)
    return torch.autograd.grad(total + torch.stack([x.square().sum() for x in found]).sum(), call.leaves)


def tangent(dual: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(dual).tangent  # type: ignore[no-any-return,no-untyped-call]


FORWARD = "implement the jvp function"
TWICE = "kernels differentiate once, not twice"
REFUSED: list[tuple[Callable[[Call, Callable[..., Tensor]], Any], str]] = [
    (of_a_function, FORWARD),
    (of_a_dual_tensor, FORWARD),
    (of_a_dual_tensor_without_gradients, FORWARD),
    (of_the_gradient_of_a_function, FORWARD),
    (of_a_dual_gradient, FORWARD),
    (of_a_gradient, TWICE),
    (of_a_gradient_under_torch_func, TWICE),
    (of_a_gradient_penalty, TWICE),
]


@each(lambda row: [*alone(row), *random(row)])
@pytest.mark.parametrize(("derivative", "message"), REFUSED, ids=[derivative.__name__ for derivative, _ in REFUSED])
@BOTH
def test_the_derivative_is_refused_or_right(
    row: Mechanism, case: Case, derivative: Callable[[Call, Callable[..., Tensor]], Any], message: str, backend: str
) -> None:
    call = draw(row, case, dtype=torch.float32 if backend == "triton" else torch.float64)

    def output(*leaves: Tensor) -> Tensor:
        return seeded(call, *leaves)  # type: ignore[no-any-return]

    if backend == "triton":
        with use_backend(backend), pytest.raises(NotImplementedError, match=message):
            derivative(call, output)
        return
    with use_backend(backend):
        found, said = outcome(derivative, call, output)
    if said:  # torch's own fused call has no such derivative either
        assert re.search("not implemented|not been implemented|does not support it", said)
        return
    with use_backend("reference"):
        torch.testing.assert_close(found, derivative(call, output))


# counting, and computing shapes alone


@each(lambda row: list(row.cases))
def test_flops_are_those_of_the_work_model_in_both_directions(row: Mechanism, case: Case) -> None:
    operator = operators._OPERATORS[row.name]
    with FakeTensorMode(), use_backend("triton"), FlopCounterMode(display=False) as counter:
        call = draw(row, case)
        call(*call.leaves).sum().backward()
    flops = int(row.work(case.sizes, case.options, 4).flops)
    assert flops > 0
    expected = {operator.forward.overloadpacket: flops, operator.backward.overloadpacket: int(flops * row.backward_share)}
    assert counter.get_flop_counts()["Global"] == expected


@each(alone)
def test_flops_of_a_call_that_runs_are_counted_as_those_of_a_fake(row: Mechanism, case: Case) -> None:
    counted = []
    for mode in (FakeTensorMode(), nullcontext()):
        with mode, use_backend("triton"), FlopCounterMode(display=False) as counter:
            call = draw(row, case)
            call(*call.leaves).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def described(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(tuple(x.shape), x.stride(), x.dtype) for x in tensors]


@each(kinds)
@BOTH
def test_fake_tensors_have_the_shapes_and_strides_of_eager(row: Mechanism, case: Case, backend: str) -> None:
    expected = eager(draw(row, case), backend)
    with FakeTensorMode(), use_backend(backend):
        call = draw(row, case)
        out = call(*call.leaves)
        found = gradients(out, call.leaves)
    assert described([out]) == described([expected[0]])
    # of torch's own fused call, fakes know the shapes alone
    known = slice(None) if backend == "triton" else slice(1)
    assert [x[known] for x in described(found)] == [x[known] for x in described(expected[1])]


@each(kinds)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_operators_know_their_shapes_on_devices_that_are_not_here(row: Mechanism, case: Case, dtype: torch.dtype, device: str) -> None:
    with FakeTensorMode():
        operator, args, _ = recorded(row, case)
    values = [given.kind == "values" for given in row.inputs.values()] + [False] * len(row.options)
    with FakeTensorMode() if device == "cuda" else nullcontext():
        args = tuple(
            torch.empty(x.shape, dtype=dtype if value else x.dtype, device=device) if isinstance(x, Tensor) else x
            for x, value in zip(args, values, strict=True)
        )
        outputs = operator.forward(*args)
        split = len(row.inputs)
        needs = [args[[*row.inputs].index(name)] is not None for name in row.differentiable]
        found = operator.backward(*map(torch.empty_like, outputs), *args[:split], *outputs, *args[split:], needs)
    dtypes = {"like inputs": dtype, "float32": torch.float32}
    for given, output in zip(row.outputs.values(), outputs, strict=True):
        assert output.shape == inputs.shape(given.axes, case.sizes)
        assert output.dtype == dtypes[given.dtype]
    for name, gradient in zip(compress(row.differentiable, needs), compress(found, needs), strict=True):
        assert gradient.shape == inputs.shape(row.inputs[name].axes, case.sizes)
        assert gradient.dtype == dtype
    assert all(x.is_contiguous() and x.device.type == device for x in (*outputs, *found))


@each(fixed)
def test_a_call_on_the_meta_device_gives_shapes(row: Mechanism, case: Case) -> None:
    call = draw(row, case, device="meta")
    out = call(*call.leaves)
    found = gradients(out, call.leaves)
    expected = eager(draw(row, case), "portable")
    assert described([out]) == described([expected[0]])
    assert [x[::2] for x in described(found)] == [x[::2] for x in described(expected[1])]


@pytest.mark.xfail(raises=(AssertionError, RuntimeError), reason="dispatch asks the properties of a GPU that is not here")
@each(alone)
def test_a_call_on_a_gpu_that_is_not_here_gives_shapes(row: Mechanism, case: Case) -> None:
    with FakeTensorMode(), torch.no_grad():
        call = draw(row, case)
        others = {name: torch.empty_like(x, device="cuda") for name, x in call.others.items()}
        out = call(*(torch.empty(x.shape, device="cuda") for x in call.leaves), **others)
    assert out.device.type == "cuda"
    assert described([out]) == described([eager(draw(row, case), "triton")[0]])
