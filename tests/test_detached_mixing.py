"""torchscale's gradient: branches weighed by constants. Its rule is written out here; the output is that of one softmax."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.dilated_peers import _gathered
from triton_attn import ArgumentError, dilated_attention, operators, use_backend
from triton_attn.functional.dilated_attention import ROW
from triton_attn.nn import DilatedAttention

PATTERN: dict[str, Any] = {"segment_lengths": (8, 16, 32), "dilation_rates": (1, 2, 3)}


def drawn(heads: int = 3, groups: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, h, 27, 8, dtype=dtype, generator=generator).requires_grad_() for h in (heads, groups, groups)]


def torchscale(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """gather, attend, log-sum-exp, weights without a gradient, scatter."""
    b, h, n, d = query.shape
    outs, lses = [], []
    for length, rate in zip(PATTERN["segment_lengths"], PATTERN["dilation_rates"], strict=True):
        out, lse = torch.zeros_like(query), query.new_full((b, h, n), -torch.inf)
        for head in range(h):
            offset = head // -(-h // rate)
            for start in range(0, n, length):
                at = torch.arange(start + offset, min(start + length, n), rate)
                if not len(at):
                    continue
                scores = query[:, head, at] @ key[:, head, at].mT * d**-0.5
                if causal:
                    scores = scores.masked_fill(torch.ones(len(at), len(at), dtype=torch.bool).triu(1), -torch.inf)
                out = out.index_put(
                    (torch.tensor([[i] for i in range(b)]), torch.tensor(head), at), scores.softmax(-1) @ value[:, head, at]
                )
                lse = lse.index_put((torch.tensor([[i] for i in range(b)]), torch.tensor(head), at), scores.logsumexp(-1))
        outs.append(out)
        lses.append(lse)
    with torch.no_grad():
        weights = torch.stack(lses).softmax(0).nan_to_num().unsqueeze(-1)
    return (weights * torch.stack(outs)).sum(0)


@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_is_a_loop_over_branches(causal: bool) -> None:
    leaves = drawn()
    with use_backend("reference"):
        both = dilated_attention(*leaves, **PATTERN, causal=causal), torchscale(*leaves, causal=causal)
        torch.testing.assert_close(*both)
        detached = dilated_attention(*leaves, **PATTERN, causal=causal, detach_mixing=True)
    weight = torch.randn_like(detached)
    for a, b in zip(*(torch.autograd.grad(x, leaves, weight) for x in (detached, both[1])), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_output_and_gradients_are_torchscale_s(causal: bool) -> None:
    leaves = drawn()
    ours, theirs = dilated_attention(*leaves, **PATTERN, causal=causal, detach_mixing=True), torchscale(*leaves, causal=causal)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    found, expected, exact = (
        torch.autograd.grad(x, leaves, weight) for x in (ours, theirs, dilated_attention(*leaves, **PATTERN, causal=causal))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    # of queries and keys it is another gradient, and by much; of values it is the same
    for a, b in zip(found[:2], exact[:2], strict=True):
        assert (a - b).norm() > 0.05 * b.norm()
    torch.testing.assert_close(found[2], exact[2])


def test_output_and_log_sum_exp_are_those_of_one_softmax() -> None:
    leaves = drawn(4, 2)
    padding = torch.arange(27) >= torch.tensor([[27], [11]])
    options: tuple[dict[str, Any], ...] = ({}, {"key_padding_mask": padding}, {"offset_rule": "mod", "scale": 0.3})
    call: Any = dilated_attention
    for more in options:
        both = [call(*leaves, **PATTERN, **more, detach_mixing=detach, return_lse=True) for detach in (False, True)]
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b)


def test_the_benchmark_s_peer_is_the_same_function() -> None:
    leaves = [torch.randn(2, 5, 64, 16).requires_grad_() for _ in range(3)]
    pattern: dict[str, Any] = {"segment_lengths": (16, 32, 64), "dilation_rates": (1, 2, 4), "causal": True}
    both = _gathered(*leaves, **pattern), dilated_attention(*leaves, **pattern, detach_mixing=True)
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in both), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_kernels_compute_it() -> None:
    pytest.importorskip("triton")
    leaves = [x[:1, :2].detach().requires_grad_() for x in drawn(dtype=torch.float32)]
    expected = torchscale(*leaves, causal=True)
    with use_backend("triton"):
        out = dilated_attention(*leaves, **PATTERN, causal=True, detach_mixing=True)
        found = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "portable"])
@pytest.mark.parametrize("number", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_nothing_is_kept_for_a_branch(backend: str, number: int) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    leaves = drawn(dtype=torch.float32)
    pattern = {name: branches[:number] for name, branches in PATTERN.items()}
    kept: dict[int, int] = {}  # bytes by where they lie

    def note(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.nbytes
        return x

    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = dilated_attention(*leaves, **pattern, detach_mixing=True)
    lse = 4 * out[..., 0].numel()
    assert sum(kept.values()) == sum(x.nbytes for x in leaves) + out.nbytes + lse


def test_the_backward_pass_takes_memory_for_one_branch_at_a_time() -> None:
    pytest.importorskip("triton")
    from triton_attn.capacity import workspace

    backward = operators.operator(ROW).backward
    x, out, lse = torch.empty(2, 3, 40, 16), torch.empty(2, 3, 40, 8), torch.empty(2, 3, 40)
    value = out

    def taken(number: int, detach: bool) -> int:
        pattern = [branches[:number] for branches in PATTERN.values()]
        options = *pattern, "longnet", "block", "count", detach, "", 0.25, 0.0
        return workspace(backward, (out, None, x, x, value, None, None, out, lse, *options, [True] * 3))

    assert taken(3, detach=False) == lse.nbytes
    # the output of a branch and what it adds to the gradients
    assert taken(2, detach=True) == taken(3, detach=True) == 2 * x.nbytes + value.nbytes + out.nbytes + lse.nbytes


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.slow), "portable", "reference"])
def test_dropout_drops_a_pair_in_all_of_its_branches_and_gradients_are_of_what_is_left(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    leaves, call = drawn(dtype=torch.float32), partial(dilated_attention, **PATTERN, dropout_p=0.4)
    found = []
    for detach in (False, True):
        torch.manual_seed(0)
        with use_backend(backend):
            out = call(*leaves, detach_mixing=detach)
            found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    (plain, *_, exact), (out, *_, dv) = found
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dv, exact, rtol=1e-3, atol=1e-4)  # values have the same gradient
    assert not torch.allclose(found[0][1], found[1][1], rtol=0.05)


def test_head_groups_mix_nothing_and_modules_pass_it_on() -> None:
    leaves = drawn()
    plain, detached = (dilated_attention(*leaves, **PATTERN, mode="head_group", detach_mixing=detach) for detach in (False, True))
    assert torch.equal(plain, detached)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (plain, detached)), strict=True):
        assert torch.equal(a, b)
    module = DilatedAttention(*PATTERN.values(), detach_mixing=True)
    rows = [x.detach().transpose(1, 2).requires_grad_() for x in leaves]
    (found,) = torch.autograd.grad(module(*rows).square().sum(), rows[:1])
    (expected,) = torch.autograd.grad(torchscale(*leaves, causal=False).square().sum(), leaves[:1])
    torch.testing.assert_close(found.transpose(1, 2), expected)


def test_branches_that_share_no_keys_cannot_be_detached() -> None:
    with pytest.raises(ArgumentError, match="overlap is 'unique' beside detach_mixing; allowed: 'count'"):
        dilated_attention(*drawn(), **PATTERN, overlap="unique", detach_mixing=True)
    with pytest.raises(ArgumentError, match="detach_mixing is 1, a int; allowed: True, False"):
        dilated_attention(*drawn(), **PATTERN, detach_mixing=1)  # type: ignore[arg-type]
