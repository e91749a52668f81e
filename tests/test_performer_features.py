"""Features of the Performer's module: when they are drawn anew, who has which, and what a checkpoint of either kind keeps of that."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triton_attn import ArgumentError, orthogonal_projection
from triton_attn.nn import PerformerAttention

DIM, HEADS, M = 24, 3, 16
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])


def layer(**options: Any) -> PerformerAttention:
    return PerformerAttention(DIM, HEADS, M, **options).train()


def tokens() -> Tensor:
    return torch.randn(1, 5, DIM, requires_grad=True)


@REENTRANT
def test_a_call_that_is_computed_again_neither_counts_nor_redraws(reentrant: bool) -> None:
    plain, x = layer(redraw_interval=1000), tokens()
    plain._calls = 999
    saved = copy.deepcopy(plain)
    (wanted,) = torch.autograd.grad(plain(x).square().sum(), x)
    checkpoint(saved, x, use_reentrant=reentrant).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted, rtol=0, atol=0)
    assert (saved.draws, saved._calls) == (0, 1000)


@REENTRANT
def test_a_call_that_is_computed_again_has_its_own_features(reentrant: bool) -> None:
    """Those of its first time, whatever was drawn since."""
    plain = layer(redraw_interval=1)
    saved, xs = copy.deepcopy(plain), [tokens() for _ in range(3)]
    wanted = torch.autograd.grad(sum(plain(x).square().sum() for x in xs), xs)
    outs = [checkpoint(saved, x, use_reentrant=reentrant) for x in xs]
    for out in outs:  # in the order of the calls, as a pipeline does
        out.square().sum().backward()
    assert (saved.draws, saved._calls) == (2, 3)
    for x, gradient in zip(xs, wanted, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad, gradient, rtol=0, atol=0)


def test_two_calls_may_come_before_one_backward_pass() -> None:
    module, x = layer(redraw_interval=1), tokens()
    before = module.random_matrix
    (module(x) + module(x)).sum().backward()
    assert module.random_matrix is not before
    assert "random_matrix" in dict(module.named_buffers())
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_features_drawn_in_inference_mode_can_be_trained_with() -> None:
    module, x = layer(redraw_interval=1), tokens()
    with torch.inference_mode():
        module(x)
        module(x)
    assert module.draws == 1
    module.eval()(x).sum().backward()


def test_calls_that_are_mapped_are_counted() -> None:
    module = layer(redraw_interval=1)
    out = torch.func.vmap(module)(torch.randn(2, 1, 5, DIM))
    assert out.shape == (2, 1, 5, DIM)
    assert module._calls == 1


def test_a_compiled_call_has_the_features_that_were_drawn_after_it() -> None:
    module, x = layer().eval(), torch.randn(1, 5, DIM)
    compiled: Callable[..., Tensor] = torch.compile(module, fullgraph=True, backend="aot_eager")
    first = compiled(x)
    module.redraw()
    torch.testing.assert_close(compiled(x), module(x))
    assert not torch.equal(compiled(x), first)


def sequence(module: PerformerAttention, calls: int) -> list[Tensor]:
    found = []
    for _ in range(calls):
        module(torch.randn(1, 3, DIM))
        found.append(module.random_matrix)
    return found


def test_training_that_is_resumed_draws_what_it_would_have_drawn() -> None:
    module = layer(redraw_interval=2)
    sequence(module, 3)
    file = io.BytesIO()
    torch.save({"model": torch.nn.ModuleDict({"a": module}).state_dict()}, file)
    file.seek(0)
    again = layer(redraw_interval=2)
    torch.nn.ModuleDict({"a": again}).load_state_dict(torch.load(file, weights_only=True)["model"])
    assert all(map(torch.equal, sequence(again, 4), sequence(module, 4)))
    assert (again.draws, again._calls) == (3, 7)


def test_tensors_alone_load_and_leave_the_count_as_it_is() -> None:
    """As from safetensors, or from the original: no key is ours alone."""
    module, state = layer(redraw_interval=1, seed=5), layer().state_dict()
    sequence(module, 3)
    assert set(state) == {"random_matrix", *(f"{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias"))} | {
        "out_proj.weight",
        "out_proj.bias",
    }
    module.load_state_dict(dict(state))
    assert torch.equal(module.random_matrix, state["random_matrix"])
    assert (module.seed, module.draws, module._calls) == (5, 2, 3)


def test_layers_have_features_of_their_own_which_torch_s_seed_repeats() -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append([layer().random_matrix for _ in range(2)])
    assert not torch.equal(*found[0])
    assert all(map(torch.equal, found[0], found[1]))
    assert not torch.equal(found[0][0], found[2][0])
    assert torch.equal(layer(seed=3).random_matrix, layer(seed=3).random_matrix)
    drawn = [layer(seed=seed).random_matrix for seed in (0, 1, 2, 2**31, 2**32 - 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_parameters_that_are_reset_have_the_features_that_the_seed_begins_with() -> None:
    module = layer(seed=2**32 - 1, device="meta")
    module.to_empty(device="cpu")
    module.reset_parameters()
    built = layer(seed=2**32 - 1, redraw_interval=1)
    assert torch.equal(module.random_matrix, built.random_matrix)
    sequence(built, 2)
    assert not torch.equal(module.random_matrix, built.random_matrix)
    built.reset_parameters()
    assert torch.equal(module.random_matrix, built.random_matrix)
    assert (built.draws, built._calls) == (0, 0)


def test_a_device_of_a_context_is_where_a_projection_lies() -> None:
    with torch.device("meta"):
        assert orthogonal_projection(4, 3, generator=torch.Generator("cpu")).is_meta
        assert orthogonal_projection(4, 3, 1, device="cpu").shape == (4, 3)


@pytest.mark.parametrize("seed", [2**32, -1])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(ArgumentError, match=f"^PerformerAttention: seed is {seed}; allowed: a whole number, 0 to 4294967295"):
        layer(seed=seed)
    with pytest.raises(ArgumentError, match=r"^PerformerAttention: draw is -1"):
        layer().redraw(-1)
