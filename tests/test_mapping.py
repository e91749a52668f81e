"""torch.func maps every row: one axis, several, shared tensors, masks, dropout, and gradients per sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.calls import BOTH, Call, alone, assert_same, cotangent, draw, each, eager, fixed, random, seeded
from triton_attn import Unsupported, use_backend
from triton_attn.mechanism import Case, Mechanism

# torch has no rule of its own for its fused call
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def masked(row: Mechanism) -> list[Case]:
    """A case with a mask of (query, key) pairs."""
    pairs = {name for name, given in row.inputs.items() if given.kind == "mask" and given.axes.endswith("m n")}
    return [case for case in fixed(row) if pairs & case.options.keys()][:1]


def another(x: Tensor) -> Tensor:
    """A second sample."""
    if x.dtype == torch.bool:
        return ~x
    return 2 * x.flip(-1) if x.is_floating_point() else x.flip(-1)


def compare_with_loop(call: Call, changed: dict[str, Tensor], axes: dict[str, int], backend: str) -> None:
    """Map the named tensors along these axes, and call twice."""
    tensors = {**dict(zip(call.names, call.plain, strict=True)), **call.others, **changed}
    second = {**tensors, **{name: another(tensors[name]) for name in axes}}
    given = {name: torch.stack((x, second[name]), axes[name]) if name in axes else x for name, x in tensors.items()}
    with use_backend(backend):
        found = torch.vmap(lambda given: call.row.call(**given, **call.options), ({name: axes.get(name) for name in given},))(given)
        first = call.row.call(**tensors, **call.options) if changed else eager(call, backend)[0]
        assert_same(found, torch.stack((first, call.row.call(**second, **call.options))), backend)


@each(fixed)
@BOTH
def test_a_mapped_call_is_a_loop_of_calls(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    others = tuple(name for name in call.others if row.inputs[name].kind != "offsets")
    # all together, the masks alone, and the values alone
    for mapped in {(*call.names, *others), others, call.names} - {()}:
        compare_with_loop(call, {}, dict.fromkeys(mapped, 0), backend)


@each(alone)
@BOTH
def test_any_axis_of_any_input_may_be_mapped(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    for name in call.names:
        compare_with_loop(call, {}, {name: -1}, backend)
    compare_with_loop(call, {}, {name: i for i, name in enumerate(call.names)}, backend)


@each(masked)
@BOTH
def test_one_mask_for_the_whole_batch_may_be_mapped(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, replace(case, sizes={**case.sizes, "b": 2}))
    (name,) = call.others
    whole = call.others[name]
    compare_with_loop(call, {name: whole[:1]}, {name: 0}, backend)
    compare_with_loop(call, {name: whole[0, 0]}, {name: 0}, backend)
    compare_with_loop(call, {name: whole[:1, :1]}, {call.names[0]: 0}, backend)


@each(lambda row: [*alone(row), *masked(row)])
@BOTH
def test_per_sample_gradients_are_a_loop_of_gradients(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    samples = [torch.stack((x, 2 * x)) for x in call.plain]
    differentiate = torch.func.grad(call.total, call.positions)
    with use_backend(backend):
        found = torch.vmap(differentiate)(*samples)
        second = differentiate(*(2 * x for x in call.plain))
    assert_same([x[0] for x in found], list(eager(call, backend)[1]), backend)
    assert_same([x[1] for x in found], list(second), backend)


@each(alone)
@BOTH
def test_what_the_samples_share_has_a_gradient_for_each_of_them(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    if len(call.positions) == 1:
        pytest.skip("one input alone: nothing else is mapped")
    for shared in call.positions:
        differentiate = torch.func.grad(call.total, shared)
        axes = tuple(None if i == shared else 0 for i in call.positions)
        second = [x if axis is None else another(x) for x, axis in zip(call.plain, axes, strict=True)]
        samples = [x if axis is None else torch.stack((x, y)) for x, y, axis in zip(call.plain, second, axes, strict=True)]
        with use_backend(backend):
            found = torch.vmap(differentiate, axes)(*samples)
            assert_same(found, torch.stack((eager(call, backend)[1][shared], differentiate(*second))), backend)


@each(alone)
@BOTH
def test_one_backward_pass_may_carry_several_gradients(row: Mechanism, case: Case, backend: str) -> None:
    call = draw(row, case)
    with use_backend(backend):
        out = call(*call.leaves)
        several = torch.stack((cotangent(out), cotangent(out).flip(-1)))
        found = torch.autograd.grad(out, call.leaves, several, is_grads_batched=True, retain_graph=True)
        loop = [torch.autograd.grad(out, call.leaves, one, retain_graph=True) for one in several]
    assert_same(list(found), [torch.stack(pair) for pair in zip(*loop, strict=True)], backend)


@each(random)
def test_mapped_dropout_is_the_dropout_of_one_large_batch(row: Mechanism, case: Case) -> None:
    call = draw(row, case)
    samples = [torch.stack((x, x)) for x in call.plain]
    if not all(row.inputs[name].axes.startswith("b") for name in call.names):
        with use_backend("triton"):
            out = seeded(torch.vmap(call, randomness="different"), *samples)
        assert not torch.equal(out[0], out[1])
        return  # no batch to fold them into
    folded = [x.flatten(0, 1).requires_grad_() for x in samples]

    def total(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        out: Tensor = call(*leaves)
        return (out * cotangent(out)).sum(), out

    twice = {name: torch.cat((x, x)) for name, x in call.others.items() if row.inputs[name].axes.startswith("b")}
    with use_backend("triton"):
        found, out = seeded(torch.vmap(torch.func.grad(total, call.positions, has_aux=True), randomness="different"), *samples)
        large = seeded(call, *folded, **twice)
    assert not torch.equal(out[0], out[1])
    assert torch.equal(out.flatten(0, 1), large)
    weights = torch.stack([cotangent(out[0])] * 2).flatten(0, 1)
    for x, expected in zip(found, torch.autograd.grad(large, folded, weights), strict=True):
        assert torch.equal(x.flatten(0, 1), expected)


@each(random)
def test_mapped_dropout_that_should_be_the_same_is_refused_or_the_same(row: Mechanism, case: Case) -> None:
    call = draw(row, case)
    samples = [torch.stack((x, x)) for x in call.plain]
    with use_backend("triton"):
        if all(row.inputs[name].axes.startswith("b") for name in call.names):
            with pytest.raises(Unsupported, match="randomness='same'"):
                torch.vmap(call, randomness="same")(*samples)
        else:  # one after the other they can be the same
            out = seeded(torch.vmap(call, randomness="same"), *samples)
            assert torch.equal(out[0], out[1])
            assert torch.equal(out[0], seeded(call, *call.plain))
        with pytest.raises(RuntimeError, match="randomness error mode"):
            torch.vmap(call)(*samples)
