"""`patch` on real model classes: outputs and gradients as before, as many calls as layers, bit for bit as before after undo."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import triton_attn
from tests.real_models import MODELS, counted, far, in_double, made, results
from triton_attn import patch, use_backend

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


def installed(*names: str) -> pytest.MarkDecorator:
    """A test of each model, or of those named, where their libraries are."""
    chosen = {name: MODELS[name] for name in names} or MODELS
    marks = {
        name: () if model.here else (pytest.mark.skip(reason=f"needs {', '.join(model.needs)}: make test-models"),)
        for name, model in chosen.items()
    }
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name], id=name) for name in chosen])


@installed()
def test_a_patched_model_is_as_near_to_the_truth_and_undone_bit_for_bit(name: str) -> None:
    model, call = made(name)
    before, truth, state = results(model, call), in_double(model, call), list(model.state_dict())
    with patch(model) as report:
        assert not report.changes_function
        assert list(model.state_dict()) == state
        with counted() as seen:
            after = results(model, call)
        assert len(seen) == MODELS[name].calls, (seen, str(report))
    off, allowed = far(after, truth), far(before, truth)
    for key, tensor in truth.items():
        assert off[key] <= 3 * allowed[key] + 2.0**-22 * float(tensor.abs().max()), (key, off[key], allowed[key])
    again = results(model, call)
    assert all(torch.equal(again[key], before[key]) for key in before)


@installed()
def test_a_kernel_serves_the_model(name: str) -> None:
    pytest.importorskip("triton")
    model, call = made(name)
    with torch.no_grad():
        before = call(model)
        with patch(model), use_backend("triton"):
            torch.testing.assert_close(call(model), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


@installed()
def test_a_patched_model_runs_under_autocast(name: str) -> None:
    model, call = made(name)
    with torch.autocast("cpu", torch.bfloat16):  # with gradients: torch's fused evaluation does not know autocast
        before = call(model).detach()
        with patch(model):
            after = call(model).detach()
    exact = in_double(model, call)["output"]
    error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (after, before))
    assert after.dtype is before.dtype
    assert error <= 2 * allowed


def compiled(name: str, backend: str) -> None:
    torch._dynamo.reset()
    model, call = made(name)
    with torch.no_grad(), patch(model):
        eager = call(model)
        found = torch.compile(lambda: call(model), fullgraph=True, backend=backend)()
    torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-4 * float(eager.abs().max()))


# what keeps the others out of one graph is in the models themselves, patched or not
ONE_GRAPH = [name for name in MODELS if "Qwen" not in name]


@installed(*ONE_GRAPH)
def test_a_patched_model_compiles_in_one_graph(name: str) -> None:
    compiled(name, "aot_eager")


@pytest.mark.slow
@installed(*ONE_GRAPH)
def test_a_patched_model_compiles_with_inductor(name: str) -> None:
    compiled(name, "inductor")


@installed("transformers ViTModel")
def test_a_patched_model_is_exported_and_runs_in_another_process(name: str, tmp_path: Path) -> None:
    model, _ = made(name)
    images = torch.randn(2, 3, 16, 16)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.model(pixels).last_hidden_state
            return out

    with patch(model), torch.no_grad():
        expected = Whole()(images)
        torch.export.save(torch.export.export(Whole(), (images,)), tmp_path / "model.pt2")
    torch.save((images, expected), tmp_path / "case.pt")
    code = """
import sys, torch, triton_attn
images, expected = torch.load(sys.argv[2])
found = torch.export.load(sys.argv[1]).module()(images)
assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
"""
    files = [str(tmp_path / "model.pt2"), str(tmp_path / "case.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd=Path(__file__).parents[1], timeout=300)


@installed("torch.nn.TransformerEncoder, padded")
def test_gradients_of_each_sample_of_a_patched_model(name: str) -> None:
    model, _ = made(name)
    samples = torch.randn(3, 1, 7, 32)
    with patch(model):
        parameters = dict(model.named_parameters())

        def loss(parameters: Mapping[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.func.functional_call(model, dict(parameters), (sample,))
            return out.square().sum()

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
        for i, sample in enumerate(samples):
            expected = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
            for gradient, one in zip(found.values(), expected, strict=True):
                torch.testing.assert_close(gradient[i], one, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@installed("torch.nn.TransformerEncoder, padded")
def test_a_patched_model_is_checkpointed(name: str, reentrant: bool) -> None:
    model, _ = made(name)
    x = torch.randn(3, 13, 32)

    def gradient(again: bool) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        out = checkpoint(model, leaf, use_reentrant=reentrant) if again else model(leaf)
        out.square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    with patch(model):
        torch.testing.assert_close(gradient(True), gradient(False))


@installed("transformers LlamaForCausalLM, left-padded")
def test_a_patched_model_generates_the_same_tokens(name: str) -> None:
    from tests.real_models import tokens

    model: Any = made(name)[0]
    inputs = tokens("left")
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **how)
    with patch(model):
        assert torch.equal(model.generate(**inputs, **how), expected)


@installed("transformers Qwen2.5-VL, vision tower, 2 frames")
def test_a_vision_tower_makes_one_call_for_all_of_its_windows(name: str) -> None:
    from triton_attn.integrations.transformers import register

    model: Any = made(name)[0]
    _, call = made(name)
    model.set_attn_implementation("sdpa")
    before = model.config._attn_implementation
    register()
    model.set_attn_implementation("triton_attn")  # by its interface alone: a call for every window
    with counted() as many:
        call(model)
    model.set_attn_implementation("sdpa")
    with patch(model), counted() as few:
        call(model)
    assert len(few) == 2 < len(many)
    assert set(few) == {"attention_varlen"}
    assert model.config._attn_implementation == before


@installed("transformers ViTModel")
def test_another_mechanism_in_an_encoder_of_transformers(name: str) -> None:
    model, call = made(name)
    before = call(model)
    with patch(model, "local_global_attention", window=4) as report, counted() as seen:
        after = call(model)
    assert report.changes_function
    assert set(seen) == {"local_global_attention"}
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(call(model), before)


@installed("transformers LlamaForCausalLM, left-padded")
def test_another_mechanism_in_a_decoder_of_transformers(name: str) -> None:
    from tests.real_models import tokens

    model: Any = made(name)[0]
    inputs = tokens("left")
    real = inputs["attention_mask"].bool()
    with patch(model, "strided_attention", stride=2, include_self=True), torch.no_grad():
        first = model(**inputs, use_cache=False).logits
        changed = {**inputs, "input_ids": torch.where(real, inputs["input_ids"], 7)}
        torch.testing.assert_close(model(**changed, use_cache=False).logits[real], first[real])  # what is padded does not matter
        later = inputs["input_ids"].clone()
        later[:, -1] = 5
        torch.testing.assert_close(model(**{**inputs, "input_ids": later}, use_cache=False).logits[:, :-1], first[:, :-1])
        with pytest.raises(triton_attn.Unsupported, match="generate with use_cache=False"):
            model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_a_copy_of_a_patched_model_is_patched() -> None:
    model, call = made("torch.nn.TransformerEncoder, padded")
    patch(model)
    other = copy.deepcopy(model)
    with counted() as seen:
        call(other)
    assert len(seen) == 2
