"""Blocks inside of open_clip's own model: its classes, its preprocessing, two photographs. `make test-models` installs it."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import pytest
import torch

import tests.real_models  # noqa: F401  makes torchvision importable
from triton_attn.integrations.open_clip import param_groups, replace_transformer_in_model
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
