"""Hugging Face's Mamba and FalconMamba on these functions: same logits, gradients, caches and generation; there and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("transformers")
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

from triton_attn import Unsupported, use_backend
from triton_attn.integrations import transformers_mamba as integration
from triton_attn.integrations.transformers import patch_mamba

FAMILIES = {"mamba": (MambaConfig, MambaForCausalLM), "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM)}
SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 24, "state_size": 6, "num_hidden_layers": 2, "use_mambapy": False}
EVERY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    assert integration._patched is None
    yield
    if integration._patched is not None:
        integration._patched.undo()


def model(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config, made = FAMILIES[family]
    return made(config(**SIZES, **more)).eval()


def padded() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_and_gradients(made: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = made(**inputs, labels=inputs["input_ids"])
    gradients = torch.autograd.grad(out.loss, list(made.parameters()), allow_unused=True)
    named = zip(dict(made.named_parameters()), gradients, strict=True)
    return out.logits.detach(), {name: gradient for name, gradient in named if gradient is not None}


def assert_as_near(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
    """As near to float64 as the model unpatched in float32, times three, which is what a gradient may be."""

    def far(x: torch.Tensor) -> float:
        return float((x.double() - truth).square().mean().sqrt())

    assert far(ours) <= 3 * far(theirs) + 2.0**-26 * float(truth.abs().max()), (far(ours), far(theirs))


@EVERY
@pytest.mark.parametrize("backend", ["triton", "portable"])
@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients_are_the_model_s(family: str, backend: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = Mock(wraps=integration._scan)
    monkeypatch.setitem(integration._MAMBA, "mamba_selective_scan", scan)
    made, inputs = model(family).train(training), padded()
    truth, truths = logits_and_gradients(copy.deepcopy(made).double(), inputs)
    before, theirs = logits_and_gradients(made, inputs)
    with patch_mamba(), use_backend(backend):
        after, ours = logits_and_gradients(made, inputs)
    assert scan.call_count == SIZES["num_hidden_layers"]  # equal bits would not tell who computed them
    assert_as_near(after, before, truth)
    assert ours.keys() == theirs.keys() == truths.keys()
    for name, gradient in ours.items():
        assert_as_near(gradient, theirs[name], truths[name])


@EVERY
def test_generation_is_the_model_s(family: str) -> None:
    made, inputs = model(family), padded()
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    before = made.generate(**inputs, **options)
    with patch_mamba():
        after = made.generate(**inputs, **options)
    assert torch.equal(before.sequences, after.sequences)
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(before.logits), rtol=1e-4, atol=1e-5)


def test_bfloat16_models_run() -> None:
    made, inputs = model("mamba").bfloat16(), padded()
    before = made(**inputs).logits.float()
    with patch_mamba():
        after = made(**inputs).logits.float()
        made.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.05 * float(before.detach().abs().max()))


def test_other_activations_are_honoured() -> None:
    made, inputs = model("mamba", hidden_act="gelu"), padded()
    before = made(**inputs).logits
    with patch_mamba():
        torch.testing.assert_close(made(**inputs).logits, before, rtol=1e-4, atol=1e-5)


def test_it_says_what_it_replaced_and_goes_back() -> None:
    originals = {name: getattr(modeling_mamba, name) for name in integration._MAMBA}
    patch = patch_mamba()
    assert patch_mamba() is patch
    assert len(patch.replaced) == 2 * len(originals)
    for module in ("mamba.modeling_mamba", "falcon_mamba.modeling_falcon_mamba"):
        assert f"transformers.models.{module}.mamba_selective_scan is now triton_attn.selective_scan" in str(patch)
    assert all(getattr(modeling_mamba, name) is not original for name, original in originals.items())
    patch.undo()
    patch.undo()
    assert all(getattr(modeling_mamba, name) is original for name, original in originals.items())
    with patch_mamba() as again:
        patch.undo()  # of a patch that is over
        assert modeling_mamba.mamba_selective_scan is not originals["mamba_selective_scan"]
        assert again.replaced == patch.replaced


def test_another_transformers_is_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = modeling_mamba.mamba_selective_scan
    monkeypatch.delattr(modeling_mamba, "causal_conv1d_fn")
    with pytest.raises(Unsupported, match=r"modeling_mamba\.causal_conv1d_fn"):
        patch_mamba()
    assert modeling_mamba.mamba_selective_scan is scan


def test_packed_sequences_are_refused() -> None:
    made, numbers = model("mamba"), torch.zeros(1, 9, dtype=torch.int32)
    mixer = made.backbone.layers[0].mixer
    with patch_mamba(), pytest.raises(Unsupported, match="seq_idx"):
        mixer(torch.randn(1, 9, 24), seq_idx=numbers)
