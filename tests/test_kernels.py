"""Every kernel and every portable path against its reference, on drawn calls: all tiers, forward and backward.

Kernels run under the strict interpreter: out of bounds, races, overflow and the like are failures too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calls import kinds
from triton_attn import CATALOG, use_backend, verify
from triton_attn.mechanism import Case, Kernel, Law, Mechanism
from triton_attn.testing import inputs, laws, numerics, strategies
from triton_attn.tiles import Tile

pytestmark = pytest.mark.usefixtures("strict")
CPU = torch.device("cpu")
KERNELS = [pytest.param(row, kernel, id=f"{row.name}-{kernel.name}") for row in CATALOG.values() for kernel in row.kernels]
ROWS = [pytest.param(row, id=row.name) for row in CATALOG.values()]
SOFTMAX = [pytest.param(row, id=row.name) for row in CATALOG.values() if "query" in row.inputs]
BATCHED = [pytest.param(row, id=row.name) for row in CATALOG.values() if "query" in row.inputs and "key_padding_mask" in row.inputs]
RECURRENT = [pytest.param(row, id=row.name) for row in CATALOG.values() if laws.TIME in row.cases[0].sizes]
LAWS = [pytest.param(row, law, id=f"{row.name}-{law.name.lower()}") for row in CATALOG.values() for law in row.laws]


def _resized(row: Mechanism, case: Case, **sizes: int) -> Case:
    """The case with other sizes, of the axes it has."""
    changed = {axis: sizes.get(axis, size) for axis, size in case.sizes.items()}
    return Case(case.name, row.fitted(changed, case.options), case.options)


def every(row: Mechanism) -> Sequence[Case]:
    return row.cases


def kernels_own(row: Mechanism, kernel: Kernel, case: Case) -> Case:
    """The case without what a special kernel refuses: masks, and rows that are no multiple of 16 bytes."""
    if kernel is row.kernels[-1]:
        return case
    sizes = {axis: -(-size // 8) * 8 if axis in "de" else size for axis, size in case.sizes.items()}
    options = {name: value for name, value in case.options.items() if name not in row.inputs}
    own = Case(case.name, sizes, options)
    assert not verify.refused(row, kernel.name, own, torch.float16)
    return own


@pytest.mark.parametrize(("row", "kernel"), KERNELS)
@settings(max_examples=settings().max_examples // 2)  # half a minute for the slowest row
@given(data=st.data())
def test_kernel_matches_its_reference(row: Mechanism, kernel: Kernel, data: st.DataObject) -> None:
    case = kernels_own(row, kernel, data.draw(strategies.cases(row)))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    tile = data.draw(strategies.tiles)
    run = verify.kernel_run(row, kernel.load(), tile)
    layout = data.draw(strategies.layouts) if kernel is row.kernels[-1] else inputs.CONTIGUOUS
    drawn: dict[str, Any] = {"seed": data.draw(strategies.seeds), "spread": data.draw(strategies.spreads), "layout": layout}
    numerics.assert_right(verify.judge(row, case, run, dtype=dtype, where=CPU, **drawn), (case, dtype, tile, drawn))


@pytest.mark.parametrize("row", ROWS)
@given(data=st.data())
def test_portable_matches_its_reference(row: Mechanism, data: st.DataObject) -> None:
    case = data.draw(strategies.cases(row))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64)))
    drawn: dict[str, Any] = {
        "seed": data.draw(strategies.seeds),
        "spread": data.draw(strategies.spreads),
        "layout": data.draw(strategies.layouts),
    }
    more = data.draw(st.booleans())  # one output may come by another way than all of them
    run = verify.differentiable_run(row, row.portable, more=more)
    verdict = verify.judge(row, case, run, dtype=dtype, where=CPU, borrowed=True, more=more, **drawn)
    numerics.assert_right(verdict, (case, dtype, more, drawn))


@pytest.mark.parametrize(("row", "law"), LAWS)
@pytest.mark.parametrize(
    ("backend", "cases"),
    [
        ("portable", every),
        ("reference", every),
        ("triton", kinds),  # interpreted
        pytest.param("triton", every, marks=pytest.mark.slow),
    ],
)
def test_law_holds(row: Mechanism, law: Law, backend: str, cases: Callable[[Mechanism], Sequence[Case]]) -> None:
    def call(*, seed: Any = None, **arguments: Any) -> Any:
        torch.manual_seed(3)
        with use_backend(backend):
            return row.call(**arguments)

    for case in cases(row):
        laws.check(row, law, call, case, exact=backend == "triton")


@pytest.mark.parametrize(("row", "kernel"), KERNELS)
def test_inputs_are_left_as_they_were(row: Mechanism, kernel: Kernel) -> None:
    for case in kinds(row):
        tensors, options = inputs.draw(row, kernels_own(row, kernel, case))
        before = {name: x.clone() for name, x in tensors.items() if x is not None}
        grads = [torch.randn(inputs.shape(out.axes, case.sizes)) for out in row.outputs.values()]
        verify.kernel_run(row, kernel.load())(tensors, options, grads)
        for name, x in before.items():
            assert torch.equal(x, tensors[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("row", SOFTMAX)
@pytest.mark.parametrize("width", [64, 80, 96, 104, 256])
def test_heads_of_any_width(row: Mechanism, width: int) -> None:
    few = {"b": 1, "h": 1, "g": 1, "m": 20, "n": 17, "d": width, "e": width if width < 100 else 24}
    case = _resized(row, row.cases[0], **few)
    run = verify.kernel_run(row, row.kernels[-1].load(), Tile(16, 16, 4, 1))
    numerics.assert_right(verify.judge(row, case, run, dtype=torch.float16, where=CPU), width)


@pytest.mark.parametrize("row", RECURRENT)
@pytest.mark.parametrize("width", [16, 17, 64, 100, 256])
def test_states_of_any_width(row: Mechanism, width: int) -> None:
    case = _resized(row, row.cases[0], b=1, d=3, l=7, s=width)
    run = verify.kernel_run(row, row.kernels[-1].load(), Tile(2, 4, 4, 1))
    numerics.assert_right(verify.judge(row, case, run, dtype=torch.float32, where=CPU), width)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("empty", ["b", "h", "m", "n", "l"])
def test_empty_axes_give_zeros_or_nothing(row: Mechanism, empty: str) -> None:
    if empty not in row.cases[0].sizes:
        pytest.skip("no such axis")
    case = _resized(row, row.cases[0], **{empty: 0}, **({"g": 0} if empty == "h" else {}))
    for run in (verify.kernel_run(row, row.kernels[-1].load()), verify.differentiable_run(row, row.portable)):
        numerics.assert_right(verify.judge(row, case, run, dtype=torch.float32, where=CPU), empty)


@pytest.mark.parametrize("row", RECURRENT)
@pytest.mark.parametrize("axis", [0, 1])
def test_strides_of_steps_beyond_two_to_the_31(row: Mechanism, axis: int) -> None:
    near, options = inputs.draw(row, _resized(row, row.cases[0], b=3 if axis == 0 else 1, d=4, l=5, s=3), dtype=torch.float16)
    far = {name: x if x is None or x.ndim < 3 else inputs.laid_out(x, inputs.FAR) for name, x in near.items()}
    first = next(iter(far.values()))
    assert first is not None
    assert first.stride(axis) * (first.shape[axis] - 1) >= 2**31
    code = row.kernels[-1].load()
    assert torch.equal(code.forward(**far, **options), code.forward(**near, **options))


@pytest.mark.parametrize("row", BATCHED)
@pytest.mark.parametrize("axis", [0, 2])
def test_strides_beyond_two_to_the_31(row: Mechanism, axis: int) -> None:
    few = {"b": 3 if axis == 0 else 2, "h": 1, "g": 1, "m": 17, "n": 17, "d": 16, "e": 16}
    near, options = inputs.draw(row, _resized(row, row.cases[0], **few), dtype=torch.float16)
    far = {name: x if x is None or x.ndim < 4 else inputs.laid_out(x, inputs.FAR) for name, x in near.items()}
    query = far["query"]
    assert query is not None
    assert query.stride(axis) * (query.shape[axis] - 1) >= 2**31
    code = row.kernels[-1].load()
    assert torch.equal(code.forward(**far, **options), code.forward(**near, **options))


@pytest.mark.parametrize("row", BATCHED)
@pytest.mark.parametrize("backend", ["triton", "portable", "reference"])
def test_padded_keys_may_hold_nan(row: Mechanism, backend: str) -> None:
    tensors, options = inputs.draw(row, next(case for case in row.cases if "key_padding_mask" in case.options))
    tensors.pop("seed", None)
    leaves = [x.requires_grad_() for name in row.differentiable if (x := tensors[name]) is not None]
    with use_backend(backend):
        clean = row.call(**tensors, **options)
        padded = tensors["key_padding_mask"][:, None, :, None]  # type: ignore[index]
        dirty = {name: tensors[name].masked_fill(padded, torch.nan) for name in ("key", "value")}  # type: ignore[union-attr]
        out = row.call(**{**tensors, **dirty}, **options)
    assert torch.equal(out, clean)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.isfinite().all()


def test_nan_in_one_query_stays_in_its_row() -> None:
    row = CATALOG["attention"]
    tensors, options = inputs.draw(row, row.cases[0])
    tensors["query"][0, 0, 5] = torch.nan  # type: ignore[index]
    out = row.kernels[-1].load().forward(**tensors, **options)
    assert out[0, 0, 5].isnan().all()
    out[0, 0, 5] = 0.0
    assert out.isfinite().all()


@pytest.mark.parametrize(("row", "kernel"), KERNELS)
def test_expanded_gradients_are_read_through_their_strides(row: Mechanism, kernel: Kernel) -> None:
    """out.sum().backward() hands over a gradient whose strides are all 0."""
    case = row.cases[0]
    tensors, options = inputs.draw(row, case)
    code = kernel.load()
    outputs = code.forward(**tensors, **options, **{row.more: True})
    named = dict(zip(row.outputs, outputs, strict=True))
    ones = torch.ones(()).expand(outputs[0].shape)
    others = [None] * (len(outputs) - 1)
    backward = partial(code.backward, **tensors, **named, **options, needs=[tensors[name] is not None for name in row.differentiable])
    for expanded, packed in zip(backward(ones, *others), backward(ones.contiguous(), *others), strict=True):
        assert torch.equal(expanded, packed)
