"""Modules in linear time: any width and number of features, and what they say of arguments that are none of theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from triton_attn import ArgumentError, pool_tokens
from triton_attn.arguments import ArgumentTypeError
from triton_attn.nn import HydraAttention, LinearAttentionBlock, LinearSelfAttention, PerformerAttention, RippleAttention

DIM, HEADS, M = 24, 3, 20
MODULES: dict[str, Callable[[], nn.Module]] = {
    "performer": lambda: PerformerAttention(DIM, HEADS, M),
    "linear": lambda: LinearSelfAttention(DIM, HEADS),
    "block": lambda: LinearAttentionBlock(DIM, HEADS),
    "block of mamba": lambda: LinearAttentionBlock(DIM, HEADS, "mamba"),
    "hydra": lambda: HydraAttention(DIM, 2, 4),
    "ripple": lambda: RippleAttention(DIM, 2, 4),
}
EACH = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())

WIDE: dict[str, Callable[[], nn.Module]] = {
    "elu": lambda: PerformerAttention(DIM, HEADS, 257),
    "relu": lambda: PerformerAttention(DIM, HEADS, 266, "relu"),
    "linear": lambda: LinearSelfAttention(600, 2),
    "hydra": lambda: HydraAttention(DIM, 2, 129),
    "ripple": lambda: RippleAttention(DIM, 2, 129),
    "ripple v1": lambda: RippleAttention(DIM, 2, 257, variant="v1"),
}


@pytest.mark.parametrize("make", WIDE.values(), ids=WIDE.keys())
def test_what_no_kernel_serves_is_served(make: Callable[[], nn.Module]) -> None:
    module = make()
    x = torch.randn(1, 5, getattr(module, "dim", DIM))
    out = module(x)
    assert out.shape == x.shape
    assert out.isfinite().all()


@EACH
def test_a_mask_that_is_no_tensor_is_named(make: Callable[[], nn.Module]) -> None:
    module = make()
    with pytest.raises(ArgumentTypeError, match=f"^{type(module).__name__}: (key_padding_)?mask is a list; allowed: torch.Tensor"):
        module(torch.ones(1, 2, DIM), [False, True])


@EACH
@pytest.mark.parametrize("x", [torch.ones(1, 2, DIM + 1), torch.ones(2, DIM), [1.0]], ids=["width", "axes", "list"])
def test_tokens_that_do_not_fit_are_named(make: Callable[[], nn.Module], x: Any) -> None:
    module = make()
    with pytest.raises(ArgumentError, match=f"^{type(module).__name__}: x "):
        module(x)


@pytest.mark.parametrize("grid", [5, "ab", (4,), (4, 4.0), (-2, -8), (0, 4)], ids=str)
def test_a_grid_that_is_none_is_named_when_the_module_is_built(grid: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^RippleAttention: grid_size "):
        RippleAttention(DIM, 2, 4, grid_size=grid)


def test_a_flag_of_pooling_is_a_flag() -> None:
    with pytest.raises(ArgumentTypeError, match=r"^pool_tokens: return_count is 'x'"):
        pool_tokens(torch.ones(1, 1, 4, 4), return_count="x")  # type: ignore[arg-type]


def test_steps_of_linear_attention_are_its_forward() -> None:
    module, x = LinearSelfAttention(DIM, HEADS, causal=True, dtype=torch.float64), torch.randn(2, 7, DIM, dtype=torch.float64)
    first, state = module.step(x[:, :4])
    outs = [first]
    for t in range(4, 7):
        out, state = module.step(x[:, t : t + 1], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), module(x), rtol=1e-10, atol=1e-12)
    with pytest.raises(ArgumentError, match="causal is False; allowed for step: True"):
        LinearSelfAttention(DIM, HEADS).step(torch.ones(1, 1, DIM))


def of_linear(name: str, inner: int, outer: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outer, inner), f"{name}.bias": (outer,)}


# what dictionaries of HierarchicalVLM's blocks hold: name -> shape
AROUND = {
    **of_linear("ffn.0", DIM, 4 * DIM),
    **of_linear("ffn.3", 4 * DIM, DIM),
    **{f"{norm}.{part}": (DIM,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
}
BLOCKS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "performer": (
        lambda: LinearAttentionBlock(DIM, HEADS, "performer", num_random_features=M),
        {
            **{name: shape for part in "qkv" for name, shape in of_linear(f"attention.{part}_proj", DIM, DIM).items()},
            **of_linear("attention.out_proj", DIM, DIM),
            "attention.random_matrix": (DIM // HEADS, M),
        },
    ),
    "mamba": (
        lambda: LinearAttentionBlock(DIM, HEADS, "mamba", state_size=4, variant="lti"),
        {
            "attention.in_proj.weight": (4 * DIM, DIM),
            **{f"attention.{name}": (1, 1, 4) for name in ("A", "A_log", "B", "C")},
            "attention.dt": (1, 2 * DIM, 4),
            **of_linear("attention.out_proj", 2 * DIM, DIM),
        },
    ),
}


@pytest.mark.parametrize(("make", "shapes"), BLOCKS.values(), ids=BLOCKS.keys())
def test_states_of_the_originals_blocks_load_strictly(make: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]) -> None:
    block = make()
    state = {name: torch.randn(shape) for name, shape in {**shapes, **AROUND}.items()}
    block.load_state_dict(state)
    assert all(torch.equal(x, state[name]) for name, x in block.state_dict().items())
