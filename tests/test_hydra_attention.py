"""Hydra attention's kernel: branches read where they lie, and the state that all of them share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from triton_attn import CATALOG, hydra_attention, linear_attention, use_backend
from triton_attn.mechanism import Case
from triton_attn.testing import inputs

ROW = CATALOG["hydra_attention"]
SMALL = Case("small", {"b": 1, "r": 3, "h": 2, "m": 17, "n": 17, "d": 8, "e": 8, "f": 16}, {})


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("axis", [1, 3])
def test_branches_and_tokens_may_lie_beyond_two_to_the_31(axis: int) -> None:
    near, options = inputs.draw(ROW, SMALL, dtype=torch.float16)
    query = near["query_branches"]
    assert query is not None
    far = inputs.laid_out(query, inputs.FAR_ALONG[axis])
    assert far.stride(axis) * (far.shape[axis] - 1) >= 2**31
    code = ROW.kernels[-1].load()
    assert torch.equal(code.forward(**{**near, "query_branches": far}, **options), code.forward(**near, **options))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("causal", [False, True])
def test_each_branch_has_the_bits_of_a_linear_attention_of_its_own(causal: bool) -> None:
    tensors, _ = inputs.draw(ROW, SMALL)
    query, key, value = (tensors[name] for name in ("query_branches", "key", "value"))
    assert query is not None
    options: dict[str, Any] = {"feature_map": "crelu", "causal": causal, "return_state": True}
    with use_backend("triton"):
        out, state = hydra_attention(query, key, value, **options)  # type: ignore[arg-type]
        for branch, alone in zip(query.unbind(1), out.unbind(1), strict=True):
            expected, last = linear_attention(branch, key, value, **options)  # type: ignore[arg-type]
            assert torch.equal(alone, expected)
            assert all(map(torch.equal, state, last))
