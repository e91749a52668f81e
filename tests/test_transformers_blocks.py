"""Residual blocks inside of transformers' own CLIPModel: the standard one changes nothing, the others train, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from tests.small_clip import TOKENS, pictures, small_clip, texts  # noqa: E402
from triton_attn import ArgumentError, Unsupported  # noqa: E402
from triton_attn.integrations.open_clip import param_groups  # noqa: E402
from triton_attn.integrations.transformers_clip import replace_transformer_in_model  # noqa: E402
from triton_attn.nn.enhanced_transformer import BLOCK_TYPES  # noqa: E402

BOTH = ("visual", "text")
OTHERS = [kind for kind in BLOCK_TYPES if kind != "standard"]


def run(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(input_ids=texts(3), pixel_values=pictures(3, model.dtype), **options)


def assert_equal(ours: Any, theirs: Any) -> None:
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_standard_blocks_change_no_output(implementation: str, padded: bool) -> None:
    model = small_clip()
    model.set_attn_implementation(implementation)
    mask = {"attention_mask": (torch.arange(TOKENS) < torch.tensor([[6], [7], [9]])).long()} if padded else {}
    before, state = run(model, **mask), model.state_dict()
    report = replace_transformer_in_model(model, "standard", BOTH)
    assert report.replaced == {
        "vision_model.encoder.layers": "5 ResidualAttentionBlocks",
        "text_model.encoder.layers": "4 ResidualAttentionBlocks",
    }
    assert report.initialised == ()
    assert len(report.copied) == 12 * 9
    assert not report.changes_function
    assert type(model.vision_model.encoder.layers[0].block.mlp.gelu).__name__ == "QuickGELUActivation"
    assert_equal(run(model, **mask), before)
    report.undo()
    assert model.state_dict().keys() == state.keys()
    for name, ours in run(model, **mask).items():
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind_trains_saves_and_loads(kind: str, tmp_path: Path) -> None:
    model = small_clip()
    report = replace_transformer_in_model(model, kind, BOTH)
    assert report.changes_function
    ids, images = texts(4), pictures(4)
    optimizer, losses = torch.optim.AdamW(param_groups(model, 1e-3)), []
    model.train()
    for _ in range(5):
        loss = model(input_ids=ids, pixel_values=images, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = small_clip(seed=5)
    replace_transformer_in_model(again, kind, BOTH, copy_weights=False)
    assert not torch.equal(run(again).image_embeds, run(model).image_embeds)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(run(again)[name], run(model)[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_text_stays_causal(kind: str) -> None:
    model = small_clip()
    replace_transformer_in_model(model, kind, ("text",))
    words = texts(1)
    changed = words.clone()
    changed[:, 4] = words[:, 4] % 29 + 1
    with torch.no_grad():
        first, second = (model.text_model(input_ids=ids).last_hidden_state for ids in (words, changed))
    torch.testing.assert_close(first[:, :4], second[:, :4], rtol=1e-5, atol=1e-6)
    assert (first[:, 4] - second[:, 4]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["linear", "sparse"])
def test_padding_that_a_block_cannot_honour_raises(kind: str) -> None:
    model = small_clip()
    replace_transformer_in_model(model, kind, ("text",))
    mask = (torch.arange(TOKENS) < torch.tensor([[6], [7], [9]])).long()
    with pytest.raises(Unsupported, match=r"AttentionResidualBlock cannot"):
        run(model, attention_mask=mask)


def test_hidden_states_are_recorded_before_and_after() -> None:
    model = small_clip()
    before = run(model, output_hidden_states=True).vision_model_output.hidden_states
    report = replace_transformer_in_model(model, "standard", ("visual",))
    for _ in range(2):
        found = run(model, output_hidden_states=True).vision_model_output.hidden_states
        assert len(found) == len(before) == 6
        for ours, theirs in zip(found, before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    report.undo()
    assert len(run(model, output_hidden_states=True).vision_model_output.hidden_states) == 6


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # whose new name older releases lack
def test_checkpointing_dtype_mode_and_frozen_parameters_are_kept() -> None:
    model = small_clip(dtype=torch.float64).train()
    model.gradient_checkpointing_enable()
    model.vision_model.encoder.layers[1].requires_grad_(False)
    ids, images = texts(2), pictures(2, torch.float64)
    loss = model(input_ids=ids, pixel_values=images, return_loss=True).loss
    loss.backward()
    wanted = model.vision_model.embeddings.class_embedding.grad.clone()
    model.zero_grad()
    replace_transformer_in_model(model, "standard", ("visual",))
    layers = model.vision_model.encoder.layers
    assert layers[0].gradient_checkpointing
    assert all(layer.training for layer in layers)
    assert {x.dtype for x in layers.parameters()} == {torch.float64}
    assert not any(x.requires_grad for x in layers[1].parameters())
    assert all(x.requires_grad for x in layers[0].parameters())
    calls = []
    layers[0].block.register_forward_pre_hook(lambda *_: calls.append(1))
    again = model(input_ids=ids, pixel_values=images, return_loss=True).loss
    again.backward()
    assert len(calls) == 2  # once more in the backward pass
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(model.vision_model.embeddings.class_embedding.grad, wanted)


def test_towers_alone_fit_too() -> None:
    clip = small_clip()
    for model, tower in ((clip.vision_model, "visual"), (clip.text_model, "text")):
        report = replace_transformer_in_model(model, "parallel", (tower,))
        assert list(report.replaced) == ["encoder.layers"]
        report.undo()


def test_learning_rates_are_those_of_the_block() -> None:
    model = small_clip()
    replace_transformer_in_model(model, "linear", ("visual",))
    rates = {id(x): group["lr"] for group in param_groups(model, 1.0) for x in group["params"]}
    assert {rates[id(x)] for x in model.vision_model.encoder.parameters()} == {1.2}
    assert {rates[id(x)] for x in model.text_model.parameters()} == {1.0}


class OtherLayer(torch.nn.Linear):
    pass


def spoiled(what: str) -> Any:
    model = small_clip()
    layer = model.vision_model.encoder.layers[2]
    if what == "layer":
        model.vision_model.encoder.layers[2] = torch.nn.Identity()
    elif what == "linear":
        layer.mlp.fc1 = OtherLayer(24, 48)
    elif what == "dropout":
        layer.self_attn.dropout = 0.1
    else:
        layer.self_attn.q_proj.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("layer", r"has a Identity at vision_model.encoder.layers.2; allowed: CLIPEncoderLayer"),
        ("linear", r"has a OtherLayer at vision_model.encoder.layers.2.mlp.fc1; allowed: torch.nn.Linear"),
        ("dropout", r"attention_dropout 0.1"),
        ("frozen", r"weights of q_proj, k_proj, v_proj at vision_model.encoder.layers.2 that differ"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(what: str, said: str) -> None:
    model = spoiled(what)
    before = model.text_model.encoder.layers
    with pytest.raises(ArgumentError, match=said):
        replace_transformer_in_model(model, "parallel", ("text", "visual"))
    assert model.text_model.encoder.layers is before


def test_other_models_and_arguments_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="has 'visual', but a Linear has no CLIPVisionModel inside"):
        replace_transformer_in_model(torch.nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="block_type is 'round'; allowed: 'standard'"):
        replace_transformer_in_model(small_clip(), "round")
    with pytest.raises(ArgumentError, match=r"towers is \('audio',\); allowed: some of"):
        replace_transformer_in_model(small_clip(), "linear", ("audio",))
