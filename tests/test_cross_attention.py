"""AA-CLIP's cross-attention: naive definitions, the originals' states and shapes, and their defects."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, norm_matched_add, use_backend
from triton_attn.nn import CrossAttentionModule, ImageCrossAttentionModule, image_context

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
DIM, HEADS, T, M = 12, 3, 7, 19


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def text(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, T)), DIM, **DOUBLE)


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, M, DIM, **DOUBLE)


def bare(module: Any, x: Tensor, context: Tensor, hidden: Tensor | None = None) -> Tensor:
    """W_o softmax(q k^T / sqrt(d)) v, every score."""
    split = [
        y.view(*y.shape[:2], module.num_heads, -1).transpose(1, 2)
        for y in (module.q_proj(x), module.k_proj(context), module.v_proj(context))
    ]
    scores = split[0] @ split[1].mT / math.sqrt(split[0].shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    out: Tensor = module.out_proj((scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(2))
    return out


def make(**how: Any) -> CrossAttentionModule:
    torch.manual_seed(0)
    return CrossAttentionModule(DIM, HEADS, 0.0, **{**DOUBLE, **how})


RESIDUALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm_matched": lambda x, c: x + 0.1 * c * x.norm(dim=-1, keepdim=True) / (c.norm(dim=-1, keepdim=True) + 1e-6),
    "scaled": lambda x, c: x + 0.1 * c,
    "add": lambda x, c: x + c,
    "None": lambda x, c: c,
}


@pytest.mark.parametrize(("residual", "learnable"), [*((name, False) for name in RESIDUALS), ("norm_matched", True), ("scaled", True)])
def test_it_is_its_definition(residual: str, learnable: bool) -> None:
    module = make(residual=None if residual == "None" else residual, learnable_weight=learnable)
    x, context, hidden = text().requires_grad_(), image().requires_grad_(), torch.zeros(2, M, dtype=torch.bool)
    hidden[0, 11:] = True
    out = module(x, context, context_key_padding_mask=hidden)
    expected = RESIDUALS[residual](x, bare(module, x, context, hidden))
    close(out, expected)
    grad = torch.randn_like(out)
    leaves = (x, context, module.q_proj.weight, module.out_proj.weight)
    for found, wanted in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        close(found, wanted)


def test_prompts_of_an_image_are_what_each_would_be_alone() -> None:
    module, x, context = make(), text(2, 5, T), image()
    expected = torch.stack([module(x[:, p], context) for p in range(5)], 1)
    close(module(x, context), expected)
    close(module(x, module.project_context(context)), expected)


def test_one_image_serves_any_number_of_prompts() -> None:
    module, x, context = make(), text(4, T), image(1)
    close(module(x, context), torch.cat([module(x[i : i + 1], context) for i in range(4)]))


def test_padded_text_comes_out_as_it_went_in() -> None:
    module, x, context = make(), text(), image()
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[1, 4:] = True
    out = module(x, context, text_key_padding_mask=mask)
    close(out[1, 4:], x[1, 4:])
    close(out[1, :4], module(x, context)[1, :4])


def test_weights_of_chosen_tokens_are_exact() -> None:
    module, x, context = make(), text(), image()
    found = module.attention_weights(x, context, tokens=slice(2, 4))
    query, key = (y.view(2, -1, HEADS, DIM // HEADS).transpose(1, 2) for y in (module.q_proj(x), module.k_proj(context)))
    close(found, (query @ key.mT / 2).softmax(-1)[:, :, 2:4])


def test_weights_of_a_masked_call_are_those_of_that_call() -> None:
    module, x, context, hidden = make(residual=None), text(), image(), torch.zeros(2, M, dtype=torch.bool)
    hidden[0, 5:], hidden[1] = True, True
    weights = module.attention_weights(x, context, context_key_padding_mask=hidden)
    assert (weights[0, :, :, 5:] == 0).all()
    assert (weights[1] == 0).all()
    value = module.v_proj(context).view(2, M, HEADS, -1).transpose(1, 2)
    cross = module.out_proj((weights @ value).transpose(1, 2).flatten(2))
    close(module(x, context, context_key_padding_mask=hidden)[0], cross[0])
    for token in (3, -1):
        close(module.attention_weights(x, context, token), module.attention_weights(x, context)[:, :, [token]])


@pytest.mark.parametrize("residual", RESIDUALS)
def test_text_beside_a_context_of_which_nothing_is_left_comes_out_as_it_went_in(residual: str) -> None:
    module = make(residual=None if residual == "None" else residual)
    nn.init.ones_(module.out_proj.bias)
    x, context, hidden = text(2, 3, T).requires_grad_(), image(), torch.zeros(2, M, dtype=torch.bool)
    hidden[1] = True
    expected = torch.zeros_like(x) if residual == "None" else x
    out = module(x, context, context_key_padding_mask=hidden)
    assert torch.equal(out[1], expected[1])
    close(out[0], module(x[:1], context[:1])[0])
    out.sum().backward()
    assert all(y.grad is not None and y.grad.isfinite().all() for y in (x, *module.parameters()))
    assert torch.equal(module(x, context[:, :0]), expected)
    assert torch.equal(module(x[0], context[:1], context_key_padding_mask=hidden[1:]), expected[0])  # one image for all


def test_text_becomes_aware_of_the_image() -> None:
    module, x = make(), text(1, T)
    first, second = module(x, image(1)), module(x, image(1))
    assert (first - second).norm() > 1e-3 * first.norm()


# the originals


def test_images_are_never_averaged_silently() -> None:
    module, x, context = make(), text(3, T), image(2)
    with pytest.raises(ArgumentError, match=r"image_context has 2 images for 3 batches of text; allowed: 3 or 1, or context_reduce='mean'"):
        module(x, context)
    parity = make(context_reduce="mean")
    close(parity(x, context), parity(x, context.mean(0, keepdim=True)))


STATES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "text": (
        lambda: CrossAttentionModule(),
        {
            f"{name}_proj.{part}": (768, 768)[: 2 if part == "weight" else 1]
            for name in ("q", "k", "v", "out")
            for part in ("weight", "bias")
        },
    ),
    "image": (
        lambda: ImageCrossAttentionModule(),
        {
            "q_proj.weight": (768, 1024),
            **{f"{name}_proj.weight": (768, 768) for name in ("k", "v")},
            **{f"{name}_proj.bias": (768,) for name in ("q", "k", "v")},
            "out_proj.weight": (1024, 768),
            "out_proj.bias": (1024,),
        },
    ),
}


@pytest.mark.parametrize(("build", "shapes"), STATES.values(), ids=STATES.keys())
def test_states_of_the_originals_load_strictly(build: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]) -> None:
    module = build()
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == shapes
    module.load_state_dict({name: torch.randn(shape) for name, shape in shapes.items()})


def test_the_plan_s_dimensions_and_gradients_at_full_width() -> None:
    """16 texts of 77 tokens and contexts of 1369 patches, heads of 96; two of them here, the others are alike."""
    module = CrossAttentionModule(residual=None)
    assert module.head_dim == 96
    x, context = torch.randn(2, 77, 768), torch.randn(2, 1369, 768)
    out = module(x, context)
    assert out.shape == (2, 77, 768)
    out.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    # a bias of the keys moves every score of a query alike
    assert {name for name, gradient in gradients.items() if gradient is None or not gradient.abs().max() > 1e-7} <= {"k_proj.bias"}


def test_image_tokens_attend_to_text_of_another_width() -> None:
    module = ImageCrossAttentionModule(16, 12, 3, 0.0, residual="add", **DOUBLE)
    x, context = torch.randn(2, M, 16, **DOUBLE), text()
    close(module(x, context), x + bare(module, x, context))


def test_the_context_is_patches_and_the_class_token_in_the_joint_space() -> None:
    tokens, cls, norm, proj = (
        torch.randn(2, 1 + M, 16, **DOUBLE),
        text(2)[:, :DIM],
        nn.LayerNorm(16, **DOUBLE),
        torch.randn(16, DIM, **DOUBLE),
    )
    patches = norm(tokens[:, 1:]) @ proj
    close(image_context(tokens, cls, norm, proj, normalize=False), patches + cls[:, None])
    expected = patches / patches.norm(dim=-1, keepdim=True) + (cls / cls.norm(dim=-1, keepdim=True))[:, None]
    close(image_context(tokens, cls, norm, proj), expected)


def test_a_branch_of_zeros_adds_nothing() -> None:
    x, branch = text().requires_grad_(), torch.zeros(2, T, DIM, **DOUBLE, requires_grad=True)
    out = norm_matched_add(x, branch, scale=0.3)
    close(out, x)
    gradients = torch.autograd.grad(out.sum(), (x, branch))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_it_compiles_in_one_graph(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    module, x, context = make(dtype=torch.float32), text().float(), image().float()
    with use_backend(backend):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, context), module(x, context), rtol=1e-4, atol=1e-5)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "residual": (lambda: make(residual="gated"), "residual is 'gated'; allowed: 'norm_matched', 'scaled', 'add', None"),
    "heads": (lambda: CrossAttentionModule(12, 5), "num_heads is 5; allowed: a divisor of 12"),
    "text": (lambda: make()(torch.ones(2, 7, 9, **DOUBLE), image()), "text_features has shape (2, 7, 9)"),
    "context": (lambda: make()(text(), torch.ones(2, 7, 9, **DOUBLE)), "image_context has shape (2, 7, 9)"),
    "text mask": (
        lambda: make()(text(), image(), torch.zeros(2, 3, dtype=torch.bool)),
        "text_key_padding_mask is torch.bool of shape (2, 3)",
    ),
    "context mask": (
        lambda: make()(text(), image(), None, torch.zeros(2, 3, dtype=torch.bool)),
        "context_key_padding_mask is torch.bool of shape (2, 3)",
    ),
    "debug": (lambda: make()(text(), image(), False), "text_key_padding_mask is False, a bool; allowed: bool, (2, 7), or None"),
    "list": (lambda: make()(text(), image(), None, [[True]]), "context_key_padding_mask is [[True]], a list"),
    "dtype": (lambda: make()(text(), image().float()), "image_context has dtype torch.float32; allowed: torch.float64"),
    "text dtype": (lambda: make()(text().float(), image()), "text_features has dtype torch.float32; allowed: torch.float64"),
    "tokens": (lambda: make().attention_weights(text(), image(), T), "tokens is 7; allowed: a whole number, -7 to 6"),
    "token": (lambda: make().attention_weights(text(), image(), "3"), "tokens is a str; allowed: an index or a slice"),
    "image_dim": (lambda: ImageCrossAttentionModule(0, 12), "image_dim is 0"),
    "text_dim": (lambda: ImageCrossAttentionModule(12, 1.5), "text_dim is 1.5"),  # type: ignore[arg-type]
    "learned add": (lambda: make(residual="add", learnable_weight=True), "learnable_weight is True with residual='add'"),
    "learned None": (lambda: make(residual=None, learnable_weight=True), "learnable_weight is True with residual=None"),
}


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        call()
    assert said in str(raised.value)


def test_the_sum_says_what_it_takes() -> None:
    x = text()
    wrong = {
        "branch": lambda: norm_matched_add(x, x[:, :2]),
        "weight": lambda: norm_matched_add(x, x, torch.ones(2, **DOUBLE)),
        "eps": lambda: norm_matched_add(x, x, eps=0.0),
        "scale": lambda: norm_matched_add(x, x, scale=math.inf),
    }
    for argument, call in wrong.items():
        with pytest.raises(ArgumentError) as caught:
            call()  # type: ignore[no-untyped-call]
        assert caught.value.argument == argument


def test_any_leading_axes_and_a_learned_weight() -> None:
    weight = torch.tensor(0.3, **DOUBLE, requires_grad=True)
    for x in (text(), text()[0], text()[0, 0], text(2, 3, T)):
        branch = torch.randn_like(x)
        out, gain = norm_matched_add(x, branch, weight, scale=0.5, return_gain=True)
        close(gain, torch.linalg.vector_norm(x, dim=-1) / (torch.linalg.vector_norm(branch, dim=-1) + 1e-6))
        close(out, x + 0.15 * gain[..., None] * branch)
        close(norm_matched_add(x, branch, scale=0.15), out)
        (found,) = torch.autograd.grad(out.sum(), weight)
        close(found, 0.5 * (gain[..., None] * branch).sum())
