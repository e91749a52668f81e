"""Linear-ViT's model: the original's states, every attention, shapes, gradients, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import ArgumentError
from triton_attn.models import VisionTransformer

SMALL: dict[str, Any] = {"img_size": 16, "num_classes": 7, "dim": 24, "depth": 2, "heads": 2, "mlp_dim": 40, "dim_head": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "ripple": {"ripple_stages": 2},
    "hydra": {"hydra_branches": 2},
    "baseline": {},
    "linear_attention": {},
    "strided_attention": {"attention_options": {"stride": 2, "include_self": True}},
    "local_global_attention": {"attention_options": {"window": 4, "global_tokens": 1}},
    "sparse_attention": {"attention_options": {"keep_ratio": 0.5}},
    "dilated_attention": {"attention_options": {"segment_lengths": (8, 17), "dilation_rates": (1, 2)}},
}
EACH = pytest.mark.parametrize("kind", OPTIONS)


def model(kind: str, **changed: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, "attention_type": kind, **OPTIONS[kind], **changed})


def images(size: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@EACH
def test_every_parameter_learns(kind: str) -> None:
    network = model(kind)
    logits = network(images())
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([1, 5])).backward()  # type: ignore[no-untyped-call]
    still = {name for name, x in network.named_parameters() if x.grad is None or not x.grad.abs().sum() > 0}
    assert still == set()


@EACH
def test_it_compiles_in_one_graph(kind: str) -> None:
    torch.compiler.reset()  # each kind is a compilation of its own, and only so many of one function are allowed
    network = model(kind).eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), network(images()), rtol=1e-4, atol=1e-5)


@EACH
def test_an_item_does_not_depend_on_its_batch(kind: str) -> None:
    network = model(kind).eval()
    torch.testing.assert_close(network(images(batch=3))[1:2], network(images(batch=3)[1:2]), rtol=1e-4, atol=1e-5)


@EACH
def test_a_state_makes_a_round_trip(kind: str) -> None:
    network, other = model(kind).eval(), model(kind, dropout=0.0).eval()
    with torch.no_grad():
        for x in other.parameters():
            x.zero_()
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other(images()), network(images()), rtol=0, atol=0)


def test_patches_are_the_original_s() -> None:
    """Row by row, each patch's pixels row by row, channels last."""
    network = model("baseline")
    (found,) = network.to_patch_embedding[0](images(batch=1))
    image = images(batch=1)[0]
    expected = [image[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].permute(1, 2, 0).reshape(-1) for i in range(4) for j in range(4)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=0)


def original(kind: str) -> set[str]:
    """The names of the original's state."""
    names = {"pos_embedding", "cls_token", *(f"mlp_head.{i}.{part}" for i in (0, 1) for part in ("weight", "bias"))}
    names |= {f"to_patch_embedding.{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")}
    for i in range(SMALL["depth"]):
        block = f"transformer.{i}"
        names |= {f"{block}.{norm}.{part}" for norm in ("norm1", "norm2", "ff.net.0", "ff.net.3") for part in ("weight", "bias")}
        names |= {f"{block}.attn.to_out.0.weight", f"{block}.attn.to_out.0.bias"}
        if kind == "baseline":
            names |= {f"{block}.attn.to_qkv.weight"}
        elif kind == "hydra":
            names |= {f"{block}.attn.{name}.weight" for name in ("to_k", "to_v", "branch_queries.0", "branch_queries.1")}
            layers = [*(f"branch_transforms.{r}.{j}" for r in (0, 1) for j in (0, 2)), "branch_fusion.0", "branch_fusion.1"]
            names |= {f"{block}.attn.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
        else:
            names |= {f"{block}.attn.{name}.weight" for name in ("to_q", "to_k", "to_v")}
            layers = [f"{side}_layers.{s}.{j}" for side in ("pool", "expand") for s in (0, 1) for j in (0, 1)]
            names |= {f"{block}.attn.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    return names


@pytest.mark.parametrize("kind", ["ripple", "hydra", "baseline"])
def test_names_are_the_original_s(kind: str) -> None:
    assert set(model(kind).state_dict()) == original(kind)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a type": ({"attention_type": "whirl"}, "attention_type is 'whirl'; allowed: 'ripple', 'hydra', 'baseline'"),
    "patches": ({"patch_size": 5}, "patch_size is 5; allowed: a divisor of img_size, 16"),
    "depth": ({"depth": 0}, "depth is 0"),
}


@pytest.mark.parametrize(("changed", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        VisionTransformer(**{**SMALL, **changed})
    assert said in str(raised.value)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"img has shape \(2, 3, 20, 20\); allowed: \(B, 3, 16, 16\)"):
        model("ripple")(images(20))
