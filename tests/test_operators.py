"""The operators made of every row: schemas, fakes and what they hand out, checked by torch and through real calls."""

from __future__ import annotations

import pytest
import torch

from tests.calls import alone, each, kinds, recorded
from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import inputs

LAYOUTS = (inputs.PERMUTED, inputs.SLICED, inputs.EXPANDED)


@each(kinds)
def test_operators_keep_the_rules_of_torch(row: Mechanism, case: Case) -> None:
    operator, forward, backward = recorded(row, case)
    torch.library.opcheck(operator.forward, forward)
    torch.library.opcheck(operator.backward, backward)


@each(alone)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_have_the_strides_of_results_whatever_the_layout(row: Mechanism, case: Case, layout: str) -> None:
    operator, forward, backward = recorded(row, case, layout=layout)
    torch.library.opcheck(operator.forward, forward, test_utils="test_faketensor")
    torch.library.opcheck(operator.backward, backward, test_utils="test_faketensor")


@each(alone)
def test_a_gradient_that_nobody_needs_is_an_empty_vector(row: Mechanism, case: Case) -> None:
    operator, _, (*args, needs) = recorded(row, case)
    drawn, _ = inputs.draw(row, case)
    assert needs == [drawn[name] is not None for name in row.differentiable]
    whole = operator.backward(*args, needs)
    for position in range(sum(needs)):
        alone = [other == position for other in range(len(needs))]
        torch.library.opcheck(operator.backward, (*args, alone), test_utils="test_faketensor")
        for needed, gradient, expected in zip(alone, operator.backward(*args, alone), whole, strict=False):
            assert torch.equal(gradient, expected if needed else torch.empty(0))
