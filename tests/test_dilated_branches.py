"""Branches of dilated attention: in any order, of any numbers, in memory for some rows; the originals' defects in mixing them."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_attn import dilated_attention, use_backend
from triton_attn.functional.dilated_attention import LONGEST, ROW
from triton_attn.nn import DilatedAttention, ImprovedDilatedAttention
from triton_attn.portable import _rows

BACKENDS = pytest.mark.parametrize("backend", ["portable", "reference"])
attend: Any = dilated_attention
BRANCHES = ((8, 1), (16, 2), (12, 3))


def pattern(branches: Any) -> dict[str, Any]:
    lengths, rates = zip(*branches, strict=True)
    return {"segment_lengths": lengths, "dilation_rates": rates}


def drawn(n: int = 27, heads: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, heads, n, 8, dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]


@BACKENDS
@pytest.mark.parametrize("more", [{}, {"causal": True}, {"overlap": "unique"}, {"detach_mixing": True}, {"return_lse": True}], ids=str)
def test_the_order_of_branches_changes_nothing(backend: str, more: dict[str, Any]) -> None:
    leaves, found = drawn(), []
    for branches in permutations(BRANCHES):
        with use_backend(backend):
            result = attend(*leaves, **pattern(branches), **more)
        outs = result if more.get("return_lse") else (result,)
        total = torch.stack([(out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outs]).sum()
        found.append((*outs, *torch.autograd.grad(total, leaves)))
    for other in found[1:]:
        for x, y in zip(other, found[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("rate", [10**7, 2**70])
@pytest.mark.parametrize("more", [{}, {"return_lse": True}, {"overlap": "unique"}, {"mode": "head_group"}, {"offset_rule": "mod"}], ids=str)
def test_a_rate_beyond_the_segment_selects_one_token(backend: str, rate: int, more: dict[str, Any]) -> None:
    leaves = drawn()
    expected: Any = ROW.reference(*leaves, **pattern(((8, 27), (27, 2))), **more)
    with use_backend(backend):
        found = attend(*leaves, **pattern(((8, rate), (2**70, 2))), **more)
    torch.testing.assert_close(found, expected)


def test_kernels_refuse_more_classes_than_programs() -> None:
    tensors: Any = {name: torch.empty(1, 2, 64, 16) for name in ("query", "key", "value")}
    (kernel,) = ROW.kernels
    assert not kernel.refuses(tensors, {"dilation_rates": [1, 4, 6]})
    (said,) = kernel.refuses(tensors, {"dilation_rates": [10007, 10009, 10037]})
    assert said == f"dilation_rates have the least common multiple {10007 * 10009 * 10037}; kernels serve up to {LONGEST // 2}"


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most numbers that an operator makes at once."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(x, Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("how", ["lse", "padding", "float64"])
def test_causal_rows_are_looked_at_some_at_a_time(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "SCORES_AT_ONCE", 2**10)
    n = 256
    dtype = torch.float64 if how == "float64" else torch.float32
    leaves = [torch.randn(1, 1, n, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    options: dict[str, dict[str, Any]] = {
        "lse": {"return_lse": True},
        "padding": {"key_padding_mask": torch.arange(n)[None] > 200},
    }
    with use_backend("portable"), Largest() as largest:  # type: ignore[no-untyped-call]
        more = options.get(how, {})
        result = attend(*leaves, **pattern(((n, 1), (64, 2))), causal=True, **more)
        out = result[0] if how == "lse" else result
        torch.autograd.grad(out.sum(), leaves)
    assert largest.most < n * n // 4


# the originals' defects


@BACKENDS
def test_a_log_sum_exp_of_zero_is_one_of_a_selected_token(backend: str) -> None:
    """torchscale takes it for that of a token that the branch leaves out."""
    _, key, value = (x[:1] for x in drawn(8))
    with use_backend(backend):
        out = attend(torch.zeros_like(key), key, value, **pattern(((1, 1), (4, 1))))
    # every score is 0: a token alone has log 1, and with three others log 4
    others = value.view(1, 3, 2, 4, 8).sum(3, keepdim=True).expand(-1, -1, -1, 4, -1).flatten(2, 3)
    torch.testing.assert_close(out, (value + others) / 5)


@pytest.mark.parametrize("mode", ["longnet", "head_group"])
def test_outputs_stay_among_the_values(mode: str) -> None:
    """dilated-attention-pytorch divides by the sum of its outputs, which is about 0 as often as not."""
    query, key, value = (x.detach().transpose(1, 2) for x in drawn())
    value = value - value.mean((0, 1, 2), keepdim=True)
    out = DilatedAttention((8, 16), (1, 2), mode=mode)(query, key, value)
    assert out.abs().max() <= value.abs().max() * (1 + 1e-5)


def test_dropout_falls_once() -> None:
    """DarcStar's fork drops among the weights and again among its outputs."""
    n = 32
    query, key = (x.detach().transpose(1, 2) for x in drawn(n)[:2])
    value = torch.eye(n)[None, :, None].expand(2, -1, 3, -1)  # the output is the weights
    module = ImprovedDilatedAttention((n,), (1,), dropout=0.5)
    torch.manual_seed(0)
    out, plain = module(query, key, value), module.eval()(query, key, value)
    kept = out != 0
    torch.testing.assert_close(out[kept], 2 * plain[kept])
    assert 0.47 < kept.float().mean() < 0.53
