"""Contexts of an adapted CLIP: never a stale one, averaged where asked for, and missed where training had one."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.small_clip import JOINT, PATCHES, TOKENS, pictures, small_clip, texts
from triton_attn import ArgumentError
from triton_attn.models import AdaptedCLIPWithCrossAttention

DOUBLE = torch.float64
SMALL: dict[str, Any] = {"text_adapt_until": 2, "image_adapt_until": 3, "levels": (2, 3, 5), "cross_attn_heads": 2}


def make(dtype: torch.dtype = DOUBLE, **how: Any) -> Any:
    return AdaptedCLIPWithCrossAttention(small_clip(dtype=dtype), **{**SMALL, **how}).eval()


def contexts(count: int = 3) -> Tensor:
    return torch.randn(count, PATCHES, JOINT, dtype=DOUBLE)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def assigned(model: Any, context: Tensor) -> None:
    model.current_image_context = contexts()


def edited(model: Any, context: Tensor) -> None:
    model.current_image_context.mul_(2)


def edited_unseen(model: Any, context: Tensor) -> None:
    context.data.mul_(2)


def written_unseen(model: Any, context: Tensor) -> None:
    model.text_cross_attn.v_proj.weight.data.copy_(torch.randn(JOINT, JOINT))


def biased(model: Any, context: Tensor) -> None:
    model.text_cross_attn.k_proj.bias.data.copy_(torch.randn(JOINT))


def hooked(model: Any, context: Tensor) -> None:
    model.text_cross_attn.v_proj.register_forward_hook(lambda module, given, out: out.flip(-1))


def replaced(model: Any, context: Tensor) -> None:
    model.text_cross_attn.v_proj = nn.Sequential(model.text_cross_attn.v_proj, nn.Tanh())


@pytest.mark.parametrize("change", [assigned, edited, edited_unseen, written_unseen, biased, hooked, replaced])
def test_nothing_that_keys_and_values_are_made_of_changes_unseen(change: Callable[[Any, Tensor], None]) -> None:
    model, text, context = make(), texts(3), contexts()
    model.set_image_context(context)
    with torch.no_grad():
        before = model.encode_text(text)
        close(model.encode_text(text), before)
        change(model, context)
        after = model.encode_text(text)
    fresh = model.encode_text(text)  # with gradients nothing is kept
    close(after, fresh)
    moved = change is not biased  # moves every score of a query alike
    assert torch.allclose(before, after, rtol=1e-6) != moved


def test_a_context_is_projected_once_for_all_calls_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = make(), texts(3)
    calls: list[int] = []
    real = model.text_cross_attn.project_context

    def counted(context: Tensor) -> Any:
        calls.append(len(context))
        return real(context)

    monkeypatch.setattr(model.text_cross_attn, "project_context", counted)
    context = contexts()
    model.set_image_context(context)
    with torch.no_grad():
        for _ in range(3):
            model.encode_text(text)
        model.set_image_context(context.clone())  # of the same values
        model.encode_text(texts(3, 2))
        assert calls == [3]
        model.set_image_context(contexts(2))
        model.encode_text(texts(2))
        assert calls == [3, 2]
    with torch.inference_mode():
        model.set_image_context(contexts(2))
        for _ in range(2):
            model.encode_text(texts(2))
    assert calls == [3, 2, 2]
    words = texts(2)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda one: model.encode_text(words) + one)  # where values cannot be compared
        close(mapped(torch.zeros(2, 1, dtype=DOUBLE))[1], model.encode_text(words))
    assert copy.deepcopy(model).encode_text(texts(2)).shape == (2, JOINT)


# one context for all, as in the original


def test_a_mean_context_serves_texts_that_are_not_as_many_as_images() -> None:
    model, context, text = make(context_reduce="mean"), contexts(3), texts(1, 4)
    mean, flat = context.mean(0, keepdim=True), text[0]

    def alone(tokens: Tensor, beside: Tensor) -> Tensor:
        model.set_image_context(beside)
        return torch.cat([model.encode_text(tokens[i : i + 1]) for i in range(len(tokens))])

    expected = alone(flat, mean)
    model.set_image_context(context)
    close(model.encode_text(flat), expected)
    close(model.encode_text(text), expected[None])
    found = model.get_adapted_text_embedding((flat[:2], flat[2:]), context)
    unit = F.normalize(expected, dim=-1)
    wanted = torch.stack([F.normalize(part.mean(0), dim=0) for part in (unit[:2], unit[2:])], 1)
    close(found, wanted)
    close(model.get_adapted_text_embedding((text[:, :2], text[:, 2:]), context), wanted[None])
    paired = torch.cat([alone(flat[i : i + 1], context[i : i + 1]) for i in range(3)])
    model.set_image_context(context)
    close(model.encode_text(flat[:3]), paired)  # as many: each beside its own
    close(model.encode_text(flat[:3, None]), paired[:, None])


# embeddings without the context that training had


def test_what_training_had_is_remembered_and_said() -> None:
    model, text = make(torch.float32), texts(2)
    assert not model.expects_context
    model.encode_text(text)
    model.expects_context = True
    held = io.BytesIO()
    torch.save(model.state_dict(), held)
    held.seek(0)
    state, again = torch.load(held, weights_only=True), make(torch.float32)
    again.load_state_dict(state)
    for call in (again.encode_text, again.encode_text_intermediate, lambda x: again.get_adapted_text_embedding((x, x))):
        with pytest.warns(UserWarning, match="trained beside an image's context") as said:
            call(text)
        assert [row.filename for row in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.encode_text(text, adapt_text=False)
        again.set_image_context(contexts(1).float())
        again.encode_text(text)


def test_dictionaries_of_the_original_load_strictly_and_mean_a_context() -> None:
    model = make(torch.float32)
    state = {name: x for name, x in model.state_dict().items() if name != "_extra_state"}
    again = make(torch.float32)
    again.load_state_dict(state)
    assert again.expects_context
    inner = nn.ModuleDict({"model": make(torch.float32)})
    inner.load_state_dict({f"model.{name}": x for name, x in state.items()})
    other = make(torch.float32)
    other.load_state_dict({name: x for name, x in state.items() if name.startswith("clipmodel")}, strict=False)
    assert not other.expects_context


def test_embeddings_without_a_context_compile_in_one_graph() -> None:
    model, text = make(torch.float32), texts(1, 4)
    model.expects_context = True
    compiled: Any = torch.compile(model.get_adapted_text_embedding, fullgraph=True, backend="eager")
    found = compiled((text[:, :2], text[:, 2:]))
    model.expects_context = False
    torch.testing.assert_close(found, model.get_adapted_text_embedding((text[:, :2], text[:, 2:])), rtol=1e-4, atol=1e-5)


# shapes and arguments


def test_prompts_of_the_untouched_clip_keep_their_axes() -> None:
    model, text = make(), texts(2, 3)
    found = model.encode_text(text, adapt_text=False)
    assert found.shape == (2, 3, JOINT)
    close(found[1], model.encode_text(text[1], adapt_text=False))


def test_weights_of_one_token_and_of_a_masked_context() -> None:
    model, text, hidden = make(), texts(3), torch.zeros(3, PATCHES, dtype=torch.bool)
    hidden[:, 4:] = True
    model.set_image_context(contexts())
    close(model.patch_attention(text, 3), model.patch_attention(text)[:, :, 3:4])
    weights = model.patch_attention(text, context_key_padding_mask=hidden)
    assert (weights[..., 4:] == 0).all()
    close(weights.sum(-1), torch.ones_like(weights[..., 0]))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "levels": (lambda: make(levels=3), "levels is 3, a int; allowed: rising numbers of 1 to 5"),
    "falling": (lambda: make().dense_features(pictures(1, DOUBLE), (5, 2)), "levels is (5, 2); allowed: rising numbers of 1 to 5"),
    "deep": (lambda: make().dense_features(pictures(1, DOUBLE), (9,)), "levels is (9,)"),
    "no level": (lambda: make().dense_features(pictures(1, DOUBLE), ()), "levels is ()"),
    "relu": (lambda: make(relu="no"), "relu is 'no', a str; allowed: True, False"),
    "strings": (lambda: make().get_adapted_text_embedding(("a", "b")), "prompts is a str; allowed: whole numbers"),
    "string": (lambda: make().get_adapted_text_embedding("ab"), "prompts is a str; allowed: token numbers of each state"),
    "empty": (lambda: make().get_adapted_text_embedding(()), "prompts is empty; allowed: token numbers of each state"),
    "none": (lambda: make().get_adapted_text_embedding((texts(2), texts(0))), f"prompts is torch.int64 of shape (0, {TOKENS})"),
    "no text": (lambda: make().encode_text(texts(0)), f"text is torch.int64 of shape (0, {TOKENS}); allowed: whole numbers"),
    "batches": (
        lambda: make().get_adapted_text_embedding((texts(2, 1), texts(3, 1))),
        "; allowed: one T, one B or 1",
    ),
    "no token": (lambda: make().encode_text(texts(2)[:, :0]), "text is torch.int64 of shape (2, 0)"),
    "floats": (lambda: make().encode_text(torch.ones(2, 9), adapt_text=False), "text is torch.float32 of shape (2, 9)"),
    "whole": (lambda: make().set_image_context(contexts().long()), "image_context has dtype torch.int64; allowed: torch.float16"),
}


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(said)):
        call()


@pytest.mark.parametrize("name", ["SiglipModel", "ChineseCLIPModel", "AltCLIPModel", "BlipModel"])
def test_transformers_with_the_parts_of_a_clip_that_are_none_are_named(name: str) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_model, self.vision_model = nn.Linear(1, 1), nn.Linear(1, 1)
            self.config = type("Config", (), {"model_type": name.lower()})()

    Other.__name__ = name
    with pytest.raises(ArgumentError, match=f"clip_model is a {name} of type '{name.lower()}'; allowed: open_clip's CLIP"):
        AdaptedCLIPWithCrossAttention(Other())
