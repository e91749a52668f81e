"""MambaLayer: Hugging Face's mixer with the same weights, steps and caches, padding, states of both kinds, and the source's defects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import ArgumentError, use_backend
from triton_attn.nn import MambaLayer, build

DIM, SIZE, B, N = 24, 5, 2, 13
VARIANTS = pytest.mark.parametrize("variant", ["mamba", "lti"])
BACKENDS = pytest.mark.parametrize("backend", ["triton", "portable", "reference"])


def layer(variant: str = "mamba", **more: Any) -> MambaLayer:
    return MambaLayer(DIM, SIZE, variant=variant, **more).eval()


def tokens(n: int = N) -> Tensor:
    return torch.randn(B, n, DIM)


def mamba_state() -> dict[str, Tensor]:
    """The names and shapes that mamba_ssm.Mamba(d_model=24, d_state=5) saves."""
    inner, rank = 2 * DIM, 2
    shapes: dict[str, tuple[int, ...]] = {
        "A_log": (inner, SIZE),
        "D": (inner,),
        "in_proj.weight": (2 * inner, DIM),
        "conv1d.weight": (inner, 1, 4),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * SIZE, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (DIM, inner),
    }
    return {name: torch.randn(shape) / 2 for name, shape in shapes.items()}


def hierarchical_state() -> dict[str, Tensor]:
    """The names and shapes that HierarchicalVLM's MambaLayer(24, 5) saves."""
    inner, rates = 2 * DIM, torch.arange(1.0, SIZE + 1).view(1, 1, SIZE)
    return {
        "B": torch.randn(1, 1, SIZE),
        "C": torch.randn(1, 1, SIZE),
        "dt": torch.randn(1, inner, SIZE) / 5,
        "A": -rates,
        "A_log": rates.log(),
        "in_proj.weight": torch.randn(2 * inner, DIM) / 5,
        "out_proj.weight": torch.randn(DIM, inner) / 5,
        "out_proj.bias": torch.randn(DIM),
    }


def by_the_loop(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The source's forward with the sign of the decay mended, in float64."""
    wide = {name: value.double() for name, value in state.items()}
    inner, gates = F.linear(x.double(), wide["in_proj.weight"]).chunk(2, -1)
    h, rows = torch.zeros(len(x), inner.shape[2], SIZE, dtype=torch.float64), []
    for t in range(x.shape[1]):
        h = torch.exp(wide["dt"].abs() * wide["A"]) * h + wide["dt"] * inner[:, t, :, None] * wide["B"]
        rows.append((h * wide["C"]).sum(-1) * gates[:, t].sigmoid())
    return F.linear(F.gelu(torch.stack(rows, 1)), wide["out_proj.weight"], wide["out_proj.bias"])


# states and values


def test_a_mamba_ssm_state_loads_strictly() -> None:
    made, state = layer(), mamba_state()
    made.load_state_dict(state, strict=True)
    assert {name: value.shape for name, value in made.state_dict().items()} == {name: value.shape for name, value in state.items()}


@BACKENDS
def test_a_hierarchical_state_loads_and_decays(backend: str) -> None:
    made, state, x = layer("lti"), hierarchical_state(), tokens()
    made.load_state_dict(state, strict=True)
    with use_backend(backend):
        found = made(x)
    torch.testing.assert_close(found.double(), by_the_loop(state, x), rtol=1e-4, atol=1e-5)


@BACKENDS
def test_it_is_hugging_face_s_mixer(backend: str) -> None:
    mixers = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = mixers.MambaConfig(hidden_size=DIM, state_size=SIZE, num_hidden_layers=1, vocab_size=8, use_mambapy=False)
    mixer, made = mixers.MambaMixer(config, 0).eval(), layer()
    made.load_state_dict(mamba_state())
    mixer.load_state_dict(made.state_dict())
    mixer.double()
    x = tokens().requires_grad_()
    wide = x.detach().double().requires_grad_()
    with use_backend(backend):
        found = made(x)
        gradients = torch.autograd.grad(found.square().sum(), [x, *made.parameters()])
    expected = mixer(wide)
    named = dict(mixer.named_parameters())
    truth = torch.autograd.grad(expected.square().sum(), [wide, *(named[name] for name, _ in made.named_parameters())])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients, truth, strict=True):
        # Hugging Face computes A in float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_the_start_is_upstream_s() -> None:
    made = MambaLayer(64, 16, dt_init="constant", dt_init_floor=5e-3)
    torch.testing.assert_close(made.A_log.exp(), torch.arange(1.0, 17).expand(128, -1))
    assert torch.equal(made.D, torch.ones(128))
    assert torch.equal(made.dt_proj.weight, torch.full((128, 4), 0.5))
    steps = F.softplus(made.dt_proj.bias)
    assert steps.min() >= 5e-3 * (1 - 1e-4)
    assert steps.max() <= 0.1 * (1 + 1e-4)
    spread = MambaLayer(64).dt_proj.weight
    assert 0.4 < spread.abs().max() <= 0.5
    assert MambaLayer(dim=768, device="meta").dt_rank == 48


# the source's defects


@VARIANTS
@pytest.mark.parametrize("dt_init", ["random", "constant"])
def test_it_is_stable_for_any_length(variant: str, dt_init: str) -> None:
    """The source's decay grew, and was NaN at 64 tokens."""
    made = MambaLayer(8, 16, variant=variant, dt_init=dt_init).eval()
    with torch.no_grad():
        out = made(torch.randn(1, 8192, 8))
    assert out.isfinite().all()
    assert out[:, 4096:].abs().max() < 2 * out[:, :4096].abs().max()


def test_step_size_input_and_output_vectors_depend_on_the_input() -> None:
    """The source's were constants: its layer was linear up to the gate."""
    made = layer()
    made.load_state_dict(mamba_state())
    delta, first, second = made._selected(torch.randn(B, N, 2 * DIM))
    for found in (delta, first, second):
        assert (found[:, 1:] - found[:, :-1]).abs().amax((0, 2)).min() > 1e-3


@VARIANTS
def test_no_token_sees_a_later_one(variant: str) -> None:
    made, x = layer(variant), tokens().requires_grad_()
    (gradient,) = torch.autograd.grad(made(x)[:, 5].sum(), x)
    assert not gradient[:, 6:].any()
    assert gradient[:, 2].any()


# going on


@pytest.mark.parametrize(
    ("variant", "backend"),
    [
        ("mamba", "triton"),
        ("mamba", "portable"),
        ("mamba", "reference"),
        ("lti", "portable"),
        ("lti", "reference"),
        pytest.param("lti", "triton", marks=pytest.mark.slow),  # a program for each channel
    ],
)
def test_steps_and_parts_are_the_whole(variant: str, backend: str) -> None:
    made, x = layer(variant), tokens(7)
    with use_backend(backend), torch.no_grad():
        whole = made(x)
        cache = made.allocate_inference_cache(B)
        parts = [made(x[:, :4], cache=cache), *(made.step(x[:, t : t + 1], *cache)[0] for t in range(4, 7))]
        again = made.allocate_inference_cache(B, max_seqlen=99)
        made(x, cache=again)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cache, again, rtol=1e-4, atol=1e-6)


def test_a_cache_has_mamba_ssm_s_shapes() -> None:
    conv_state, state = layer().bfloat16().allocate_inference_cache(3, 100)
    assert (conv_state.shape, conv_state.dtype) == ((3, 2 * DIM, 4), torch.bfloat16)
    assert (state.shape, state.dtype) == ((3, 2 * DIM, SIZE), torch.float32)
    assert layer().allocate_inference_cache(3, dtype=torch.float64)[1].dtype == torch.float64


# padding


@VARIANTS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_absent(variant: str, side: str) -> None:
    made, x, pads = layer(variant), tokens(), 4
    padding = torch.full((B, pads, DIM), torch.nan)
    padded = torch.cat((padding, x) if side == "left" else (x, padding), 1).requires_grad_()
    mask = padded[..., 0].isnan()
    out = made(padded, mask)
    torch.testing.assert_close(out[~mask].view(B, N, DIM), made(x), rtol=1e-4, atol=1e-6)
    if variant == "mamba":
        assert not out[mask].any()
    gradients = torch.autograd.grad(out.square().sum(), [padded, *made.parameters()], materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][mask].any()


@VARIANTS
def test_a_cache_after_padding_on_the_left_goes_on(variant: str) -> None:
    made, x = layer(variant), tokens()
    padded, mask = F.pad(x, (0, 0, 3, 0), value=5.0), torch.arange(N + 3).expand(B, -1) < 3
    with torch.no_grad():
        one, other = made.allocate_inference_cache(B), made.allocate_inference_cache(B)
        made(padded, mask, cache=one)
        made(x, cache=other)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# as a module


@VARIANTS
def test_dropout_is_for_training(variant: str) -> None:
    made, x = layer(variant, dropout=0.5), tokens()
    assert torch.equal(made(x), made(x))
    made.train()
    assert not torch.equal(made(x), made(x))


@VARIANTS
def test_bfloat16_and_autocast(variant: str) -> None:
    made, x = layer(variant), tokens()
    narrow = copy.deepcopy(made).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        cast = made(x)
    expected = made(x).detach()
    for found in (cast, narrow(x.bfloat16())):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))


@VARIANTS
def test_it_compiles_whole(variant: str) -> None:
    made, x = layer(variant), tokens()
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="eager")(x), made(x), rtol=1e-4, atol=1e-6)


def test_it_is_built_from_data() -> None:
    assert isinstance(build({"type": "MambaLayer", "dim": DIM, "variant": "lti"}), MambaLayer)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no width": (lambda: MambaLayer(0), "dim"),
    "too many states": (lambda: MambaLayer(DIM, 257), "state_size"),
    "nothing inside": (lambda: MambaLayer(DIM, expand_factor=0.01), "expand_factor"),
    "another start": (lambda: MambaLayer(DIM, dt_init="zeros"), "dt_init"),
    "a floor of nothing": (lambda: MambaLayer(DIM, dt_init_floor=0.0), "dt_init_floor"),
    "a wide convolution": (lambda: MambaLayer(DIM, d_conv=5), "d_conv"),
    "a rank by a word": (lambda: MambaLayer(DIM, dt_rank="full"), "dt_rank"),
    "another variant": (lambda: MambaLayer(DIM, variant="s4"), "variant"),
    "tokens of another width": (lambda: layer()(torch.zeros(B, N, 5)), "x"),
    "a numeric mask": (lambda: layer()(tokens(), torch.ones(B, N)), "mask"),
    "a mask of another length": (lambda: layer()(tokens(), torch.ones(B, 3, dtype=torch.bool)), "mask"),
    "two tokens a step": (lambda: layer().step(tokens(2), *layer().allocate_inference_cache(B)), "x"),
    "a cache of another batch": (lambda: layer()(tokens(), cache=layer().allocate_inference_cache(1)), "conv_state"),
    "half a cache": (lambda: layer()(tokens(), cache=(torch.zeros(1),)), "cache"),
}


@pytest.mark.parametrize(("call", "argument"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_refused_by_name(call: Callable[[], Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.argument == argument
    assert "allowed" in str(caught.value)
