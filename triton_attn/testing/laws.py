"""Properties that hold whatever the numbers are, checked on any callable with a row's signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from triton_attn.mechanism import Case, Law, Mechanism
from triton_attn.testing import inputs, numerics

Call = Callable[..., Any]
TIME = "l"


def check(row: Mechanism, law: Law, call: Call, case: Case, *, seed: int = 0, exact: bool = True) -> None:
    """AssertionError if `call` breaks the law on this case. `exact` asks for equal bits where the law promises them."""
    tensors, options = inputs.draw(row, case, seed=seed)
    _CHECKS[law](row, call, tensors, options, exact)


def _rows_sum_to_one(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    if options.get("dropout_p") or not options.get("normalize", True):
        return  # true on average only, or not at all
    if any(name in row.inputs for parts in row.packed.values() for name in parts if tensors[name] is not None):
        return  # what came before has other values
    if "eps" in row.options:
        options["eps"] = 0.0
    for name, given in row.inputs.items():
        if given.axes.endswith(" e") and tensors[name] is not None:
            tensors[name] = torch.ones_like(tensors[name])
    out, *more = call(**tensors, **options, **{row.more: True})
    truth = torch.ones_like(out)
    if "lse" in row.outputs:
        lse = dict(zip(list(row.outputs)[1:], more, strict=True))["lse"]
        axes, (*order, _) = row.outputs["lse"].axes.split(), row.outputs["out"].axes.split()
        truth = truth * (lse > -torch.inf).permute([axes.index(axis) for axis in order])[..., None]
    elif options.get("causal") and tensors.get("key_padding_mask") is not None:
        seen = (~tensors["key_padding_mask"]).cumsum(-1) > 0
        truth = truth * seen.view(seen.shape[0], *(1 for _ in out.shape[1:-2]), seen.shape[1], 1)
    _assert_close(row, tensors, options, out, truth)


def _future_changes_nothing(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    options["causal"] = True if row.options["causal"] == "bool" else "top_left"
    query = next(iter(row.inputs))
    if row.options["causal"] == "bool" and tensors[query].shape[-2] != tensors["key"].shape[2]:
        return  # no alignment to choose
    n = tensors["key"].shape[2]
    past = n // 2
    for name in (query, "key", "value"):
        tensors[name].requires_grad_()
    out = call(**tensors, **options)[..., :past, :]
    gradients = torch.autograd.grad(out.sum(), (tensors["key"], tensors["value"]))
    for name, gradient in zip(("key", "value"), gradients, strict=True):
        assert not gradient[:, :, past:].any(), f"a later {name} gets a gradient"
    changed = {**tensors, **{name: _replaced(tensors[name], past) for name in ("key", "value")}}
    assert torch.equal(out, call(**changed, **options)[..., :past, :]), "a later key changed an output"


def _padding_changes_nothing(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    batch, _, n = tensors["key"].shape[:3]
    if tensors.get("mask") is not None or options.get("causal"):
        return  # a mask or an alignment to the last key would have to grow with the keys
    given = tensors["key_padding_mask"]
    before = torch.zeros(batch, n, dtype=torch.bool) if given is None else given
    grown = {name: torch.cat((tensors[name], torch.full_like(tensors[name][:, :, :7], torch.nan)), 2) for name in ("key", "value")}
    added = grown["key"].shape[2] - n
    after = torch.cat((before, torch.ones(batch, added, dtype=torch.bool)), 1)
    query = next(iter(row.inputs))
    if row.inputs[query].axes.split()[-2] == row.inputs["key"].axes.split()[2] or row.equal_lengths(options):
        grown[query] = torch.cat((tensors[query], tensors[query][..., :added, :]), -2)
    alone = call(**{**tensors, "key_padding_mask": before}, **options)
    padded = call(**{**tensors, **grown, "key_padding_mask": after}, **options)[..., : alone.shape[-2], :]
    if exact:
        assert torch.equal(alone, padded), "keys that are masked changed an output"
    else:
        _assert_close(row, {**tensors, "key_padding_mask": before}, options, padded, alone)


def _key_order_changes_nothing(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    if options.get("causal") or options.get("dropout_p"):
        return  # both go by position
    order = torch.randperm(tensors["key"].shape[2], generator=torch.Generator().manual_seed(1))
    moved = {name: tensors[name][:, :, order] for name in ("key", "value")}
    if tensors.get("mask") is not None:
        moved["mask"] = tensors["mask"][..., order]
    if tensors["key_padding_mask"] is not None:
        moved["key_padding_mask"] = tensors["key_padding_mask"][:, order]
    _assert_close(row, tensors, options, call(**{**tensors, **moved}, **options), call(**tensors, **options))


def _branch_order_changes_nothing(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    query = next(name for name, given in row.inputs.items() if "r" in given.axes.split())
    order = torch.randperm(tensors[query].shape[1], generator=torch.Generator().manual_seed(1)).flip(0)
    out, moved = call(**tensors, **options), call(**{**tensors, query: tensors[query][:, order]}, **options)
    if exact:
        assert torch.equal(moved, out[:, order]), "a branch depends on its place among the others"
    else:
        _assert_close(row, {**tensors, query: tensors[query][:, order]}, options, moved, out[:, order])


def _batch_changes_nothing(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    if options.get("dropout_p"):
        return  # entries differ by their index in the batch
    if any(row.inputs[name].kind == "offsets" and x is not None for name, x in tensors.items()):
        return  # packed sequences are one item
    last = next(iter(tensors.values())).shape[0] - 1
    together = call(**tensors, **options)[last:]
    picked = {
        name: x if not isinstance(x, Tensor) or row.inputs[name].axes[:1] not in ("b", "q") or x.shape[0] == 1 else x[last:]
        for name, x in tensors.items()
    }
    alone = call(**picked, **options)
    if exact:
        assert torch.equal(together, alone), "an item's output depends on its batch"
    else:
        _assert_close(row, picked, options, alone, together)


def _resumes(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    if not options.get("causal"):
        return
    names = [part for parts in row.packed.values() for part in parts]
    whole, *last = call(**tensors, **options, **{row.more: True})
    length, timed = whole.shape[2], [name for name, given in row.inputs.items() if given.axes.split()[1:3] in (["h", "m"], ["g", "n"])]
    for cuts in ((length // 3,), (1, length - 1), (length // 2, length // 2 + 1)):
        state, found, start = [tensors[name] for name in names], [], 0
        for stop in (*cuts, length):
            part = {**tensors, **{name: tensors[name][:, :, start:stop] for name in timed}, **dict(zip(names, state, strict=True))}
            if tensors.get("key_padding_mask") is not None:
                part["key_padding_mask"] = tensors["key_padding_mask"][:, start:stop]
            out, *state = call(**part, **options, **{row.more: True})
            found.append(out)
            start = stop
        _assert_close(row, tensors, options, torch.cat(found, 2), whole)
        wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in tensors.items()}
        size = row.bound(**wide, **{f"grad_{next(iter(row.outputs))}": torch.zeros_like(whole, dtype=torch.float64)}, **options)
        for name, ours, theirs in zip(list(row.outputs)[1:], state, last, strict=True):
            numerics.assert_right([numerics.compare(name, ours, theirs, 2 * size[name], dtype=theirs.dtype)])


def _in_time(row: Mechanism, name: str) -> int | None:
    """Which axis of an input is time."""
    axes = row.inputs[name].axes.split()
    return axes.index(TIME) if TIME in axes else None


def _part(row: Mechanism, tensors: Mapping[str, Any], first: int, end: int) -> dict[str, Any]:
    """The steps from one to another of everything that has steps."""
    found = dict(tensors)
    for name, x in tensors.items():
        axis = _in_time(row, name)
        if x is not None and axis is not None:
            found[name] = x.narrow(axis, first, end - first)
    return found


def _steps(row: Mechanism, tensors: Mapping[str, Any]) -> int:
    name = next(iter(tensors))
    return int(tensors[name].shape[_in_time(row, name)])


def _offsets_of(row: Mechanism, tensors: Mapping[str, Any]) -> str | None:
    """The name of the offsets of a packed call."""
    return next((name for name, x in tensors.items() if row.inputs[name].kind == "offsets" and x is not None), None)


def _later_steps_change_nothing(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    steps = _steps(row, tensors)
    past = steps // 2
    timed = [name for name in row.differentiable if tensors[name] is not None and _in_time(row, name) is not None]
    leaves = {name: tensors[name].requires_grad_() for name in timed}
    out = call(**tensors, **options).narrow(-1, 0, past)
    for name, gradient in zip(timed, torch.autograd.grad(out.sum(), tuple(leaves.values())), strict=True):
        assert not gradient.narrow(_in_time(row, name) or 0, past, steps - past).any(), f"a later {name} gets a gradient"
    changed = dict(tensors)
    for name in timed:
        axis = _in_time(row, name) or 0
        before, after = tensors[name].detach().split((past, steps - past), axis)
        changed[name] = torch.cat((before, 2 * after), axis)
    assert torch.equal(out, call(**changed, **options).narrow(-1, 0, past)), "a later step changed an output"


def _resumes_anywhere(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    if _offsets_of(row, tensors) or any(row.inputs[name].kind == "index" and x is not None for name, x in tensors.items()):
        return  # what is packed resumes by sequence
    begins = next(name for name in row.inputs if name.startswith("initial_state"))
    steps = _steps(row, tensors)
    whole, last = call(**tensors, **options, **{row.more: True})
    for split in sorted({0, 1, steps // 2, steps - 1, steps}):
        first, state = call(**_part(row, tensors, 0, split), **options, **{row.more: True})
        rest = {**_part(row, tensors, split, steps), begins: state}
        second, found = call(**rest, **options, **{row.more: True})
        _assert_close(row, tensors, options, torch.cat((first, second), -1), whole)
        _assert_close(row, tensors, options, found, last, 1)


def _packed_is_separate(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    name = _offsets_of(row, tensors)
    if name is None:
        return
    together, states = call(**tensors, **options, **{row.more: True})
    ends = tensors[name].tolist()
    for number, (first, end) in enumerate(pairwise(ends)):
        one = {**_part(row, tensors, first, end), name: None}
        of_sequences = [other for other, given in row.inputs.items() if given.axes.startswith("q ") and tensors[other] is not None]
        one |= {other: tensors[other][number : number + 1] for other in of_sequences}
        alone, state = call(**one, **options, **{row.more: True})
        part = together.narrow(-1, first, end - first)
        if exact:
            assert torch.equal(alone, part), "a sequence's output depends on what it is packed with"
            assert torch.equal(state[0], states[number]), "a sequence's state depends on what it is packed with"
        else:
            _assert_close(row, one, options, alone, part)
            _assert_close(row, one, options, state, states[number : number + 1], 1)


def _masked_is_absent(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    masked = next((name for name, given in row.inputs.items() if given.kind == "mask" and tensors[name] is not None), None)
    if masked is None or _offsets_of(row, tensors):
        return
    timed = [name for name in row.differentiable if tensors[name] is not None and _in_time(row, name) is not None]
    for item in range(tensors[masked].shape[0]):
        kept = tensors[masked][item]
        one = {
            name: x if x is None or row.inputs[name].axes[:1] not in ("b", "q") else x[item : item + 1].detach().clone()
            for name, x in tensors.items()
        }
        short = {name: x if _in_time(row, name) is None or x is None else x[..., kept] for name, x in one.items()}
        for name in timed:
            one[name][..., ~kept] = torch.nan
            one[name].requires_grad_()
        found, state = call(**one, **options, **{row.more: True})
        expected, last = call(**{**short, masked: None}, **options, **{row.more: True})
        assert not found[..., ~kept].any(), "a masked step has an output"
        _assert_close(row, {**short, masked: None}, options, found[..., kept], expected)
        _assert_close(row, {**short, masked: None}, options, state, last, 1)
        for name, gradient in zip(timed, torch.autograd.grad(found.sum() + state.sum(), [one[name] for name in timed]), strict=True):
            assert gradient.isfinite().all(), f"a masked step's NaN reaches the gradient of {name}"
            assert not gradient[..., ~kept].any(), f"a masked step gives {name} a gradient"


def _reduces_to_attention(row: Mechanism, call: Call, tensors: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    assert row.reduction is not None
    if options.get("dropout_p"):
        return  # each call draws its own
    arguments = {**tensors, **options, **row.reduction.arguments(tensors, options)}
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}
    truth = row.reduction.equals(**{name: wide[name] for name in row.reduction.dense if name in wide})
    changed = {name: arguments[name] for name in tensors}
    _assert_close(row, changed, {name: arguments[name] for name in arguments if name not in tensors}, call(**arguments), truth)


_CHECKS: Mapping[Law, Callable[[Mechanism, Call, dict[str, Any], dict[str, Any], bool], None]] = {
    Law.LATER_STEPS_CHANGE_NOTHING: _later_steps_change_nothing,
    Law.RESUMES_ANYWHERE: _resumes_anywhere,
    Law.PACKED_IS_SEPARATE: _packed_is_separate,
    Law.MASKED_IS_ABSENT: _masked_is_absent,
    Law.ROWS_SUM_TO_ONE: _rows_sum_to_one,
    Law.FUTURE_CHANGES_NOTHING: _future_changes_nothing,
    Law.PADDING_CHANGES_NOTHING: _padding_changes_nothing,
    Law.KEY_ORDER_CHANGES_NOTHING: _key_order_changes_nothing,
    Law.BRANCH_ORDER_CHANGES_NOTHING: _branch_order_changes_nothing,
    Law.BATCH_CHANGES_NOTHING: _batch_changes_nothing,
    Law.RESUMES: _resumes,
    Law.REDUCES_TO_ATTENTION: _reduces_to_attention,
}


def _replaced(tensor: Tensor, past: int) -> Tensor:
    return torch.cat((tensor.detach()[:, :, :past], 3 - tensor.detach()[:, :, past:]), 2)


def _assert_close(
    row: Mechanism, tensors: Mapping[str, Any], options: Mapping[str, Any], found: Tensor, truth: Tensor, output: int = 0
) -> None:
    """Two results of equal worth may each err by their bound."""
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in tensors.items()}
    first, name = next(iter(row.outputs)), list(row.outputs)[output]
    like = next(iter(tensors.values())) if output else truth
    size = 2 * row.bound(**wide, **{f"grad_{first}": torch.zeros_like(like, dtype=torch.float64)}, **options)[name]
    numerics.assert_right([numerics.compare(name, found, truth, size, dtype=found.dtype)])
