"""Performer attention: its definition, its estimate of softmax, what a running maximum promises, and the original's defects."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_attn
from triton_attn import ArgumentError, attention, orthogonal_projection, performer_attention
from triton_attn.nn import LinearAttentionBlock, LinearSelfAttention, PerformerAttention
from triton_attn.portable._carried import CHUNK

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
B, H, N, D, M = 2, 3, 4 * CHUNK + 21, 8, 20
KERNELS = pytest.mark.parametrize("kernel", ["softmax", "elu", "relu"])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])


def tensors(n: int = N, spread: float = 1.0) -> list[Tensor]:
    torch.manual_seed(n)
    return [(torch.randn(B, H, n, D, **DOUBLE) * spread).requires_grad_() for _ in range(3)]


def projection(features: int = M, **how: Any) -> Tensor:
    return orthogonal_projection(features, D, generator=torch.Generator().manual_seed(5), **{**DOUBLE, **how})


def features(x: Tensor, w: Tensor, kernel: str, epsilon: float = 1e-4) -> Tensor:
    """phi, powers of e and all; no number here is large."""
    y = x @ w.mT
    if kernel == "softmax":
        y, half = y * D**-0.25, 0.5 * D**-0.5 * x.square().sum(-1, keepdim=True)
        positive: Tensor = (y - half).exp() + epsilon * (y.detach().amax(-1, keepdim=True) - half).exp()
        return positive
    out: Tensor = nn.functional.elu(y) + 1 if kernel == "elu" else y.relu()
    return out


def naive(q: Tensor, k: Tensor, v: Tensor, w: Tensor, kernel: str, causal: bool, hidden: Tensor | None = None) -> Tensor:
    scores = features(q, w, kernel) @ features(k, w, kernel).mT
    scores = scores.tril() if causal else scores
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], 0.0)
    out: Tensor = scores @ v / scores.sum(-1, keepdim=True)
    return out


@KERNELS
@CAUSAL
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_it_is_its_definition(kernel: str, causal: bool, masked: bool) -> None:
    q, k, v = tensors()
    hidden = torch.zeros(B, N, dtype=torch.bool)
    hidden[0, 30:41] = True
    hidden[1, 200:] = True
    mask = hidden if masked else None
    out = performer_attention(q, k, v, projection(), kernel=kernel, causal=causal, eps=0.0, key_padding_mask=mask)
    expected = naive(q, k, v, projection(), kernel, causal, mask)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-10)
    grad = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_more_features_come_nearer_to_softmax() -> None:
    q, k, v = tensors(64, 0.3)
    truth = attention(q, k, v)
    errors = []
    for count in (8, 64, 512, 4096):
        out = performer_attention(q, k, v, projection(count), kernel_epsilon=0.0)
        errors.append(((out - truth).norm() / truth.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 8  # it falls with the root of their number


def test_orthogonal_features_err_less_than_independent_ones() -> None:
    q, k, v = tensors(64, 0.7)
    truth, generator = attention(q, k, v), torch.Generator().manual_seed(1)
    errors = torch.zeros(2, **DOUBLE)
    for _ in range(20):
        for i, w in enumerate(
            (orthogonal_projection(D, D, generator=generator, **DOUBLE), torch.randn(D, D, generator=generator, **DOUBLE))
        ):
            errors[i] += (performer_attention(q, k, v, w, kernel_epsilon=0.0) - truth).square().mean()
    assert errors[0] < 0.9 * errors[1]


def test_rows_of_a_projection_are_orthogonal_and_as_long_as_asked() -> None:
    w = orthogonal_projection(2 * D + 3, D, 1, **DOUBLE)
    for block in torch.split(w, D):
        torch.testing.assert_close(block @ block.mT, D * torch.eye(len(block), **DOUBLE), rtol=1e-9, atol=1e-9)
    lengths = orthogonal_projection(4000, D, **DOUBLE).norm(dim=1)
    assert lengths.square().mean().item() == pytest.approx(D, rel=0.05)
    assert lengths.std() > 0.3


@KERNELS
def test_later_keys_change_no_bit(kernel: str) -> None:
    """A maximum over all keys would: it scales the rest, and rounds it."""
    q, k, v = (x.detach() for x in tensors())
    before = performer_attention(q, k, v, projection(), kernel=kernel, causal=True)
    for after in (150, CHUNK, CHUNK + 1):
        other = k.clone(), v.clone()
        other[0][:, :, after:] *= 9.0
        other[1][:, :, after:] += 3.0
        found = performer_attention(q, *other, projection(), kernel=kernel, causal=True)
        torch.testing.assert_close(found[:, :, : after // CHUNK * CHUNK], before[:, :, : after // CHUNK * CHUNK], rtol=0, atol=0)
        torch.testing.assert_close(found[:, :, :after], before[:, :, :after], rtol=1e-12, atol=1e-14)


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_long_vectors_stay_finite(dtype: torch.dtype, causal: bool) -> None:
    q, k, v = (x.detach().to(dtype) * 40 for x in tensors(spread=1.0))
    out = performer_attention(q, k, v, projection(dtype=dtype), causal=causal)
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * 1.01


@CAUSAL
def test_values_of_one_give_one(causal: bool) -> None:
    q, k, v = tensors()
    out = performer_attention(q, k, torch.ones_like(v), projection(), causal=causal, eps=0.0)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-9, atol=0)


@KERNELS
@CAUSAL
def test_masked_tokens_may_hold_nan_and_are_absent(kernel: str, causal: bool) -> None:
    """The original hides them from the denominator alone: they change other outputs by 9."""
    q, k, v = (x.detach() for x in tensors())
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[:, 100:] = True
    wanted = performer_attention(q[:, :, :100], k[:, :, :100], v[:, :, :100], projection(), kernel=kernel, causal=causal)
    k[:, :, 100:], v[:, :, 100:] = math.nan, math.inf
    found = performer_attention(q, k, v, projection(), kernel=kernel, causal=causal, key_padding_mask=mask)
    torch.testing.assert_close(found[:, :, :100], wanted, rtol=1e-9, atol=1e-11)
    nothing = performer_attention(q, k, v, projection(), kernel=kernel, causal=causal, key_padding_mask=torch.ones_like(mask))
    assert nothing.eq(0).all()


@pytest.mark.parametrize(
    ("width", "count", "spread", "low", "high"), [(16, 32, 1.0, 1e-3, 4e-3), (64, 256, 1.0, 1e-2, 4e-2), (64, 256, 3.0, 0.2, 0.7)], ids=str
)
def test_gradients_take_the_largest_feature_for_a_constant(width: int, count: int, spread: float, low: float, high: float) -> None:
    """As the original does: it costs what docs/performer_attention.md says, and nothing where no epsilon is added to it."""
    torch.manual_seed(3)
    q, k = ((torch.randn(1, 2, 64, width, **DOUBLE) * spread).requires_grad_() for _ in range(2))
    v, w = torch.randn(1, 2, 64, width, **DOUBLE), orthogonal_projection(count, width, **DOUBLE)

    def phi(x: Tensor, epsilon: float) -> Tensor:
        y = x @ w.mT * width**-0.25 - 0.5 * width**-0.5 * x.square().sum(-1, keepdim=True)
        found: Tensor = y.exp() + epsilon * y.amax(-1, keepdim=True).exp()
        return found

    for epsilon in (0.0, 1e-4):
        scores = phi(q, epsilon) @ phi(k, epsilon).mT
        expected = scores @ v / scores.sum(-1, keepdim=True)
        out = performer_attention(q, k, v, w, kernel_epsilon=epsilon, eps=0.0)
        torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-10)
        grad = torch.randn_like(out)
        found, wanted = (torch.autograd.grad(x, (q, k), grad) for x in (out, expected))
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, wanted, strict=True)]
        assert max(errors) < 1e-9 if epsilon == 0 else low < min(errors) <= max(errors) < high


@pytest.mark.parametrize("kernel", ["elu", "relu"])
def test_more_features_than_a_kernel_serves(kernel: str) -> None:
    """266 are performer-pytorch's at heads of 64."""
    q, k, v = tensors(9)
    out = performer_attention(q, k, v, projection(266), kernel=kernel, causal=True, eps=0.0)
    torch.testing.assert_close(out, naive(q, k, v, projection(266), kernel, True), rtol=1e-8, atol=1e-10)


@CAUSAL
@KERNELS
@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(kernel: str, causal: bool, n: int) -> None:
    q, k, v = tensors(n)
    out = performer_attention(q, k, v, projection(), kernel=kernel, causal=causal, eps=0.0)
    torch.testing.assert_close(out, v, rtol=1e-9, atol=1e-11)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a projection": ({"projection": torch.ones(4, 3)}, "projection has shape (4, 3); allowed: (M, 8)"),
    "no projection": ({"projection": [1.0]}, "projection is a list; allowed: torch.Tensor, (M, 8)"),
    "complex numbers": ({"projection": torch.ones(4, 8, dtype=torch.complex64)}, "projection has dtype torch.complex64; allowed: any of"),
    "booleans": ({"projection": torch.ones(4, 8, dtype=torch.bool)}, "projection has dtype torch.bool"),
    "whole numbers": ({"projection": torch.ones(4, 8, dtype=torch.int64)}, "projection has dtype torch.int64"),
    "a projection elsewhere": ({"projection": torch.ones(4, 8, device="meta")}, "projection is on meta, query on cpu"),
    "a state elsewhere": (
        {"kernel": "elu", "initial_state": (torch.zeros(2, 3, 20, 8, **DOUBLE), torch.zeros(2, 3, 20, **DOUBLE, device="meta"))},
        "initial_state is on meta, query on cpu",
    ),
    "key's dtype": ({"key": torch.zeros(B, H, 5, D)}, "key has dtype torch.float32, query has torch.float64"),
    "no tensor for a mask": ({"key_padding_mask": [True]}, "key_padding_mask is a list"),
    "a word for a scale": ({"kernel": "elu", "scale": "x"}, "scale is 'x', a str; allowed: a finite number"),
    "a kernel": ({"kernel": "cosine"}, "kernel is 'cosine'; allowed: 'softmax', 'relu', 'elu'"),
    "an epsilon": ({"kernel_epsilon": -1.0}, "kernel_epsilon is -1.0; allowed: 0 and more"),
    "a scale": ({"scale": -1.0}, "scale is -1.0; allowed with kernel='softmax': above 0"),
    "a state of another kernel": ({"initial_state": (torch.zeros(2, 3, 20, 8, **DOUBLE),) * 2}, "is a tuple; allowed: 3 tensors"),
    "a state of other features": ({"initial_state": (torch.zeros(2, 3, 9, 8, **DOUBLE),) * 3}, "allowed: (2, 3, 20, 8)"),
    "a state in half precision": ({"kernel": "elu", "initial_state": (torch.zeros(2, 3, 20, 8),) * 2}, "torch.float64"),
}


@pytest.mark.parametrize(("changed", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(changed: dict[str, Any], said: str) -> None:
    q, k, v = tensors(5)
    with pytest.raises(ArgumentError, match=r"^performer_attention: ") as raised:
        performer_attention(**{"query": q, "key": k, "value": v, "projection": projection(), **changed})
    assert said in str(raised.value)


# modules

DIM = 24
MODULES: dict[str, Callable[..., Any]] = {
    "elu": lambda **how: PerformerAttention(DIM, H, M, **how),
    "softmax": lambda **how: PerformerAttention(DIM, H, M, "softmax", **how),
    "causal": lambda **how: PerformerAttention(DIM, H, M, "softmax", causal=True, **how),
    "linear": lambda **how: LinearSelfAttention(DIM, H, **how),
    **{
        f"block, {kind}": lambda kind=kind, **how: LinearAttentionBlock(DIM, H, kind, 0.0, **how)
        for kind in ("performer", "linear", "mamba")
    },
}
EACH = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


@EACH
def test_every_parameter_learns(make: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    module = make(**DOUBLE)
    out: Any = module(torch.randn(B, 19, DIM, **DOUBLE))
    out.square().sum().backward()
    assert {name for name, x in module.named_parameters() if x.grad is None or not x.grad.abs().sum() > 0} == set()


@EACH
def test_a_module_is_compiled_in_one_graph(make: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(B, 19, DIM)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)  # type: ignore[no-untyped-call]


@EACH
def test_padded_tokens_change_no_other(make: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    module, x = make(**DOUBLE).eval(), torch.randn(B, 19, DIM, **DOUBLE)
    mask = torch.zeros(B, 19, dtype=torch.bool)
    mask[:, 12:] = True
    other = x.clone()
    other[:, 12:] += 2.0
    torch.testing.assert_close(module(other, mask)[:, :12], module(x, mask)[:, :12], rtol=1e-12, atol=1e-14)


def test_a_state_of_the_original_loads_strictly() -> None:
    """i.i.d. features of its own come with it."""
    module = PerformerAttention(DIM, H, M)
    linear = {
        f"{name}_proj.{part}": torch.randn(DIM, DIM)[: None if part == "weight" else 1].squeeze(0)
        for name in ("q", "k", "v", "out")
        for part in ("weight", "bias")
    }
    state = {**linear, "random_matrix": torch.randn(DIM // H, M)}
    module.load_state_dict(state)
    x = torch.randn(B, 9, DIM)
    q, k, v = (module.heads(project(x)) for project in (module.q_proj, module.k_proj, module.v_proj))
    expected = module.output(naive(q, k, v, state["random_matrix"].mT, "elu", False))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_features_are_drawn_anew_by_number_not_by_chance() -> None:
    modules: list[Any] = [PerformerAttention(DIM, H, M, redraw_interval=2, seed=7).train() for _ in range(2)]
    first = modules[0].random_matrix.clone()
    drawn: list[Tensor] = []
    for module in modules:
        torch.manual_seed(len(drawn))
        for _ in range(3):
            module(torch.randn(1, 5, DIM))
        drawn.append(module.random_matrix.clone())
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], first)
    before = modules[0].eval().random_matrix.clone()
    for _ in range(5):
        modules[0](torch.randn(1, 5, DIM))
    assert torch.equal(modules[0].random_matrix, before)


def test_the_configuration_of_the_example_is_built() -> None:
    pytest.importorskip("yaml")
    built: Any = triton_attn.nn.build(Path(__file__).parents[1] / "examples" / "configs" / "linear_attention.yaml")
    assert built["performer"].attention.kernel_type == "softmax"
    assert built["mamba"](torch.randn(1, 5, 768)).shape == (1, 5, 768)


def test_an_option_of_another_type_is_named() -> None:
    with pytest.raises(ArgumentError, match="num_random_features is no option of attention_type='linear'; allowed: causal"):
        LinearAttentionBlock(DIM, H, "linear", num_random_features=3)
    with pytest.raises(ArgumentError, match="mask is given beside key_padding_mask"):
        PerformerAttention(DIM, H)(torch.ones(1, 3, DIM), torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool))
