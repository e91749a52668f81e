"""A model on triton_attn and back: outputs and gradients as before, bit for bit as before after undo, nothing half done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_attn
from triton_attn import ArgumentError, use_backend
from triton_attn.integrations.patching import patch, sdpa_override
from triton_attn.nn import MultiheadAttention

E, H, N = 16, 4, 9


def encoder(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, **how)


class Timm(nn.Module):
    """The shape of timm's attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused_attn, self.qkv, self.proj = True, nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, H, -1).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each call of our attention from a module, and of torch's from the override."""
    import triton_attn.nn.multihead_attention as module

    seen: list[str] = []
    attention = triton_attn.attention

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append("attention")
        return attention(*args, **kwargs)

    monkeypatch.setattr(module, "attention", noting)
    return seen


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own fused evaluation
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_an_encoder_computes_what_it_did(training: bool, masked: bool, calls: list[str]) -> None:
    model, x = encoder().train(training), torch.randn(2, N, E)
    mask = torch.zeros(2, N, dtype=torch.bool)
    mask[1, 6:] = masked
    how = {"src_key_padding_mask": mask} if masked else {}
    with torch.set_grad_enabled(training):
        before = model(x, **how)
        state = {name: id(parameter) for name, parameter in model.named_parameters()}
        report = patch(model)
        after = model(x, **how)
    assert len(calls) == 2  # in evaluation torch's layer would go past it
    shown = ~mask[..., None]
    torch.testing.assert_close(after * shown, before * shown, rtol=1e-4, atol=1e-5)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == state
    assert set(report.replaced) == {"layers.0.self_attn", "layers.1.self_attn"}
    if training:
        for a, b in zip(*(torch.autograd.grad(out.square().sum(), tuple(model.parameters())) for out in (after, before)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    report.undo()
    with torch.set_grad_enabled(training):
        assert torch.equal(model(x, **how), before)
    assert len(calls) == 2
    report.undo()  # a second time changes nothing
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention  # type: ignore[index,union-attr]


def test_a_patched_model_compiles_in_one_graph() -> None:
    model, x = encoder().eval(), torch.randn(2, N, E)
    with torch.no_grad():
        before = model(x)
        patch(model)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), before, rtol=1e-4, atol=1e-5)


def test_a_kernel_serves_a_patched_model() -> None:
    pytest.importorskip("triton")
    model, x = encoder().eval(), torch.randn(1, N, E)
    with torch.no_grad():
        before = model(x)
        patch(model)
        with use_backend("triton"):
            torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_what_is_left_is_said_with_its_reason() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"theirs": nn.MultiheadAttention(E, H), "own": Own(E, H), "ours": MultiheadAttention(E, H), "timm": Timm()})
    report = patch(model)
    assert set(report.replaced) == {"theirs"}
    assert report.skipped == {
        "own": "Own may compute something else",
        "ours": "it is ours already",
        "timm": "Timm calls torch's function; run it under sdpa_override()",
    }
    assert "theirs is now triton_attn.nn.MultiheadAttention" in str(report)


NOTHING: dict[str, tuple[Callable[[], Any], str]] = {
    "no attention": (lambda: nn.Linear(1, 1), "has no attention that this function knows; allowed: nn.MultiheadAttention inside"),
    "timm's": (Timm, "calls torch's function; run it under sdpa_override()"),
    "no model": (lambda: "ViT-B-32", "is a str; allowed: torch.nn.Module"),
}


@pytest.mark.parametrize(("make", "said"), NOTHING.values(), ids=NOTHING.keys())
def test_a_model_with_nothing_to_replace_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=r"^patch: model ") as raised:
        patch(make())
    assert said in str(raised.value)


def test_a_transformers_model_takes_the_interface_and_gives_it_back() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    configuration = transformers.ViTConfig(
        hidden_size=E, num_hidden_layers=2, num_attention_heads=H, intermediate_size=24, image_size=8, patch_size=4
    )
    model, image = transformers.ViTModel(configuration).eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = model(image).last_hidden_state
        report = patch(model)
        assert model.config._attn_implementation == "triton_attn"
        torch.testing.assert_close(model(image).last_hidden_state, before, rtol=1e-4, atol=1e-5)
        report.undo()
        assert torch.equal(model(image).last_hidden_state, before)


def test_torch_s_call_is_ours_inside_of_the_override(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    ours = triton_attn.scaled_dot_product_attention

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(1)
        return ours(*args, **kwargs)

    monkeypatch.setattr("triton_attn.integrations.patching.scaled_dot_product_attention", noting)
    model, x, original = Timm(), torch.randn(2, N, E), F.scaled_dot_product_attention
    before = model(x)
    with sdpa_override():
        with sdpa_override():
            torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
        model(x)
    assert len(seen) == 2  # once each: the portable path inside calls torch's
    assert F.scaled_dot_product_attention is original
    with pytest.raises(ValueError, match="boom"), sdpa_override():
        raise ValueError("boom")
    assert F.scaled_dot_product_attention is original
    model(x)
    assert len(seen) == 2
