"""Blocks inside of open_clip's own model: its classes, its preprocessing, two photographs. `make test-models` installs it."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import pytest
import torch

import tests.real_models  # noqa: F401  makes torchvision importable
from triton_attn import ArgumentError
from triton_attn.integrations.open_clip import param_groups, replace_transformer_in_model
from triton_attn.models import AdaptedCLIPWithCrossAttention
from triton_attn.nn import EnhancedTransformer
from triton_attn.nn.enhanced_transformer import BLOCK_TYPES

if not (importlib.util.find_spec("open_clip") and importlib.util.find_spec("torchvision") and importlib.util.find_spec("sklearn")):
    pytest.skip("needs open_clip, torchvision and scikit-learn", allow_module_level=True)

open_clip = pytest.importorskip("open_clip")
pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = ("a photo of a temple in China", "a photo of a flower")


@pytest.fixture(scope="module")
def clip() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """ViT-B-32 with random weights, both photographs of scikit-learn through its preprocessing, two sentences."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None, force_quick_gelu=True)
    images = torch.stack([preprocess(Image.fromarray(photograph)) for photograph in load_sample_images().images])
    return model.eval(), images, open_clip.get_tokenizer("ViT-B-32")(list(TEXT))


def features(clip: tuple[Any, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    model, images, text = clip
    with torch.no_grad():
        found: tuple[torch.Tensor, torch.Tensor] = (model.encode_image(images), model.encode_text(text))
    return found


def test_standard_blocks_change_no_feature(clip: Any) -> None:
    before = features(clip)
    report = replace_transformer_in_model(clip[0], "standard", ("visual", "text"))
    assert isinstance(clip[0].transformer, EnhancedTransformer)
    first: Any = clip[0].transformer.resblocks[0]
    assert type(first.mlp.gelu).__name__ == "QuickGELU"
    assert report.initialised == ()
    for a, b in zip(features(clip), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    report.undo()
    for a, b in zip(features(clip), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_TYPES if kind != "standard"])
def test_every_kind_trains_saves_and_loads(clip: Any, kind: str) -> None:
    model, images, text = clip
    state = {name: x.clone() for name, x in model.state_dict().items()}
    report = replace_transformer_in_model(model, kind, ("visual", "text") if kind != "subln" else ("visual",))
    try:
        optimizer, losses = torch.optim.AdamW(param_groups(model, 1e-4)), []
        model.train()
        for _ in range(5):
            image, words, scale = model(images, text)[:3]
            loss = torch.nn.functional.cross_entropy(scale * image @ words.mT, torch.arange(2))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        saved = io.BytesIO()
        torch.save(model.state_dict(), saved)
        saved.seek(0)
        model.load_state_dict(torch.load(saved, weights_only=True))
    finally:
        report.undo()
        model.load_state_dict(state)
        model.eval()


@pytest.mark.parametrize("scaled", [False, True])
def test_adapters_stand_around_its_clip_and_leave_it_alone(scaled: bool) -> None:
    """Its own embeddings to the last bit; its blocks with values in place of queries and keys; gradients for adapters alone."""
    torch.manual_seed(0)
    scale = {"ls_init_value": 0.5} if scaled else {}
    vision = {"layers": 4, "width": 24, "head_width": 8, "patch_size": 8, "image_size": 32, **scale}
    text = {"context_length": 9, "vocab_size": 32, "width": 16, "heads": 2, "layers": 3, **scale}
    # frozen before too: nn.MultiheadAttention takes another path for parameters that need gradients
    clip = open_clip.model.CLIP(16, vision, text).double().eval().requires_grad_(False)
    images, words = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randint(1, 30, (2, 9))
    words[:, 5], words[:, 6:] = 31, 0
    with torch.no_grad():
        seen, meant = clip.encode_image(images), clip.encode_text(words)
    model: Any = AdaptedCLIPWithCrossAttention(clip, 0.1, 0.1, 2, 2, (2, 4), cross_attn_heads=2, cross_attn_dropout=0.0)
    with torch.no_grad():
        assert torch.equal(model.encode_text(words, adapt_text=False), meant)
        patches, cls = model.forward_original(images)
    assert torch.equal(cls, seen)
    assert patches[0].shape == (2, 16, 16)
    plain: Any = AdaptedCLIPWithCrossAttention(clip, 0.0, 0.0, 2, 2, (2, 4), cross_attn_heads=2, value_layers=0)
    plain.text_adapter[-1].fc = torch.nn.Identity()
    torch.testing.assert_close(plain.encode_text(words) @ clip.text_projection, meant)
    torch.testing.assert_close(
        plain.dense_features(images)[-1],
        torch.nn.functional.normalize(patches[0], dim=-1) + torch.nn.functional.normalize(seen, dim=-1)[:, None],
    )
    # a block whose queries and keys are its values
    block = clip.visual.transformer.resblocks[1]
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    found = model.towers.value_block(1, x)
    weight, bias = block.attn.in_proj_weight.clone(), block.attn.in_proj_bias.clone()
    with torch.no_grad():
        for part in (slice(0, 24), slice(24, 48)):
            block.attn.in_proj_weight[part], block.attn.in_proj_bias[part] = weight[48:], bias[48:]
        torch.testing.assert_close(found, block(x))
        block.attn.in_proj_weight.copy_(weight)
        block.attn.in_proj_bias.copy_(bias)
    states = model.get_adapted_text_embedding((words[:1], words[1:]), model.compute_image_context(images))
    assert (states[0] - states[1]).abs().max() > 1e-4
    segments, _ = model(images)
    sum((level @ states).square().mean() for level in segments).backward()
    assert all(x.grad is None for x in clip.parameters())
    assert model.text_cross_attn.q_proj.weight.grad.abs().max() > 0
    with pytest.raises(ArgumentError, match="force_image_size"):
        model(torch.randn(1, 3, 40, 40, dtype=torch.float64))


def test_its_models_and_tokenizers_are_a_source_for_training() -> None:
    """ViT-B-32 with random weights by name, with another image size; sentences of a class beside two images."""
    from triton_attn.clip import prompts, sources

    source = sources.load("open_clip:ViT-B-32", 64)
    assert source.loader.side == 64
    tokens = prompts.tokens_of(["metal_nut"], source.tokenizer)
    assert [part.shape for part in tokens["metal_nut"]] == [(6, 77), (10, 77)]
    model = AdaptedCLIPWithCrossAttention(source.clip, levels=(3, 6, 9, 12)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = prompts.embeddings(model, tokens, ["metal_nut"] * 2, model.compute_image_context(images))
        levels, _ = model(images)
    assert found.shape == (2, 512, 2)
    assert (found[0] - found[1]).abs().max() > 1e-5
    assert [level.shape for level in levels] == [(2, 4, 512)] * 4
    with pytest.raises(ArgumentError, match="which open_clip cannot load"):
        sources.load("open_clip:ViT-Nothing")


VISION = {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "image_size": 32}
WORDS = {"context_length": 9, "vocab_size": 32, "width": 16, "heads": 2, "layers": 3}


def test_a_text_tower_that_is_not_causal_keeps_what_follows_the_end() -> None:
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(16, VISION, {**WORDS, "no_causal_mask": True}).double().eval()
    words = torch.randint(1, 30, (2, 9))
    words[:, 5], words[:, 6:] = 31, 0
    with torch.no_grad():
        meant = clip.encode_text(words)
    model: Any = AdaptedCLIPWithCrossAttention(clip, 0.0, 0.0, 2, 2, (2,), cross_attn_heads=2).eval()
    model.text_adapter[-1].fc = torch.nn.Identity()
    torch.testing.assert_close(model.encode_text(words) @ clip.text_projection, meant)


@pytest.mark.parametrize("option", ["scale_attn", "scale_heads", "scale_attn_inner"])
def test_blocks_that_attend_in_a_way_of_their_own_are_named(option: str) -> None:
    with pytest.raises(ArgumentError, match=rf"clip_model has blocks with {option}; allowed"):
        AdaptedCLIPWithCrossAttention(open_clip.model.CLIP(16, {**VISION, option: True}, WORDS), levels=(2,))
    kept = open_clip.model.CLIP(16, {**VISION, "block_type": "custom"}, {**WORDS, option: True})  # text runs its blocks as they are
    AdaptedCLIPWithCrossAttention(kept, 0.1, 0.1, 2, 2, (2,), cross_attn_heads=2)
