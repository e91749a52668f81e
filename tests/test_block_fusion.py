"""What OpenCLIP's blocks do in one pass is what they do in several: the folded parallel block, and a sum with the norm after it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from triton_attn import CATALOG, ArgumentError, Unsupported, add_layer_norm, layer_norm, use_backend
from triton_attn.integrations.open_clip import replace_transformer_in_model
from triton_attn.nn import (
    DeepNormResidualAttentionBlock,
    EnhancedTransformer,
    LinearAttentionResidualBlock,
    ParallelResidualAttentionBlock,
    ResidualAttentionBlock,
    SparseAttentionResidualBlock,
    SubLNResidualAttentionBlock,
)

CAUSAL = torch.full((9, 9), -torch.inf).triu(1)


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def stirred(block: nn.Module) -> nn.Module:
    """With no parameter at a value that would hide its absence."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return block.double().eval()


@pytest.mark.parametrize("mask", [None, CAUSAL, torch.eye(9, dtype=torch.bool)], ids=["all", "causal", "boolean"])
@pytest.mark.parametrize(
    "options",
    [{}, {"ls_init_value": 0.5}, {"batch_first": False}, {"shared_norm": True}, {"qk_norm": True}],
    ids=lambda given: str([*given]),
)
def test_a_folded_block_computes_the_same(options: dict[str, object], mask: Tensor | None) -> None:
    block = stirred(ParallelResidualAttentionBlock(16, 2, **options))  # type: ignore[arg-type]
    assert isinstance(block, ParallelResidualAttentionBlock)
    x = tokens(2, 9, 16) if block.batch_first else tokens(9, 2, 16)
    with torch.no_grad():
        expected = block(x, attn_mask=mask)
        assert block.fold() is block
        torch.testing.assert_close(block(x, attn_mask=mask), expected, rtol=1e-11, atol=1e-11)


def test_a_folded_block_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    block = stirred(ParallelResidualAttentionBlock(16, 2))
    assert isinstance(block, ParallelResidualAttentionBlock)
    x = tokens(2, 9, 16)
    with torch.no_grad():
        expected = block(x, attn_mask=CAUSAL)
        block.fold()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, attn_mask=CAUSAL), expected, rtol=1e-11, atol=1e-11)


def test_a_graph_is_not_bound_to_the_mask_it_was_compiled_with() -> None:
    torch._dynamo.reset()
    x, other = tokens(2, 9, 16), torch.zeros(9, 9).masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf)
    block, linear = stirred(ResidualAttentionBlock(16, 2)), stirred(LinearAttentionResidualBlock(16, 2))
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for mask in (CAUSAL, other):
            torch.testing.assert_close(compiled(x, attn_mask=mask), block(x, attn_mask=mask), rtol=1e-11, atol=1e-11)
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, attn_mask=CAUSAL), linear(x, attn_mask=CAUSAL), rtol=1e-11, atol=1e-11)
        with pytest.raises((Unsupported, RuntimeError), match="causal"):
            compiled(x, attn_mask=other)


def _trained(block: ParallelResidualAttentionBlock) -> None:
    block.train().eval()


def _loaded(block: ParallelResidualAttentionBlock) -> None:
    block.load_state_dict({name: 2 * x for name, x in block.state_dict().items()})


@pytest.mark.parametrize("change", [_trained, _loaded, lambda block: block.float().double()], ids=["mode", "load", "moved"])
def test_a_fold_is_forgotten_with_what_it_was_made_of(change: Callable[[ParallelResidualAttentionBlock], object]) -> None:
    block = stirred(ParallelResidualAttentionBlock(16, 2))
    assert isinstance(block, ParallelResidualAttentionBlock)
    x = tokens(1, 5, 16)
    with torch.no_grad():
        block.fold()
        change(block)
        found = block(x)
        other = ParallelResidualAttentionBlock(16, 2).double().eval()
        other.load_state_dict(block.state_dict())
        assert torch.equal(found, other(x))


def test_a_fold_of_old_parameters_is_never_used() -> None:
    block = stirred(ParallelResidualAttentionBlock(16, 2))
    assert isinstance(block, ParallelResidualAttentionBlock)
    x = tokens(1, 5, 16)
    with torch.no_grad():
        expected = block(x)
        block.fold()
        assert torch.equal(copy.deepcopy(block)(x), expected)
        block.ln_1.weight.mul_(2.0)  # type: ignore[operator]
        with pytest.raises(ArgumentError, match=r"fold\(\)"):
            block(x)
        assert not torch.equal(block.fold()(x), expected)


def test_gradients_pass_by_a_fold() -> None:
    block = stirred(ParallelResidualAttentionBlock(16, 2))
    assert isinstance(block, ParallelResidualAttentionBlock)
    x = tokens(1, 5, 16)
    expected = torch.autograd.grad(block(x).sum(), tuple(block.ln_2.parameters()))
    block.fold()
    for found, wanted in zip(torch.autograd.grad(block(x).sum(), tuple(block.ln_2.parameters())), expected, strict=True):
        assert torch.equal(found, wanted)


def test_norms_that_cannot_be_folded_are_refused() -> None:
    with pytest.raises(ArgumentError, match="LayerNorm"):
        ParallelResidualAttentionBlock(16, 2, norm_layer=lambda width: nn.Identity()).fold()


@pytest.mark.parametrize("kind", [ResidualAttentionBlock, DeepNormResidualAttentionBlock])
def test_a_norm_with_a_hook_is_called_and_gives_the_same(kind: type[ResidualAttentionBlock]) -> None:
    block, x, called = stirred(kind(16, 2, ls_init_value=0.5)), tokens(2, 9, 16), []
    fused = block(x)
    block.get_submodule("ln_2").register_forward_hook(lambda *args: called.append(args))
    torch.testing.assert_close(block(x), fused, rtol=1e-12, atol=1e-12)
    assert len(called) == 1


def test_autocast_does_not_round_what_goes_around_a_branch() -> None:
    block = ResidualAttentionBlock(16, 2).eval()
    x = tokens(1, 5, 16).float() * 1000
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = block(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, block(x), rtol=0, atol=0.1)


def test_openclip_s_states_load_strictly_into_sub_ln() -> None:
    plain, block = ResidualAttentionBlock(16, 2, ls_init_value=0.1), SubLNResidualAttentionBlock(16, 2, ls_init_value=0.1)
    block.load_state_dict(plain.state_dict())
    assert torch.equal(block.attn.in_proj_weight, plain.attn.in_proj_weight)
    own = block.state_dict()
    del own["mlp.ln.bias"]
    with pytest.raises(RuntimeError, match=r"mlp\.ln\.bias"):
        block.load_state_dict(own)


def test_the_longest_keys_are_no_choice_of_the_past() -> None:
    block = SparseAttentionResidualBlock(16, 2, selection="topk")
    block(tokens(1, 9, 16).float())
    with pytest.raises(Unsupported, match="'uniform'"):
        block(tokens(1, 9, 16).float(), attn_mask=CAUSAL)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.transformer = EnhancedTransformer(16, 2, 2)


@pytest.mark.parametrize("kind", ["standard", "subln"])
def test_norms_in_float32_beside_weights_in_half_precision_stay_so(kind: str) -> None:
    model = Tower()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            module.half()
    model.visual.transformer.resblocks[1].ln_1.weight.requires_grad_(False)  # type: ignore[union-attr, index]
    before = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()}
    replace_transformer_in_model(model, kind)
    after = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()}
    assert before.items() <= after.items()
    assert {dtype for name, (dtype, _) in after.items() if name not in before} <= {torch.float16}


@pytest.mark.parametrize("backend", ["triton", "portable", "reference"])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 4, 6)])
def test_rows_may_lie_in_any_number_of_axes(shape: tuple[int, ...], backend: str) -> None:
    x, residual, weight = tokens(*shape).float(), tokens(*shape).float().flip(-1), torch.linspace(0.5, 2, 6)
    with use_backend(backend):
        out, total = add_layer_norm(x, residual, weight, alpha=0.5, return_sum=True)
        plain = layer_norm(x, weight)
    assert out.shape == total.shape == shape
    torch.testing.assert_close(total, 0.5 * residual + x)
    torch.testing.assert_close(out, nn.functional.layer_norm(0.5 * residual + x, (6,), weight))
    torch.testing.assert_close(plain, nn.functional.layer_norm(x, (6,), weight))


def test_without_a_residual_the_sum_is_the_input() -> None:
    x = tokens(3, 6)
    assert add_layer_norm(x, return_sum=True)[1] is x


def test_rows_wider_than_registers_are_refused_by_the_kernel() -> None:
    (kernel,) = CATALOG["add_layer_norm"].kernels
    assert kernel.refuses({"x": torch.empty(1, 2, 4096, device="meta")}, {}) == []
    assert "5000 wide" in kernel.refuses({"x": torch.empty(1, 2, 5000, device="meta")}, {})[0]


def test_arguments_are_named_when_wrong() -> None:
    x = tokens(2, 3, 6)
    calls: dict[str, Callable[[], object]] = {
        "residual": lambda: add_layer_norm(x, x[:, :2]),
        "weight": lambda: add_layer_norm(x, x, torch.ones(5, dtype=torch.float64)),
        "eps": lambda: layer_norm(x, eps=-1.0),
        "alpha": lambda: add_layer_norm(x, x, alpha=float("nan")),
        "x": lambda: layer_norm(x[..., :0]),
    }
    for argument, call in calls.items():
        with pytest.raises(ArgumentError) as complaint:
            call()
        assert complaint.value.argument == argument
