"""AA-CLIP around transformers' CLIPModel: its definition written out, a CLIP that stays as it was, and the original's defects."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.small_clip import END, JOINT, PATCHES, WIDTH, pictures, small_clip, texts
from triton_attn import ArgumentError
from triton_attn.models import AdaptedCLIPWithCrossAttention

DOUBLE = torch.float64
SMALL: dict[str, Any] = {"text_adapt_until": 2, "image_adapt_until": 3, "levels": (2, 3, 5), "cross_attn_heads": 2}


def make(dtype: torch.dtype = DOUBLE, **how: Any) -> Any:
    clip = small_clip(dtype=dtype)
    return AdaptedCLIPWithCrossAttention(clip, **{**SMALL, **how}).eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def adapted(x: Tensor, adapter: Any, w: float = 0.1) -> Tensor:
    """w |x| A / (|A| + eps) + (1 - w) x; the original has no eps, and NaN for an adapter of zeros."""
    a = F.leaky_relu(x @ adapter.fc[0].weight.mT, 0.01)
    out: Tensor = w * a * x.norm(dim=-1, keepdim=True) / (a.norm(dim=-1, keepdim=True) + 1e-6) + (1 - w) * x
    return out


def text_by_hand(model: Any, text: Tensor, context: Tensor | None) -> Tensor:
    """The whole tower, one text beside one image each."""
    clip = model.clipmodel.text_model
    x = clip.embeddings(input_ids=text)
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, -math.inf)[None, None]
    for i, layer in enumerate(clip.encoder.layers):
        x = layer(x, mask)
        if i == 0 and context is not None:
            module = model.text_cross_attn
            query, key, value = (
                y.unflatten(2, (2, -1)).transpose(1, 2) for y in (module.q_proj(x), module.k_proj(context), module.v_proj(context))
            )
            scores = query @ key.mT / math.sqrt(query.shape[-1])
            cross = module.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
            x = x + 0.1 * cross * x.norm(dim=-1, keepdim=True) / (cross.norm(dim=-1, keepdim=True) + 1e-6)
        if i < 2:
            x = adapted(x, model.text_adapter[i])
    ended = clip.final_layer_norm(x)[torch.arange(len(text)), text.eq(END).int().argmax(1)]
    return F.leaky_relu(ended @ model.text_adapter[2].fc[0].weight.mT, 0.01)


@pytest.mark.parametrize("trimmed", [True, False])
def test_text_is_its_definition_with_and_without_an_image(trimmed: bool) -> None:
    model, text, images = make(trim_text=trimmed), texts(2), pictures(2, DOUBLE)
    close(model.encode_text(text), text_by_hand(model, text, None))
    context = model.compute_image_context(images)
    model.set_image_context(context)
    close(model.encode_text(text), text_by_hand(model, text, context))


def test_prompts_of_each_image_are_what_each_would_be_alone() -> None:
    model, images = make(), pictures(2, DOUBLE)
    context = model.compute_image_context(images)
    model.set_image_context(context)
    text = texts(2, 3)
    expected = torch.stack([text_by_hand(model, text[:, p], context) for p in range(3)], 1)
    close(model.encode_text(text), expected)
    with torch.no_grad():
        close(model.encode_text(text), expected)  # beside keys and values that are kept
    shared = torch.stack([text_by_hand(model, text[:1, p].expand(2, -1), context) for p in range(3)], 1)
    close(model.encode_text(text[:1]), shared)


def test_kept_keys_follow_the_weights() -> None:
    model = make()
    model.set_image_context(model.compute_image_context(pictures(2, DOUBLE)))
    text = texts(2)
    with torch.no_grad():
        before = model.encode_text(text)
        model.text_cross_attn.k_proj.weight.mul_(3.0)
        after = model.encode_text(text)
    assert not torch.allclose(before, after, rtol=1e-6)
    context = model.current_image_context
    close(after, text_by_hand(model, text, context))


def test_the_context_is_early_patches_attended_by_values_and_the_last_class_token() -> None:
    """Layer 2 of 5 by softmax(v v^T / sqrt(d)) v; the class token of the plain model."""
    model, images = make(), pictures(2, DOUBLE)
    vision = model.clipmodel.vision_model
    x = vision.pre_layrnorm(vision.embeddings(images))
    x = vision.encoder.layers[0](x, None)
    expected: list[Tensor] = []
    for index in range(1, 5):
        layer = vision.encoder.layers[index]
        value = layer.self_attn.v_proj(layer.layer_norm1(x)).unflatten(2, (3, -1)).transpose(1, 2)
        looked = (value @ value.mT / math.sqrt(WIDTH // 3)).softmax(-1) @ value
        x = x + layer.self_attn.out_proj(looked.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
        expected.append(vision.post_layernorm(x)[:, 1:] @ model.clipmodel.visual_projection.weight.mT)
    cls = F.normalize(model.clipmodel.get_image_features(pixel_values=images).pooler_output, dim=-1)[:, None]
    dense = [F.normalize(expected[level - 2], dim=-1) + cls for level in (2, 3, 5)]
    for found, wanted in zip(model.dense_features(images), dense, strict=True):
        close(found, wanted)
    context = model.compute_image_context(images)
    close(context, dense[0])
    assert context.shape == (2, PATCHES, JOINT)
    assert not context.requires_grad
    plain = make(normalize_context=False, value_layers=0)
    cls = plain.clipmodel.get_image_features(pixel_values=images).pooler_output[:, None]
    x = vision.encoder.layers[1](vision.encoder.layers[0](vision.pre_layrnorm(vision.embeddings(images)), None), None)
    close(plain.compute_image_context(images), vision.post_layernorm(x)[:, 1:] @ plain.clipmodel.visual_projection.weight.mT + cls)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("crossed", [False, True])
def test_images_are_their_definition(crossed: bool, relu: bool) -> None:
    model, images = make(relu=relu), pictures(2, DOUBLE)
    vision, context = model.clipmodel.vision_model, F.normalize(torch.randn(1, 5, JOINT, dtype=DOUBLE), dim=-1)
    model.set_text_context(7.0 * context)  # of any length: it is normalised
    x = vision.pre_layrnorm(vision.embeddings(images))
    tokens = []
    for i, layer in enumerate(vision.encoder.layers):
        x = layer(x, None)
        if i == 0 and crossed:
            x = model.image_cross_attn(x, context)
        if i < 3:
            x = adapted(x, model.image_adapter["layer_adapters"][i])
        if i + 1 in (2, 3, 5):
            tokens.append(vision.post_layernorm(x[:, 1:]))
    image_adapter: Any = model.image_adapter

    def project(layer: Any, y: Tensor) -> Tensor:
        return F.normalize(F.leaky_relu(y @ layer.fc[0].weight.mT, 0.01) if relu else y @ layer.fc.weight.mT, dim=-1)

    segments, detected = model(images, use_cross_attention=crossed)
    for found, layer, level in zip(segments, image_adapter["seg_proj"], tokens, strict=True):
        close(found, project(layer, level))
    close(detected, project(image_adapter["det_proj"], tokens[-1]).mean(1))


# a CLIP that stays as it was


def test_without_adapters_it_is_the_clip_to_the_last_bit() -> None:
    clip = small_clip()
    plain, text, images = copy.deepcopy(clip), texts(2), pictures()
    model = AdaptedCLIPWithCrossAttention(clip, **SMALL)
    with torch.no_grad():
        words, seen = (found.pooler_output for found in (plain.get_text_features(text), plain.get_image_features(images)))
        assert torch.equal(model.encode_text(text, adapt_text=False), words)
        patches, cls = model.forward_original(images)
        assert torch.equal(cls, seen)
        last = plain.vision_model.post_layernorm(plain.vision_model(images).last_hidden_state)[:, 1:]
    torch.testing.assert_close(patches[0], last @ plain.visual_projection.weight.mT)


def test_training_changes_adapters_alone() -> None:
    model, text, images = make(torch.float32, cross_attn_dropout=0.1).train(), texts(1, 3), pictures()
    before = copy.deepcopy(model.clipmodel.state_dict())
    assert not model.clipmodel.training
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], 1e-2)
    for _ in range(2):
        model.set_image_context(model.compute_image_context(images))
        model.set_text_context(model.encode_text_intermediate(text).flatten(1, 2).detach())
        states = model.get_adapted_text_embedding((text[:, :1], text[:, 1:]))
        segments, detected = model(images, use_cross_attention=True)
        loss = sum(((level @ states).square().mean() for level in segments), (detected[:, None] @ states).square().mean())
        optimizer.zero_grad()
        loss.backward()
        still = {name for name, x in model.named_parameters() if x.requires_grad and (x.grad is None or not x.grad.abs().max() > 0)}
        assert still <= {"text_cross_attn.k_proj.bias", "image_cross_attn.k_proj.bias"}  # moves every score of a query alike
        optimizer.step()
    assert all(x.grad is None for x in model.clipmodel.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.clipmodel.state_dict().items())


@pytest.mark.slow
def test_the_plan_s_dimensions_and_gradients_at_full_width() -> None:
    """16 images of 518 x 518 through one block of a ViT-L/14, 16 texts of 77 tokens."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 1, "num_attention_heads": 12, "vocab_size": 99},
        vision_config={
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 16},
            **{"image_size": 336, "patch_size": 14},
        },
        projection_dim=768,
    )
    model = AdaptedCLIPWithCrossAttention(transformers.CLIPModel(config), text_adapt_until=1, image_adapt_until=1, levels=(1,))
    context = model.compute_image_context(torch.randn(16, 3, 518, 518))
    assert context.shape == (16, 1369, 768)
    model.set_image_context(context)
    out = model.encode_text_intermediate(torch.randint(1, 99, (16, 77)))
    assert out.shape == (16, 77, 768)
    out.square().mean().backward()  # type: ignore[no-untyped-call]
    gradients = {name: x.grad for name, x in model.text_cross_attn.named_parameters()}
    assert {name for name, grad in gradients.items() if grad is None or not grad.abs().max() > 0} <= {"k_proj.bias"}
    assert all(x.grad is None for x in model.clipmodel.parameters())


def test_weights_of_nothing_leave_the_tower_s_features() -> None:
    model, images = make(image_adapt_weight=0.0), pictures(2, DOUBLE)
    other = make(image_adapt_until=0)
    other.image_adapter["seg_proj"].load_state_dict(model.image_adapter["seg_proj"].state_dict())
    for a, b in zip(model(images)[0], other(images)[0], strict=True):
        close(a, b)


# vision-aware text


def test_the_same_prompts_mean_another_thing_beside_another_image() -> None:
    model, text = make(), texts(1, 3)
    alone = model.get_adapted_text_embedding((text[:, :1], text[:, 1:]))
    assert alone.shape == (1, JOINT, 2)
    beside = model.get_adapted_text_embedding((text[:, :1], text[:, 1:]), model.compute_image_context(pictures(2, DOUBLE)))
    assert beside.shape == (2, JOINT, 2)
    assert (beside[0] - beside[1]).norm() > 1e-3 * beside.norm()
    close(model.get_adapted_text_embedding((text[:, :1], text[:, 1:])), alone)  # the context was for one call
    close(beside.norm(dim=1), torch.ones(2, 2, dtype=DOUBLE))
    flat = model.get_adapted_text_embedding((text[0, :1], text[0, 1:]))
    close(flat, alone[0])


def test_states_are_mean_directions_of_their_prompts() -> None:
    model, text = make(), texts(5)
    found = model.get_adapted_text_embedding((text[:2], text[2:]))
    single = F.normalize(text_by_hand(model, text, None), dim=-1)
    close(found, torch.stack([F.normalize(part.mean(0), dim=0) for part in (single[:2], single[2:])], 1))


def test_weights_over_patches_are_those_of_the_module() -> None:
    model, text = make(), texts(2)
    with pytest.raises(ArgumentError, match="set_image_context"):
        model.patch_attention(text)
    context = model.compute_image_context(pictures(2, DOUBLE))
    model.set_image_context(context)
    found = model.patch_attention(text, slice(1, 3))
    assert found.shape == (2, 2, 2, PATCHES)
    close(found.sum(-1), torch.ones_like(found[..., 0]))
    x = model.towers.text_block(0, model.towers.embed_text(text))
    query, key = (y.unflatten(2, (2, -1)).transpose(1, 2) for y in (model.text_cross_attn.q_proj(x), model.text_cross_attn.k_proj(context)))
    close(found, (query @ key.mT / math.sqrt(JOINT // 2)).softmax(-1)[:, :, 1:3])


# the originals' defects


def test_images_are_never_averaged_silently() -> None:
    model, text = make(), texts(3)
    context = model.compute_image_context(pictures(2, DOUBLE))
    model.set_image_context(context)
    with pytest.raises(ArgumentError, match=r"has 2 images for 3 batches of text; .* context_reduce='mean'"):
        model.encode_text(text)
    parity = make(context_reduce="mean")
    parity.load_state_dict(model.state_dict())
    parity.set_image_context(context)
    close(parity.encode_text(text), text_by_hand(parity, text, context.mean(0, keepdim=True).expand(3, -1, -1)))


def test_embeddings_without_the_context_that_training_had_are_not_silent() -> None:
    model, text = make(), texts(1, 2)
    model.expects_context = True
    with pytest.warns(UserWarning, match="trained beside an image's context"):
        model.get_adapted_text_embedding((text[:, :1], text[:, 1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.get_adapted_text_embedding((text[:, :1], text[:, 1:]), model.compute_image_context(pictures(1, DOUBLE)))


def test_adapters_of_zeros_do_not_divide_by_nothing() -> None:
    model = make()
    for parameter in model.text_adapter.parameters():
        nn.init.zeros_(parameter)
    assert model.encode_text(texts(2)).isfinite().all()


def test_cross_attention_without_text_is_refused() -> None:
    with pytest.raises(ArgumentError, match="use_cross_attention is True without a text context"):
        make()(pictures(2, DOUBLE), use_cross_attention=True)


def test_both_towers_compile_in_one_graph() -> None:
    model, text, images = make(torch.float32), texts(1, 3), pictures()
    model.set_image_context(model.compute_image_context(images))
    words: Any = torch.compile(model.encode_text, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(words(text), model.encode_text(text), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(words(text), model.encode_text(text), rtol=1e-4, atol=1e-5)
    seen: Any = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(seen(images)[1], model(images)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_halves_say_what_floats_say(how: str) -> None:
    model, text, images = make(torch.float32), texts(1, 4), pictures()
    context = model.compute_image_context(images)
    expected, levels = model.get_adapted_text_embedding((text[:, :2], text[:, 2:]), context), model(images)[0]
    half = model if how == "autocast" else model.bfloat16()
    given = torch.bfloat16 if how == "bfloat16" else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = half.get_adapted_text_embedding((text[:, :2], text[:, 2:]), context.to(given))
        found.square().sum().backward()
        others = half(images.to(given))[0]
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.03)
    torch.testing.assert_close(others[-1].float(), levels[-1], rtol=0.05, atol=0.03)
    assert half.text_cross_attn.q_proj.weight.grad.isfinite().all()


# states and arguments

FULL = {
    **{f"text_adapter.{i}.fc.0.weight": (JOINT, JOINT) for i in range(3)},
    **{f"image_adapter.layer_adapters.{i}.fc.0.weight": (WIDTH, WIDTH) for i in range(3)},
    **{f"image_adapter.seg_proj.{i}.fc.0.weight": (JOINT, WIDTH) for i in range(3)},
    "image_adapter.det_proj.fc.0.weight": (JOINT, WIDTH),
}


def test_states_have_the_original_s_names() -> None:
    model = make()
    found = {name: tuple(x.shape) for name, x in model.state_dict().items() if name.startswith(("text_adapter", "image_adapter"))}
    assert found == FULL
    flat = {name for name in make(relu=False).image_adapter.state_dict() if "seg" in name}
    assert flat == {f"seg_proj.{i}.fc.weight" for i in range(3)}
    again = make()
    again.load_state_dict(model.state_dict())


def test_images_of_another_size_are_interpolated_and_of_no_size_refused() -> None:
    model = make()
    assert model.compute_image_context(torch.randn(1, 3, 48, 40, dtype=DOUBLE)).shape == (1, 30, JOINT)
    with pytest.raises(ArgumentError, match="sides that are multiples of 8"):
        model(torch.randn(1, 3, 33, 32, dtype=DOUBLE))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "model": (lambda: AdaptedCLIPWithCrossAttention(nn.Linear(2, 2)), "clip_model is a Linear; allowed: open_clip's CLIP"),
    "until": (lambda: make(text_adapt_until=5), "text_adapt_until is 5; allowed: 0 to 4"),
    "levels": (lambda: make(levels=(3, 2)), "levels is (3, 2); allowed: rising numbers of 1 to 5"),
    "deep": (lambda: make(levels=(6, 12, 18, 24)), "levels is (6, 12, 18, 24)"),
    "value_layers": (lambda: make(value_layers=6), "value_layers is 6; allowed: 0 to 5"),
    "weight": (lambda: make(text_adapt_weight=1.5), "text_adapt_weight is 1.5; allowed: 0 to 1"),
    "heads": (lambda: make(cross_attn_heads=3), "num_heads is 3"),
    "text": (lambda: make().encode_text(torch.ones(2, 3)), "text is torch.float32 of shape (2, 3)"),
    "context": (lambda: make().set_image_context(torch.ones(2, 3)), "image_context has shape (2, 3); allowed: (B, M, 16)"),
    "text_context": (lambda: make().set_text_context(torch.ones(2, 3, 5)), "text_context has shape (2, 3, 5); allowed: (B, L, 16)"),
}


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(said)):
        call()
