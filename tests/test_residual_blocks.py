"""OpenCLIP's blocks: definitions written out, its state, its layouts, and each defect of the original as a test."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, Unsupported
from triton_attn.integrations.open_clip import evaluate_blocks, param_groups, replace_transformer_in_model
from triton_attn.nn import (
    DeepNormResidualAttentionBlock,
    EnhancedTransformer,
    LinearAttentionResidualBlock,
    ResidualAttentionBlock,
    SparseAttentionResidualBlock,
    deepnorm_constants,
)
from triton_attn.nn._causal_masks import is_causal
from triton_attn.nn.enhanced_transformer import BLOCK_TYPES

WIDTH, HEADS, N = 12, 3, 11
EVERY = pytest.mark.parametrize("kind", BLOCK_TYPES)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class OpenCLIPBlock(nn.Module):
    """OpenCLIP's block, by torch's own attention."""

    def __init__(self, scale: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        layers = [("c_fc", nn.Linear(WIDTH, 3 * WIDTH)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(3 * WIDTH, WIDTH))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls_1, self.ls_2 = (Scale() if scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.ls_1(self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0])
        out: Tensor = x + self.ls_2(self.mlp(self.ln_2(x)))
        return out


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Tower(nn.Module):
    """OpenCLIP's Transformer, tokens (B, N, width)."""

    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.width, self.layers, self.batch_first, self.grad_checkpointing = WIDTH, 2, True, True
        self.resblocks = nn.ModuleList(OpenCLIPBlock(scale) for _ in range(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, attn_mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer: nn.Module = Tower(scale=True)


class CLIP(nn.Module):
    """A model with both towers where OpenCLIP has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual, self.transformer = Visual(), Tower(scale=False)
        self.register_buffer("attn_mask", causal(N), persistent=False)

    def encode_image(self, images: Tensor) -> Tensor:
        out: Tensor = self.visual.transformer(images)[:, 0]
        return out

    def encode_text(self, text: Tensor) -> Tensor:
        out: Tensor = self.transformer(text, attn_mask=self.attn_mask)[:, -1]
        return out


def causal(n: int) -> Tensor:
    return torch.full((n, n), -math.inf).triu(1)


def tokens(n: int = N, batch: int = 2) -> Tensor:
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(n))


def make(kind: str, **options: Any) -> ResidualAttentionBlock:
    torch.manual_seed(0)
    return BLOCK_TYPES[kind](WIDTH, HEADS, 3.0, act_layer=QuickGELU, norm_layer=lambda size: nn.LayerNorm(size, eps=1e-6), **options).eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


MASKS: dict[str, Tensor | None] = {
    "none": None,
    "causal": causal(N),
    "causal, boolean": torch.ones(N, N, dtype=torch.bool).triu(1),
    "additive": torch.randn(N, N, generator=torch.Generator().manual_seed(3)),
    "boolean": torch.rand(N, N, generator=torch.Generator().manual_seed(4)) > 0.7,
    "for each head": torch.randn(2 * HEADS, N, N, generator=torch.Generator().manual_seed(5)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_standard_block_is_openclip_s(batch_first: bool, mask: Tensor | None) -> None:
    theirs, ours, x = OpenCLIPBlock(True, batch_first).eval(), make("standard", ls_init_value=1.0, batch_first=batch_first), tokens()
    ours.load_state_dict(theirs.state_dict())
    if mask is not None and mask.ndim == 2 and mask.dtype == torch.bool:
        mask = mask & ~torch.eye(N, dtype=torch.bool)
    x = x if batch_first else x.transpose(0, 1)
    close(ours(x, attn_mask=mask), theirs(x, mask))


def test_keys_of_a_block_without_cross_attention_are_discarded() -> None:
    block = make("standard")
    close(block(tokens(), tokens(5), tokens(5)), block(tokens()))
    cross = make("standard", is_cross_attention=True)
    normed = cross.ln_1_kv(tokens(5))
    expected = tokens() + cross.attn(cross.ln_1(tokens()), normed, normed, need_weights=False)[0]
    close(cross(tokens(), tokens(5), tokens(5)), expected + cross.mlp(cross.ln_2(expected)))


def test_the_parallel_block_is_its_definition() -> None:
    block: Any = make("parallel")
    y = block.ln_1(tokens())
    attended = block.attn(y, y, y, need_weights=False)[0]
    close(block(tokens()), tokens() + attended + block.mlp(block.ln_2(tokens())))
    block.shared_norm = True
    close(block(tokens()), tokens() + attended + block.mlp(y))
    assert {"q_norm.weight", "k_norm.bias"} <= set(make("parallel", qk_norm=True).state_dict())


def by_heads(block: Any, x: Tensor) -> list[Tensor]:
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    return [part.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in nn.functional.linear(x, weight, bias).chunk(3, -1)]


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_the_linear_block_is_its_definition_over_tokens(mask: str) -> None:
    """The original sums over heads: no token sees another."""
    block: Any = make("linear")
    x = tokens().requires_grad_()
    query, key, value = by_heads(block, block.ln_1(x))
    scores = (nn.functional.elu(query) + 1) @ (nn.functional.elu(key) + 1).mT
    scores = scores.tril() if mask == "causal" else scores
    heads = scores @ value / (scores.sum(-1, keepdim=True) + 1e-6)
    expected = x + block.attn.out_proj(heads.transpose(1, 2).flatten(2))
    out = block(x, attn_mask=MASKS[mask])
    close(out, expected + block.mlp(block.ln_2(expected)))
    (gradient,) = torch.autograd.grad(out[:, 5].sum(), x)
    seen = gradient.abs().sum((0, 2)) > 0
    assert seen.tolist() == [mask == "none" or i <= 5 for i in range(N)]


def test_the_linear_block_takes_the_fork_s_own_names() -> None:
    block: Any = make("linear")
    state = block.state_dict()
    names = zip("qkv", state["attn.in_proj_weight"].chunk(3), state["attn.in_proj_bias"].chunk(3), strict=True)
    renamed = {f"{part}_proj.{what}": x for part, weight, bias in names for what, x in (("weight", weight), ("bias", bias))}
    renamed |= {name.removeprefix("attn."): x for name, x in state.items() if "in_proj" not in name}
    other: Any = make("linear")
    with torch.no_grad():
        other.attn.in_proj_weight.zero_()
    other.load_state_dict(renamed)
    close(other(tokens()), block(tokens()))


def test_the_sparse_block_hides_keys_and_leaves_none_empty() -> None:
    """The original's mask adds 1 to some scores and hides nothing."""
    block: Any = make("sparse", sparsity_ratio=0.3)
    x = tokens().requires_grad_()
    out = block(x)
    kept = {i * N // 4 for i in range(4)}
    for i in range(N):
        (gradient,) = torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)
        assert {j for j in range(N) if gradient[:, j].abs().sum() > 0} == kept | {i}
    close(block.train()(tokens()), block.eval()(tokens()))
    everything = make("sparse", sparsity_ratio=1.0)
    close(everything(tokens()), make("standard")(tokens()))


@EVERY
def test_a_causal_mask_stays_causal(kind: str) -> None:
    block, x = make(kind), tokens()
    later = x.clone()
    later[:, 6:] += 1
    for mask in (MASKS["causal"], MASKS["causal, boolean"]):
        close(block(later, attn_mask=mask)[:, :6], block(x, attn_mask=mask)[:, :6])
        assert not torch.allclose(block(later, attn_mask=mask)[:, 6:], block(x, attn_mask=mask)[:, 6:])


@pytest.mark.parametrize("kind", ["linear", "sparse"])
def test_a_mask_that_cannot_be_honoured_is_refused(kind: str) -> None:
    with pytest.raises(Unsupported, match="cannot give an attn_mask that is not causal; ResidualAttentionBlock and Parallel"):
        make(kind)(tokens(), attn_mask=MASKS["additive"])


def test_what_is_causal_and_what_is_not() -> None:
    assert is_causal(causal(N))
    assert not is_causal(causal(N) + 1e-3 * torch.eye(N))
    assert not is_causal(torch.zeros(N, N))
    assert not is_causal(causal(N)[:, :5])
    mask = causal(N)
    assert is_causal(mask)
    mask[3, 0] = -math.inf  # looked at anew once it changed
    assert not is_causal(mask)


def test_deepnorm_s_constants_and_definition() -> None:
    constants = [deepnorm_constants(12), deepnorm_constants(24), deepnorm_constants(6, 6), deepnorm_constants(6, 6, part="decoder")]
    wanted = [(2.213364, 0.319472), (2.632148, 0.268642), (0.81 * 6 ** (5 / 16), 0.87 * 6 ** (-5 / 16)), (18**0.25, 72**-0.25)]
    assert [x for pair in constants for x in pair] == pytest.approx([x for pair in wanted for x in pair], rel=1e-5)
    block: Any = make("deepnorm", num_layers=24)
    alpha = 48**0.25
    x = tokens()
    x = block.ln_1(alpha * x + block.attn(x, x, x, need_weights=False)[0])
    close(block(tokens()), block.ln_2(alpha * x + block.mlp(x)))


@pytest.mark.parametrize("init", ["xavier_normal", "scale"])
def test_deepnorm_s_initial_values_are_small_where_beta_says(init: str) -> None:
    torch.manual_seed(0)
    block: Any = DeepNormResidualAttentionBlock(256, 4, num_layers=24, init=init)
    plain: Any = ResidualAttentionBlock(256, 4)
    query, _, value = block.attn.in_proj_weight.chunk(3)
    assert (value.std() / query.std()).item() == pytest.approx(deepnorm_constants(24)[1], rel=0.03)
    if init == "scale":
        assert (block.mlp.c_fc.weight.std() / plain.mlp.c_fc.weight.std()).item() == pytest.approx(deepnorm_constants(24)[1], rel=0.03)


def test_the_source_s_own_deepnorm_arithmetic_is_a_variant() -> None:
    block: Any = make("deepnorm", variant="daclip", layer_depth=6)
    y = block.ln_1(tokens())
    x = 12**0.25 * tokens() + block.attn(y, y, y, need_weights=False)[0]
    close(block(tokens()), 48**-0.25 * x + block.mlp(block.ln_2(x)))


@EVERY
def test_openclip_s_state_loads_strictly(kind: str) -> None:
    theirs = OpenCLIPBlock(scale=True).state_dict()
    missing, unexpected = make(kind, ls_init_value=1.0).load_state_dict(theirs, strict=kind != "subln")
    assert not unexpected
    assert all(name.startswith(("ln_attn", "mlp.ln")) for name in missing)


@EVERY
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_a_block_compiles_in_one_graph(kind: str, mask: str) -> None:
    torch._dynamo.reset()  # all blocks share one forward, which is compiled so many times and no more
    block = make(kind)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    close(compiled(tokens(), attn_mask=MASKS[mask]), block(tokens(), attn_mask=MASKS[mask]))


# the transformer


def transformer(kind: str = "standard", **how: Any) -> EnhancedTransformer:
    torch.manual_seed(0)
    return EnhancedTransformer(WIDTH, 3, HEADS, block_type=kind, **how)


@EVERY
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    stack, x = transformer(kind).train(), tokens()
    gradients = []
    for again in (False, True):
        stack.set_grad_checkpointing(again)
        gradients.append(torch.autograd.grad(stack(x).square().sum(), tuple(stack.parameters())))
    for a, b in zip(*gradients, strict=True):
        close(a, b)


def test_intermediates_hiddens_and_control() -> None:
    stack, x = transformer().eval(), tokens()
    first = stack.resblocks[0](x)
    second = stack.resblocks[1](first)
    third = stack.resblocks[2](second)
    out, hiddens = stack(x, output_hiddens=True)
    close(out, third)
    for a, b in zip(hiddens, (first, second, third), strict=True):
        close(a, b)
    assert [len(stack.forward_intermediates(x, indices=which)[1]) for which in (None, 2, [0, -1])] == [3, 2, 2]
    close(stack.forward_intermediates(x, indices=[1], stop_early=True)[0], second)
    control = [torch.full_like(x, value) for value in (3.0, 2.0, 1.0)]
    wanted = stack.resblocks[2](stack.resblocks[1](first + 1.0) + 2.0) + 3.0
    close(stack(x, control=control), wanted)
    assert len(control) == 3  # the original empties it
    with pytest.raises(ArgumentError, match="control has 2 tensors; allowed: 3"):
        stack(x, control=control[:2])
    assert stack.prune_intermediate_layers([0, 1]) == [0, 1]
    close(stack(x), second)


# replacement in a model


def test_a_standard_replacement_changes_no_output_and_undo_gives_the_model_back() -> None:
    model, image, text = CLIP().eval(), tokens(), tokens()
    before, towers = (model.encode_image(image), model.encode_text(text)), (model.visual.transformer, model.transformer)
    report = replace_transformer_in_model(model, "standard", ("visual", "text"))
    for a, b in zip((model.encode_image(image), model.encode_text(text)), before, strict=True):
        close(a, b)
    assert not report.changes_function
    assert report.initialised == ()
    assert set(report.replaced) == {"visual.transformer", "transformer"}
    new: Any = model.visual.transformer
    assert new.grad_checkpointing  # as the old one had it
    assert isinstance(new.resblocks[0].mlp.gelu, QuickGELU)
    assert new.resblocks[0].ln_1.eps == 1e-6
    assert new.resblocks[0].mlp.c_fc.out_features == 3 * WIDTH
    report.undo()
    assert (model.visual.transformer, model.transformer) == towers


@EVERY
def test_every_kind_trains_in_a_model(kind: str) -> None:
    model = CLIP().double().train()
    report = replace_transformer_in_model(model, kind)
    assert next(model.visual.parameters()).dtype == torch.float64
    assert model.visual.transformer.training
    assert report.changes_function == (kind != "standard")
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in report.copied
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    image, text, losses = tokens(batch=4).double(), tokens(batch=4).double().flip(0), []
    with torch.no_grad():
        model.attn_mask = causal(N).double()
    for _ in range(8):
        a, b = (nn.functional.normalize(x, dim=-1) for x in (model.encode_image(image), model.encode_text(text)))
        loss = nn.functional.cross_entropy(5 * a @ b.mT, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_learning_rates_are_the_source_s() -> None:
    model = CLIP()
    replace_transformer_in_model(model, "linear", ("visual",))
    replace_transformer_in_model(model, "deepnorm", ("text",))
    groups = param_groups(model, 1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {(group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {(1.2, 0.1), (1.2, 0.0), (0.5, 0.1), (0.5, 0.0), (1.0, 0.1), (1.0, 0.0)}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_blocks_are_evaluated_beside_the_original_and_the_model_is_left_alone() -> None:
    model = CLIP()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    found = evaluate_blocks(model, [(tokens(), torch.tensor([0, 1]), torch.randn(3, WIDTH))], ["standard", "linear"])
    assert found["original"]["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["standard"]["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["linear"]["cosine"] < 0.99999
    assert found["standard"]["accuracy"] == found["original"]["accuracy"]
    assert model.training
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


WRONG: dict[str, tuple[Any, str]] = {
    "a type": (lambda: replace_transformer_in_model(CLIP(), "ring"), "block_type is 'ring'; allowed: 'standard', 'parallel'"),
    "a tower": (lambda: replace_transformer_in_model(CLIP(), towers=("audio",)), "towers is ('audio',); allowed: some of"),
    "no tower": (lambda: replace_transformer_in_model(nn.Linear(1, 1)), "the model has no visual.transformer"),
    "other blocks": (lambda: replace_transformer_in_model(Strange()), "has blocks in visual.transformer that are not OpenCLIP's"),
    "sparsity": (lambda: SparseAttentionResidualBlock(12, 3, sparsity_ratio=0), "sparsity_ratio is 0; allowed: above 0 to 1"),
    "heads": (lambda: LinearAttentionResidualBlock(12, 5), "n_head is 5; allowed: a divisor of d_model, 12"),
    "a flag": (lambda: make("parallel", shared_norm=2), "shared_norm"),
    "a rate": (lambda: param_groups(CLIP(), 0.0), "base_lr is 0.0; allowed: above 0"),
}


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.transformer = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2), 1, enable_nested_tensor=False)


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named_and_nothing_is_changed(call: Any, said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        call()
    assert said in str(raised.value)
