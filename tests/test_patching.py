"""A model on triton_attn and back: outputs and gradients as before, bit for bit as before after undo, nothing half done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_attn
from triton_attn import ArgumentError, Unsupported, patch, sdpa_override, use_backend
from triton_attn.integrations import torch_sdpa
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

    hooked = Timm()
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {"theirs": nn.MultiheadAttention(E, H), "own": Own(E, H), "ours": MultiheadAttention(E, H), "unfused": unfused(), "hooked": hooked}
    )
    report = patch(model)
    assert set(report.replaced) == {"theirs"}
    assert report.skipped == {
        "own": "Own may compute something else",
        "ours": "it is ours already",
        "unfused": "Timm is set to compute its attention by itself (fused_attn)",
        "hooked": "this Timm has a forward of its own",
    }
    assert "theirs is now triton_attn.nn.MultiheadAttention" in str(report)


def unfused() -> Timm:
    model = Timm()
    model.fused_attn = False
    return model


NOTHING: dict[str, tuple[Callable[[], Any], str]] = {
    "no attention": (lambda: nn.Linear(1, 1), "has no attention that this function knows; allowed: a model with an attention"),
    "its own attention": (lambda: unfused(), "the model: Timm is set to compute its attention by itself"),
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


# modules that call torch's function themselves


def test_a_module_that_calls_torch_s_function_calls_ours_and_stays_itself() -> None:
    model, x = nn.Sequential(Timm(), Timm()), torch.randn(2, N, E)
    before, first = model(x), model[0]
    report = patch(model)
    assert report.replaced == dict.fromkeys("01", "Timm on triton_attn.attention")
    assert not report.changes_function
    assert model[0] is first
    assert isinstance(first, Timm)
    assert triton_attn.explain(model, x).mechanism == "attention"
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="made no call"):
        triton_attn.explain(Timm(), x)  # others of the class are left alone
    report.undo()
    assert type(first) is Timm
    assert torch.equal(model(x), before)


# another mechanism

OTHERS: dict[str, tuple[dict[str, Any], bool]] = {
    "strided_attention": ({"stride": 2}, True),
    "local_global_attention": ({"window": 4}, True),
    "dilated_attention": ({"segment_lengths": (4, 8), "dilation_rates": (1, 2)}, True),
    "sparse_attention": ({"keep_ratio": 0.5}, True),
    "linear_attention": ({}, False),
}


@pytest.mark.parametrize("mechanism", OTHERS)
def test_another_mechanism_takes_padding_and_causality_and_says_that_it_is_another(mechanism: str) -> None:
    options, _ = OTHERS[mechanism]
    model, x = encoder().eval(), torch.randn(2, N, E)
    padding = torch.arange(N) >= torch.tensor([[N], [6]])
    causal = nn.Transformer.generate_square_subsequent_mask(N)
    with torch.no_grad(), patch(model, mechanism, **options) as report:
        assert report.changes_function
        assert "needs training" in str(report)
        assert triton_attn.explain(model, x).mechanism in (mechanism, "subset_attention")
        whole, padded = model(x), model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(padded[0], whole[0], rtol=1e-4, atol=1e-5)
        assert (padded[1, :6] - whole[1, :6]).abs().max() > 1e-3
        added = torch.zeros(2, N).masked_fill(padding, -torch.inf)
        both = [model(y, mask=causal, is_causal=True, src_key_padding_mask=added) for y in (x, x * (~padding)[..., None])]
        torch.testing.assert_close(both[0][1, :6], both[1][1, :6], rtol=1e-4, atol=1e-5)
        other = x.clone()
        other[:, 5:] += 1
        both = [model(y, mask=causal, is_causal=True) for y in (x, other)]
        torch.testing.assert_close(both[0][:, :5], both[1][:, :5], rtol=1e-4, atol=1e-5)
        assert (both[0][:, 5:] - both[1][:, 5:]).abs().max() > 1e-3
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention  # type: ignore[index,union-attr]


@pytest.mark.parametrize("mechanism", OTHERS)
def test_another_mechanism_trains_and_compiles(mechanism: str) -> None:
    options, has_dropout = OTHERS[mechanism]
    model, x = nn.Sequential(Timm(), encoder()), torch.randn(2, N, E)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.1 * has_dropout
    patch(model, mechanism, **options)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-5)


def test_what_another_mechanism_cannot_give_is_refused_by_name() -> None:
    x, mask = torch.randn(2, N, E), torch.rand(N, N) > 0.5
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    patch(attention, "strided_attention", stride=2)
    with pytest.raises(Unsupported, match=r"^strided_attention cannot give attention weights .*; pass need_weights=False"):
        attention(x, x, x)
    with pytest.raises(Unsupported, match=r"^strided_attention takes no attn_mask of shape .* but the causal one"):
        attention(x, x, x, need_weights=False, attn_mask=mask)
    with pytest.raises(Unsupported, match=r"adds other numbers than 0 and -inf"):
        attention(x, x, x, need_weights=False, key_padding_mask=torch.randn(2, N))
    dropping = nn.MultiheadAttention(E, H, dropout=0.1, batch_first=True)
    patch(dropping, "linear_attention")
    with pytest.raises(Unsupported, match=r"^linear_attention has no attention weights to drop"):
        dropping(x, x, x, need_weights=False)


@pytest.mark.parametrize(
    ("mechanism", "options", "said"),
    [
        ("flash", {}, "mechanism is 'flash'; allowed: 'attention', "),
        ("strided_attention", {}, "stride is missing; strided_attention needs it"),
        ("strided_attention", {"stride": 2, "window": 4}, "window is no option of strided_attention; allowed: stride, phase"),
        ("strided_attention", {"stride": 0}, "stride is 0; allowed: a whole number, 1 and more"),
        ("attention", {"scale": 2.0}, "scale is no option of attention; allowed: none"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_changes(mechanism: str, options: dict[str, Any], said: str) -> None:
    model = encoder()
    with pytest.raises(ArgumentError) as raised:
        patch(model, mechanism, **options)
    assert said in str(raised.value)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention  # type: ignore[index,union-attr]


# torch's registry of implementations


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [2, 1])
def test_what_torch_s_registry_gets_computes_torch_s_function(causal: bool, heads: int) -> None:
    pytest.importorskip("triton")
    query, key, value = (torch.randn(1, h, n, 16, requires_grad=True) for h, n in ((2, 9), (heads, 12), (heads, 12)))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    grad = torch.randn_like(expected)
    with torch.no_grad():
        out, lse, *_, seed, offset, _ = torch_sdpa._forward(query, key, value, 0.0, causal)
        found = torch_sdpa._backward(grad, query, key, value, out, lse, None, None, 9, 12, 0.0, causal, seed, offset)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (query, key, value), grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(Unsupported, match=r"^triton_attn cannot give dropout_p=0.1"):
        torch_sdpa._forward(query, key, value, 0.1)


@pytest.mark.filterwarnings("ignore:.*verrid")  # torch says that its kernel is overridden
def test_torch_s_registry_activates_and_restores() -> None:
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, restore_flash_attention_impl

    name = torch_sdpa.register()
    assert current_flash_attention_impl() is None
    activate_flash_attention_impl(name)
    try:
        assert current_flash_attention_impl() == name
    finally:
        restore_flash_attention_impl()
    assert current_flash_attention_impl() is None
