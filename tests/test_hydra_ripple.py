"""Hydra and ripple attention: definitions written out naively, the originals' states, and the originals' defects."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn import ArgumentError, hydra_attention, linear_attention, ripple_attention
from triton_attn.nn import HydraAttention, RippleAttention

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def crelu(x: Tensor) -> Tensor:
    return torch.cat((x.relu(), (-x).relu()), -1)


def quadratic(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, phi: Callable[[Tensor], Tensor], eps: float = 1e-6) -> Tensor:
    """Every score, each key weighted by (B, M)."""
    scores: Tensor = phi(query) @ phi(key).mT * weight[:, None, None]
    out: Tensor = scores @ value / (scores.sum(-1, keepdim=True) + eps)
    return out


def unit(x: Tensor) -> Tensor:
    out: Tensor = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return out


def split(module: Any, x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], module.heads, module.dim_head).transpose(1, 2)


# hydra


def branches(b: int = 2, r: int = 3, h: int = 2, n: int = 9, m: int = 9, d: int = 4, e: int = 4, **factory: Any) -> list[Tensor]:
    shapes = ((b, r, h, n, d), (b, h, m, d), (b, h, m, e))
    return [torch.randn(shape, **(factory or DOUBLE), requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["crelu", "elu"])
def test_each_branch_is_a_linear_attention_of_its_own(feature_map: str, causal: bool) -> None:
    query, key, value = branches()
    out = hydra_attention(query, key, value, feature_map=feature_map, causal=causal, scale=0.3)
    each = [linear_attention(q, key, value, feature_map=feature_map, causal=causal, scale=0.3) for q in query.unbind(1)]
    expected = torch.stack(each, 1)
    torch.testing.assert_close(out, expected, **CLOSE)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (query, key, value), grad), torch.autograd.grad(expected, (query, key, value), grad), **CLOSE
    )


def test_permuted_branches_give_permuted_outputs() -> None:
    query, key, value = branches()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(hydra_attention(query[:, order], key, value), hydra_attention(query, key, value)[:, order], **CLOSE)


def test_masked_keys_are_absent_from_both_variants() -> None:
    query, key, value = (x.detach() for x in branches(n=5, m=9, e=4))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 6:] = True
    for variant in ("branches", "meta"):
        short = hydra_attention(query, key[:, :, :6], value[:, :, :6], variant=variant)
        key[:, :, 6:] = math.nan
        torch.testing.assert_close(hydra_attention(query, key, value, variant=variant, key_padding_mask=mask), short, **CLOSE)
        key[:, :, 6:] = 0.0


def test_meta_is_its_paper_s_formula() -> None:
    query, key, value = branches()
    expected = unit(query) * (unit(key) * value).sum(2, keepdim=True)[:, None]
    torch.testing.assert_close(hydra_attention(query, key, value, variant="meta"), expected, **CLOSE)
    for i in range(9):
        seen = unit(query[..., i, :]) * (unit(key) * value)[:, :, : i + 1].sum(2)[:, None]
        torch.testing.assert_close(hydra_attention(query, key, value, variant="meta", causal=True)[..., i, :], seen, **CLOSE)


def test_a_vector_of_zeros_is_no_nan() -> None:
    query, key, value = (torch.zeros_like(x) for x in branches())
    for variant in ("branches", "meta"):
        assert hydra_attention(query, key, value, variant=variant).eq(0).all()


HYDRA: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], str]] = {
    "four axes": (lambda q, k, v: hydra_attention(q[:, 0], k, v), "query_branches has shape"),
    "other heads": (lambda q, k, v: hydra_attention(q, k[:, :1], v), "key has shape"),
    "a variant": (lambda q, k, v: hydra_attention(q, k, v, variant="lernaean"), "variant is 'lernaean'; allowed: 'branches', 'meta'"),
    "meta widths": (lambda q, k, v: hydra_attention(q, k, v[..., :2], variant="meta"), "value has shape"),
    "meta eps": (lambda q, k, v: hydra_attention(q, k, v, variant="meta", eps=-1.0), "eps is -1.0; allowed: 0 and more"),
    "meta causal lengths": (lambda q, k, v: hydra_attention(q[..., :3, :], k, v, variant="meta", causal=True), "causal is True"),
}


@pytest.mark.parametrize(("call", "said"), HYDRA.values(), ids=HYDRA.keys())
def test_a_wrong_argument_of_hydra_is_named(call: Callable[[Tensor, Tensor, Tensor], Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=r"^(meta_)?hydra_attention: ") as raised:
        call(*branches())
    assert said in str(raised.value)


class NaiveHydra(nn.Module):
    """The original's arithmetic for the parameters of a module."""

    def __init__(self, module: HydraAttention) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self.module
        key, value = crelu(split(module, module.to_k(x))), split(module, module.to_v(x))
        outs = []
        for project, transform in zip(module.branch_queries, module.branch_transforms, strict=True):
            query = crelu(transform(split(module, project(x)))) / math.sqrt(2 * module.dim_head)
            outs.append(query @ (key.mT @ value) / ((query @ key.sum(2)[..., None]) + 1e-6))
        joined = torch.cat(outs, 1).transpose(1, 2).flatten(2)
        out: Tensor = module.to_out(module.branch_fusion(joined))
        return out


def test_the_hydra_module_is_the_original_s_arithmetic() -> None:
    torch.manual_seed(0)
    module, x = HydraAttention(12, heads=2, dim_head=5, num_branches=3, **DOUBLE), torch.randn(2, 7, 12, **DOUBLE)
    torch.testing.assert_close(module(x), NaiveHydra(module)(x), **CLOSE)
    gradients = torch.autograd.grad(module(x).square().sum(), tuple(module.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


# ripple


def tokens(b: int = 2, h: int = 2, n: int = 17, d: int = 4, e: int = 4) -> list[Tensor]:
    return [torch.randn(b, h, n, width, **DOUBLE, requires_grad=True) for width in (d, d, e)]


def layers(number: int, width: int = 4) -> list[Any]:
    torch.manual_seed(number)
    return [tuple(torch.randn(shape, **DOUBLE) for shape in ((width, width), (width,), (width,), (width,))) for _ in range(number)]


def layer(x: Tensor, parts: Any) -> Tensor:
    weight, bias, *norm = parts
    return F.gelu(F.layer_norm(x @ weight.T + bias, bias.shape, *norm))


def mean(cells: dict[Any, Tensor], counts: dict[Any, Tensor], parts: list[Any]) -> Tensor:
    """Zero where nothing is counted; what is not counted may be anything."""
    total = torch.stack([counts[part] for part in parts]).sum()
    zero = torch.zeros_like(cells[parts[0]])
    return sum((counts[part] * cells[part] for part in parts if counts[part] > 0), zero) / total.clamp(min=1)


def naive_ripple(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool: Any,
    expand: Any,
    stages: int,
    grid: tuple[int, int] | None,
    prefix: int,
    hidden: Tensor,
) -> Tensor:
    """Cell by cell, each a list of tokens' places; counts are the tokens that are not hidden."""
    b, h, n, _ = query.shape
    rows, columns = grid or (1, n - prefix)
    outs = []
    for item in range(b):
        shown = (~hidden[item]).double()
        k, v, c = key[item], value[item], shown
        cells_k = {(i, j): k[:, prefix + i * columns + j] for i in range(rows) for j in range(columns)}
        cells_v = {(i, j): v[:, prefix + i * columns + j] for i in range(rows) for j in range(columns)}
        cells_c = {(i, j): c[prefix + i * columns + j] for i in range(rows) for j in range(columns)}
        done = 0
        for stage in range(stages):
            if len(cells_k) == 1:
                break
            done += 1
            merged: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for i, j in cells_k:
                merged.setdefault((i // 2, j // 2), []).append((i, j))
            new_k, new_v, new_c = {}, {}, {}
            for place, parts in merged.items():
                total = torch.stack([cells_c[part] for part in parts]).sum()
                new_k[place] = mean(cells_k, cells_c, parts)
                new_k[place] = new_k[place] + layer(new_k[place], pool[stage])
                new_v[place], new_c[place] = mean(cells_v, cells_c, parts), total
            cells_k, cells_v, cells_c = new_k, new_v, new_c
        every_k = torch.stack([*k[:, :prefix].unbind(1), *cells_k.values()], 1)
        every_v = torch.stack([*v[:, :prefix].unbind(1), *cells_v.values()], 1)
        every_c = torch.stack([*c[:prefix], *cells_c.values()])
        alive = every_c > 0
        out = quadratic(query[item][None], every_k[None, :, alive], every_v[None, :, alive], every_c[None, alive], crelu)[0]
        for stage in reversed(range(done)):
            out = out + layer(out, expand[stage])
        outs.append(out)
    return torch.stack(outs)


SHAPES: dict[str, dict[str, Any]] = {
    "a sequence": {"n": 17, "grid": None, "prefix": 1, "stages": 3},
    "a grid": {"n": 17, "grid": (4, 4), "prefix": 1, "stages": 2},
    "an odd grid": {"n": 17, "grid": (3, 5), "prefix": 2, "stages": 3},
    "one row": {"n": 8, "grid": (1, 7), "prefix": 1, "stages": 2},
    "one column": {"n": 7, "grid": (7, 1), "prefix": 0, "stages": 3},
    "more stages than cells": {"n": 5, "grid": (2, 2), "prefix": 1, "stages": 3},
    "no stage": {"n": 9, "grid": (2, 4), "prefix": 1, "stages": 0},
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_ripple_is_its_definition(shape: dict[str, Any], masked: bool) -> None:
    query, key, value = tokens(n=shape["n"])
    pool, expand, hidden = layers(3), layers(3), torch.zeros(2, shape["n"], dtype=torch.bool)
    if masked:
        hidden = torch.rand(2, shape["n"], generator=torch.Generator().manual_seed(3)) > 0.6
        hidden[:, -1] = False
    out = ripple_attention(
        query,
        key,
        value,
        pool,
        expand,
        num_stages=shape["stages"],
        grid_size=shape["grid"],
        num_prefix_tokens=shape["prefix"],
        key_padding_mask=hidden if masked else None,
    )
    expected = naive_ripple(query, key, value, pool, expand, shape["stages"], shape["grid"], shape["prefix"], hidden)
    torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-9)
    grad = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, (query, key, value), grad) for x in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("feature_map", ["crelu", "relu", "elu"])
def test_no_stages_are_linear_attention(feature_map: str) -> None:
    query, key, value = tokens()
    out = ripple_attention(query, key, value, [], [], num_stages=0, feature_map=feature_map)
    torch.testing.assert_close(out, linear_attention(query, key, value, feature_map=feature_map), **CLOSE)


def test_masked_tokens_may_hold_nan() -> None:
    query, key, value = (x.detach() for x in tokens())
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[:, 5:9] = True
    given: dict[str, Any] = {"num_stages": 2, "grid_size": (4, 4), "key_padding_mask": mask}
    before = ripple_attention(query, key, value, layers(2), layers(2), **given)
    key[:, :, 5:9], value[:, :, 5:9] = math.nan, math.inf
    torch.testing.assert_close(ripple_attention(query, key, value, layers(2), layers(2), **given), before, rtol=0, atol=0)


def test_the_prefix_token_is_pooled_with_no_patch() -> None:
    """The original averages the class token with the first patch."""
    query, key, value = tokens(n=17)
    nothing: list[Any] = [tuple(torch.zeros(shape, **DOUBLE) for shape in ((4, 4), (4,), (4,), (4,)))]  # k + GELU(0)
    # with a value that only the class token has, what reaches a query is that token's weight alone
    marked = torch.zeros_like(value)
    marked[:, :, 0] = 1.0
    weight = ripple_attention(query, key, marked, nothing, nothing, num_stages=1, grid_size=(4, 4))
    cells = torch.unflatten(key[:, :, 1:], 2, (2, 2, 2, 2)).mean((3, 5)).flatten(2, 3)
    scores = crelu(query) @ crelu(torch.cat((key[:, :, :1], 4 * cells), 2)).mT  # four tokens a cell
    torch.testing.assert_close(weight, (scores[..., :1] / (scores.sum(-1, keepdim=True) + 1e-6)).expand_as(weight), **CLOSE)


def test_half_precision_stays_finite_at_large_counts() -> None:
    query, key, value = (torch.ones(1, 1, 4097, 8, dtype=torch.float16) * 8 for _ in range(3))
    eye: list[Any] = [tuple(x.half() for x in (torch.zeros(8, 8), torch.zeros(8), torch.zeros(8), torch.zeros(8)))] * 6
    out = ripple_attention(query, key, value, eye, eye, num_stages=6, grid_size=(64, 64))
    torch.testing.assert_close(out, value, rtol=2e-3, atol=0)


RIPPLE: dict[str, tuple[dict[str, Any], str]] = {
    "a grid": ({"grid_size": (3, 5)}, "grid_size is (3, 5); allowed: two sizes whose product is 16"),
    "stages": ({"num_stages": 4}, "num_stages is 4; allowed: a whole number, 0 to 3"),
    "prefix": ({"num_prefix_tokens": 18}, "num_prefix_tokens is 18"),
    "a negative grid": ({"grid_size": (-2, -8), "num_stages": 0}, "grid_size is -2; allowed: a whole number, 0 and more"),
    "a number for a grid": ({"grid_size": 4}, "grid_size is 4; allowed: two sizes whose product is 16"),
    "a word for a grid": ({"grid_size": "ab"}, "grid_size is 'ab'"),
    "no layers": ({"pool": None}, "pool is a NoneType; allowed: a list of layers"),
    "a layer without a bias": ({"expand": [(torch.zeros(4, 4), None, None, None)] * 3}, "expand[0] is Tensor, NoneType"),
    "eps": ({"eps": -1.0}, "eps is -1.0; allowed: 0 and more"),
    "key's dtype": ({"key": torch.zeros(2, 2, 17, 4)}, "key has dtype torch.float32, query has torch.float64"),
    "no tensor for a mask": ({"key_padding_mask": [True]}, "key_padding_mask is a list"),
    "feature map": ({"feature_map": "identity"}, "feature_map is 'identity'"),
    "layers": ({"pool": [(torch.zeros(4, 4),) * 4] * 3}, "pool[0] has shapes"),
    "keys": ({"key": torch.zeros(2, 2, 16, 4, **DOUBLE), "value": torch.zeros(2, 2, 16, 4, **DOUBLE)}, "key has 2 heads and 16 positions"),
}


@pytest.mark.parametrize(("changed", "said"), RIPPLE.values(), ids=RIPPLE.keys())
def test_a_wrong_argument_of_ripple_is_named(changed: dict[str, Any], said: str) -> None:
    query, key, value = tokens()
    given = {"query": query, "key": key, "value": value, "pool": layers(3), "expand": layers(3), **changed}
    with pytest.raises(ArgumentError, match=r"^ripple_attention: ") as raised:
        ripple_attention(**given)
    assert said in str(raised.value)


def original_ripple(module: Any, x: Tensor) -> Tensor:
    """The original's arithmetic, written out: zeros fill up, features are pooled with the class token."""
    query, key, value = F.elu(split(module, module.to_q(x))) + 1, F.elu(split(module, module.to_k(x))) + 1, split(module, module.to_v(x))
    for stage in module.pool_layers:
        if key.shape[2] > 1:
            odd = key.shape[2] % 2
            key, value = (torch.cat((y, torch.zeros_like(y[:, :, :odd])), 2) for y in (key, value))
            key, value = stage((key[:, :, ::2] + key[:, :, 1::2]) / 2), (value[:, :, ::2] + value[:, :, 1::2]) / 2
    key = key / math.sqrt(key.shape[2])
    out = query @ (key.mT @ value) / ((query * key.sum(2, keepdim=True)).sum(-1, keepdim=True) + 1e-6)
    for stage in reversed(module.expand_layers):
        out = stage(out)
    joined: Tensor = module.to_out(out.transpose(1, 2).flatten(2))
    return joined


def test_v1_is_the_original_s_arithmetic() -> None:
    torch.manual_seed(0)
    module, x = RippleAttention(12, heads=2, dim_head=6, variant="v1", **DOUBLE), torch.randn(2, 17, 12, **DOUBLE)
    torch.testing.assert_close(module(x), original_ripple(module, x), rtol=1e-7, atol=1e-9)


# what the originals' dictionaries hold: name -> shape
HEADS, INNER, DIM = 6, 12, 10


def of_layer(name: str, linear: int, norm: int) -> dict[str, tuple[int, ...]]:
    """A linear layer and a LayerNorm of a sequence."""
    vectors = (f"{linear}.bias", f"{norm}.weight", f"{norm}.bias")
    return {f"{name}.{linear}.weight": (HEADS, HEADS), **{f"{name}.{vector}": (HEADS,) for vector in vectors}}


LINEAR_VIT: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "hydra": (
        lambda: HydraAttention(DIM, heads=2, dim_head=HEADS, num_branches=2),
        {
            **{f"{name}.weight": (INNER, DIM) for name in ("to_k", "to_v", "branch_queries.0", "branch_queries.1")},
            **of_layer("branch_transforms.0", 0, 2),
            **of_layer("branch_transforms.1", 0, 2),
            "branch_fusion.0.weight": (INNER, 2 * INNER),
            **{f"branch_fusion.{name}": (INNER,) for name in ("0.bias", "1.weight", "1.bias")},
            "to_out.0.weight": (DIM, INNER),
            "to_out.0.bias": (DIM,),
        },
    ),
    "ripple": (
        lambda: RippleAttention(DIM, heads=2, dim_head=HEADS, num_stages=2),
        {
            **{f"{name}.weight": (INNER, DIM) for name in ("to_q", "to_k", "to_v")},
            **{name: shape for kind in ("pool", "expand") for i in (0, 1) for name, shape in of_layer(f"{kind}_layers.{i}", 0, 1).items()},
            "to_out.0.weight": (DIM, INNER),
            "to_out.0.bias": (DIM,),
        },
    ),
}


@pytest.mark.parametrize(("make", "shapes"), LINEAR_VIT.values(), ids=LINEAR_VIT.keys())
def test_states_of_the_originals_load_strictly(make: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]) -> None:
    module = make()
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == shapes
    module.load_state_dict({name: torch.randn(shape) for name, shape in shapes.items()})


MODULES: dict[str, Callable[..., nn.Module]] = {
    "hydra": lambda **how: HydraAttention(DIM, heads=2, dim_head=HEADS, num_branches=2, **how),
    "hydra meta": lambda **how: HydraAttention(DIM, heads=2, dim_head=HEADS, num_branches=2, variant="meta", **how),
    "hydra causal": lambda **how: HydraAttention(DIM, heads=2, dim_head=HEADS, num_branches=2, causal=True, **how),
    "ripple": lambda **how: RippleAttention(DIM, heads=2, dim_head=HEADS, num_stages=2, grid_size=(4, 4), **how),
    "ripple of a sequence": lambda **how: RippleAttention(DIM, heads=2, dim_head=HEADS, feature_map="elu", **how),
    "ripple v1": lambda **how: RippleAttention(DIM, heads=2, dim_head=HEADS, variant="v1", **how),
}
EACH = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


@EACH
def test_a_module_is_compiled_in_one_graph(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(1)
    module, x = make(), torch.randn(2, 17, DIM)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@EACH
def test_every_parameter_gets_a_gradient(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(1)
    module = make(**DOUBLE)
    module(torch.randn(2, 17, DIM, **DOUBLE)).square().sum().backward()
    assert {name for name, x in module.named_parameters() if x.grad is None or not x.grad.abs().sum() > 0} == set()


@EACH
def test_autocast_gives_its_dtype(make: Callable[..., nn.Module]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = make()(torch.randn(2, 17, DIM))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["hydra", "ripple", "ripple of a sequence"])
def test_padded_tokens_change_nothing(name: str) -> None:
    torch.manual_seed(2)
    module, x = MODULES[name](**DOUBLE), torch.randn(2, 17, DIM, **DOUBLE)
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[:, 12:] = True
    before = module(x, key_padding_mask=mask)[:, :12]
    other = x.clone()
    other[:, 12:] = torch.randn(2, 5, DIM, **DOUBLE)
    torch.testing.assert_close(module(other, key_padding_mask=mask)[:, :12], before, rtol=0, atol=0)


def test_a_causal_hydra_sees_no_future() -> None:
    module, x = MODULES["hydra causal"](**DOUBLE), torch.randn(1, 9, DIM, **DOUBLE)
    later = x.clone()
    later[:, 5:] += 1
    torch.testing.assert_close(module(later)[:, :5], module(x)[:, :5], rtol=0, atol=0)
