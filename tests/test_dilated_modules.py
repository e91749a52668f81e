"""Dilated attention's modules: naive definitions, the originals' states, the originals' defects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn import ArgumentError, Unsupported, dilated_attention, use_backend
from triton_attn import nn as ours
from triton_attn.nn import (
    DilatedAttention,
    ImprovedDilatedAttention,
    ImprovedMultiheadDilatedAttention,
    MultiheadDilatedAttention,
    from_darcstar,
    from_dilated_attention_pytorch,
    from_torchscale,
    magneto_gain,
)

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
E, H, N = 12, 3, 21
PATTERN: dict[str, Any] = {"segment_lengths": (8, 16), "dilation_rates": (1, 3)}
MULTIHEAD = pytest.mark.parametrize("kind", [MultiheadDilatedAttention, ImprovedMultiheadDilatedAttention])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def heads(n: int = N, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, n, H, 4, **DOUBLE, requires_grad=True) for _ in range(3)]


def by_definition(q: Tensor, k: Tensor, v: Tensor, pattern: Any, causal: bool = False) -> Tensor:
    """(B, N, H, D): softmax with the logarithm of how many branches hold a pair, offsets h // ceil(H / r)."""
    n, out = q.shape[1], torch.zeros_like(q)
    for head in range(H):
        count = torch.zeros(n, n, **DOUBLE)
        for length, rate in zip(pattern["segment_lengths"], pattern["dilation_rates"], strict=True):
            offset = head // -(-H // rate)
            for i in range(n):
                for j in range(n):
                    same = i // length == j // length and i % length % rate == offset and j % length % rate == offset
                    count[i, j] += same and (j <= i or not causal)
        scores = q[:, :, head] @ k[:, :, head].mT / math.sqrt(q.shape[-1]) + count.log()
        out[:, :, head] = scores.softmax(-1).nan_to_num(0.0) @ v[:, :, head]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [DilatedAttention, ImprovedDilatedAttention])
def test_heads_attend_by_the_definition(kind: type[DilatedAttention], causal: bool) -> None:
    q, k, v = heads()
    close(kind(**PATTERN)(q, k, v, is_causal=causal), by_definition(q, k, v, PATTERN, causal))


@MULTIHEAD
@pytest.mark.parametrize("causal", [False, True])
def test_the_module_projects_attends_normalises_projects(kind: type[MultiheadDilatedAttention], causal: bool) -> None:
    torch.manual_seed(0)
    module, x = kind(E, H, **PATTERN, **DOUBLE), torch.randn(2, N, E, **DOUBLE)
    weights, biases = (
        (module.qkv_proj.weight.chunk(3), module.qkv_proj.bias.chunk(3))
        if module.fused
        else tuple(zip(*((p.weight, p.bias) for p in (module.q_proj, module.k_proj, module.v_proj)), strict=True))
    )
    q, k, v = ((x @ weight.T + bias).view(2, N, H, -1) for weight, bias in zip(weights, biases, strict=True))
    assert module.norm is not None
    expected = module.out_proj(module.norm(by_definition(q, k, v, PATTERN, causal).flatten(2)))
    out, none = module(x, x, x, is_causal=causal)
    assert none is None
    close(out, expected)


@MULTIHEAD
def test_layouts_agree(kind: type[MultiheadDilatedAttention]) -> None:
    torch.manual_seed(0)
    first, x = kind(E, H, **PATTERN, **DOUBLE), torch.randn(2, N, E, **DOUBLE)
    last = kind(E, H, **PATTERN, batch_first=False, **DOUBLE)
    last.load_state_dict(first.state_dict())
    wanted = first(x)[0]
    close(last(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1), wanted)
    close(first(x[1])[0], wanted[1])
    close(first(x, x.clone(), x.clone())[0], wanted)  # three products in place of one


@MULTIHEAD
def test_padding_is_absent_in_either_kind_of_mask(kind: type[MultiheadDilatedAttention]) -> None:
    module, x = kind(E, H, **PATTERN, **DOUBLE), torch.randn(2, N, E, **DOUBLE)
    mask = torch.zeros(2, N, dtype=torch.bool)
    mask[:, 17:] = True
    wanted = module(x[:, :17])[0]
    other = x.clone()
    other[:, 17:] = 7.0
    close(module(other, key_padding_mask=mask)[0][:, :17], wanted)
    close(module(other, key_padding_mask=torch.zeros(2, N).masked_fill(mask, -math.inf))[0][:, :17], wanted)


@MULTIHEAD
def test_a_mask_of_floats_is_not_looked_at_without_numbers(kind: type[MultiheadDilatedAttention]) -> None:
    module, x = kind(E, H, **PATTERN, device="meta"), torch.empty(2, N, E, device="meta")
    assert module(x, key_padding_mask=torch.zeros(2, N, device="meta"))[0].shape == x.shape


@MULTIHEAD
def test_the_scale_of_the_scores_is_the_call_s(kind: type[MultiheadDilatedAttention]) -> None:
    torch.manual_seed(0)
    scaled, plain, x = kind(E, H, **PATTERN, softmax_scale=0.0, **DOUBLE), kind(E, H, **PATTERN, **DOUBLE), torch.randn(1, N, E, **DOUBLE)
    plain.load_state_dict(scaled.state_dict())
    assert not torch.equal(scaled(x)[0], plain(x)[0])
    with torch.no_grad():  # all scores are 0 where queries are
        (plain.qkv_proj.weight[:E] if plain.fused else plain.q_proj.weight).zero_()
    close(scaled(x)[0], plain(x)[0])


def test_numbers_may_be_numpy_s_and_ranges() -> None:
    numpy = pytest.importorskip("numpy")
    q, k, v = (x.detach() for x in heads())
    wanted = DilatedAttention((4, 8), (1, 2))(q, k, v)
    for lengths, rates in ((list(numpy.array([4, 8])), (1, 2)), (range(4, 9, 4), range(1, 3))):
        assert torch.equal(DilatedAttention(lengths, rates)(q, k, v), wanted)
        out = dilated_attention(*(x.transpose(1, 2) for x in (q, k, v)), segment_lengths=lengths, dilation_rates=rates)
        assert torch.equal(out.transpose(1, 2), wanted)


@MULTIHEAD
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_it_compiles_in_one_graph_and_every_parameter_learns(kind: type[MultiheadDilatedAttention], backend: str) -> None:
    torch.manual_seed(1)
    module, x = kind(E, H, **PATTERN), torch.randn(1, N, E)
    with use_backend(backend):
        if backend == "triton":
            pytest.importorskip("triton")
        out = torch.compile(module, fullgraph=True, backend="aot_eager")(x, is_causal=True)[0]
        torch.testing.assert_close(out, module(x, is_causal=True)[0], rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad(out.square().sum(), tuple(module.parameters()))
    named = zip((name for name, _ in module.named_parameters()), gradients, strict=True)
    # a bias of the keys moves every score of a query alike
    assert {name for name, gradient in named if not gradient.abs().sum() > 1e-4} <= {"k_proj.bias"}


@MULTIHEAD
def test_it_stands_in_a_transformer_layer(kind: type[MultiheadDilatedAttention]) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 20, dropout=0.0, batch_first=True).double()
    module: Any = kind(E, H, **PATTERN, **DOUBLE)
    layer.self_attn = module
    x, mask = torch.randn(2, N, E, **DOUBLE), torch.zeros(2, N, dtype=torch.bool)
    mask[1, 9:] = True
    attended = layer.norm1(x + module(x, key_padding_mask=mask)[0])
    expected = layer.norm2(attended + layer.linear2(layer.linear1(attended).relu()))
    close(layer(x, src_key_padding_mask=mask), expected)
    close(layer.eval()(x, src_key_padding_mask=mask), expected)  # torch's fused call for layers is not taken
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    close(encoder(x, src_key_padding_mask=mask), layer(expected, src_key_padding_mask=mask))


def test_magneto_s_gains() -> None:
    assert magneto_gain(12) == pytest.approx(math.sqrt(math.log(24)))
    assert magneto_gain(12, 6) == pytest.approx(math.sqrt(math.log(18) * math.log(24) / 3))
    assert magneto_gain(6, 12, part="decoder") == pytest.approx(math.sqrt(math.log(18)))
    torch.manual_seed(0)
    module = ImprovedMultiheadDilatedAttention(256, 4, **PATTERN, gamma_init=3.0)
    q, k, v = (part.std().item() for part in module.qkv_proj.weight.chunk(3))
    assert q == pytest.approx(1 / 16, rel=0.03)
    assert k / q == pytest.approx(1, rel=0.03)
    assert v / q == pytest.approx(3, rel=0.03)


def test_tf32_is_allowed_inside_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noting(self: Any, q: Tensor, *others: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return q

    monkeypatch.setattr(DilatedAttention, "forward", noting)
    before = torch.get_float32_matmul_precision()
    q, k, v = (x.detach().float() for x in heads())
    for asked in (True, False, None):
        ImprovedDilatedAttention(**PATTERN, use_tf32=asked)(q, k, v)
    assert seen == ["high", "highest", before]
    assert torch.get_float32_matmul_precision() == before


@pytest.fixture
def backend_s_own() -> Iterator[Any]:
    """cuda.matmul's own setting, after which torch refuses to tell the common one."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    yield backend
    backend.fp32_precision = before


def test_tf32_bears_a_backend_s_own_setting(backend_s_own: Any) -> None:
    q, k, v = (x.detach().float() for x in heads())
    ImprovedDilatedAttention(**PATTERN, use_tf32=False)(q, k, v)
    assert backend_s_own.fp32_precision == "tf32"


@pytest.mark.parametrize("asked", [True, False])
def test_tf32_leaves_one_graph(asked: bool) -> None:
    q, k, v = (x.detach().float() for x in heads())
    module = ImprovedDilatedAttention(**PATTERN, use_tf32=asked)
    out = torch.compile(module, fullgraph=True, backend="eager")(q, k, v)
    torch.testing.assert_close(out, module(q, k, v), rtol=1e-4, atol=1e-5)


# the originals' defects


def test_lengths_need_no_multiple_and_every_head_is_used_once() -> None:
    """The original asks that the longest segment divide N, and with 3 heads in 2 groups writes one twice and leaves one empty."""
    q, k, v = heads(n=13)
    out = DilatedAttention((4, 8), (1, 2), mode="head_group")(q, k, v)
    assert (out.abs().sum((0, 1, 3)) > 0).all()


def test_causal_outputs_have_no_gradient_from_later_tokens() -> None:
    """The original divides by a sum over all of them."""
    q, k, v = heads()
    for mode in ("longnet", "head_group"):
        out = DilatedAttention(**PATTERN, mode=mode)(q, k, v, is_causal=True)
        for gradient in torch.autograd.grad(out[:, :6].square().sum(), (q, k, v), retain_graph=True):
            assert gradient[:, 6:].abs().max() == 0


def test_tokens_attend_to_other_tokens() -> None:
    """The successor attends between the heads of one token."""
    q, k, v = heads()
    (gradient,) = torch.autograd.grad(ImprovedDilatedAttention(**PATTERN)(q, k, v)[:, 3].sum(), v)
    assert (gradient.abs().sum((0, 2, 3)) > 0).sum() > 1


def test_the_scale_and_dropout_are_used() -> None:
    q, k, v = heads()
    assert not torch.equal(DilatedAttention(**PATTERN, softmax_scale=2.0)(q, k, v), DilatedAttention(**PATTERN)(q, k, v))
    module = DilatedAttention(**PATTERN, attention_dropout=0.5)
    assert not torch.equal(module(q, k, v), module.eval()(q, k, v))


# states


def linear(name: str, rows: int = E) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.randn(rows, E), f"{name}.bias": torch.randn(rows)}


def norm(name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.randn(E), f"{name}.bias": torch.randn(E)}


def three() -> dict[str, Tensor]:
    return {**linear("q_proj"), **linear("k_proj"), **linear("v_proj"), **linear("out_proj")}


STATES: dict[str, tuple[Callable[..., dict[str, Tensor]], Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "fkodom": (from_dilated_attention_pytorch, lambda: {**three(), **norm("norm")}, {}),
    "fkodom without norm": (from_dilated_attention_pytorch, three, {"layer_norm": False}),
    "DarcStar, first layout": (from_darcstar, lambda: {**linear("qkv_proj", 3 * E), **norm("norm"), **linear("out_proj")}, {}),
    "DarcStar, second layout": (
        from_darcstar,
        lambda: {**linear("qkv_proj", 3 * E), **norm("q_ln"), **norm("k_ln"), **linear("out_proj")},
        {},
    ),
    "DarcStar, second layout, three projections": (
        from_darcstar,
        lambda: {**three(), **norm("q_ln"), **norm("k_ln")},
        {"qk_norm": True},
    ),
    "torchscale": (from_torchscale, lambda: {**three(), **norm("inner_attn_ln")}, {}),
}


@pytest.mark.parametrize(("importer", "state", "options"), STATES.values(), ids=STATES.keys())
def test_an_original_s_state_loads_into_both_classes_alike(
    importer: Callable[..., dict[str, Tensor]], state: Callable[[], dict[str, Tensor]], options: dict[str, Any]
) -> None:
    given, x, outs = state(), torch.randn(2, N, E), []
    for kind in (MultiheadDilatedAttention, ImprovedMultiheadDilatedAttention):
        module = kind(E, H, **PATTERN, **options)
        module.load_state_dict(importer(given, improved=module.fused))
        outs.append(module(x)[0])
    torch.testing.assert_close(*outs)


def test_darcstar_s_second_layout_normalises_thrice() -> None:
    """Its q_ln stands before and behind the attention."""
    given, x = {**three(), **norm("q_ln"), **norm("k_ln")}, torch.randn(2, N, E)
    module = MultiheadDilatedAttention(E, H, **PATTERN, qk_norm=True)
    module.load_state_dict(from_darcstar(given, improved=False))

    def normal(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, (E,), given[f"{name}.weight"], given[f"{name}.bias"])

    q, k, v = normal(module.q_proj(x), "q_ln"), normal(module.k_proj(x), "k_ln"), module.v_proj(x)
    out = module.attention(*(y.unflatten(-1, (H, -1)) for y in (q, k, v))).flatten(2)
    torch.testing.assert_close(module(x)[0], module.out_proj(normal(out, "q_ln")))


def test_an_unknown_name_in_a_state_is_said() -> None:
    with pytest.raises(ArgumentError, match=r"from_torchscale: state lacks v_proj.weight; has unknown w_proj.weight"):
        from_torchscale({**linear("q_proj"), **linear("k_proj"), **linear("out_proj"), "w_proj.weight": torch.ones(1)})


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "the other order": (lambda: ImprovedMultiheadDilatedAttention(E, H, (1, 2, 4), (8, 16, 32)), "looks like the other order; allowed"),
    "one rate short": (lambda: DilatedAttention((8, 16), (1,)), "dilation_rates has 1 numbers; allowed: 2, as segment_lengths"),
    "heads": (lambda: MultiheadDilatedAttention(E, 5, **PATTERN), "num_heads is 5; allowed: a divisor of embed_dim, 12"),
    "an op": (lambda: DilatedAttention(**PATTERN, op="cutlass"), "op is 'cutlass'; allowed: None"),  # type: ignore[arg-type]
    "a mode": (lambda: DilatedAttention(**PATTERN, mode="ring"), "mode is 'ring'; allowed: 'longnet', 'head_group'"),
    "dropout": (lambda: MultiheadDilatedAttention(E, H, **PATTERN, dropout=2), "MultiheadDilatedAttention: dropout is 2; allowed: 0 to 1"),
    "dropout of the call": (lambda: ImprovedDilatedAttention(**PATTERN, dropout=2), "ImprovedDilatedAttention: dropout is 2"),
    "the module's mode": (lambda: MultiheadDilatedAttention(E, H, **PATTERN, mode="ring"), "MultiheadDilatedAttention: mode is 'ring'"),
    "a gain": (lambda: MultiheadDilatedAttention(E, H, **PATTERN, gamma_init=-1), "gamma_init is -1; allowed: 0 and more"),
    "an epsilon": (lambda: MultiheadDilatedAttention(E, H, **PATTERN, layer_norm_eps="x"), "layer_norm_eps is 'x'"),  # type: ignore[arg-type]
    "a flag": (lambda: MultiheadDilatedAttention(E, H, **PATTERN, layer_norm="yes"), "layer_norm is 'yes', a str"),  # type: ignore[arg-type]
    "a bias": (lambda: MultiheadDilatedAttention(E, H, **PATTERN, bias=3), "bias is 3, a int; allowed: True, False"),  # type: ignore[arg-type]
    "truths": (lambda: DilatedAttention([True], [1]), "segment_lengths is [True]; allowed: a sequence of whole numbers"),
    "a list for a mask": (
        lambda: MultiheadDilatedAttention(E, H, **PATTERN)(torch.ones(1, 9, E), key_padding_mask=[1]),
        "key_padding_mask is a list; allowed: None or torch.Tensor",
    ),
    "a state with xpos": (lambda: from_torchscale({**three(), "xpos.scale": torch.ones(2)}), "state has xpos.scale: its queries"),
    "a state of a number": (lambda: from_darcstar(5), "state is a int; allowed: a mapping"),  # type: ignore[arg-type]
    "a state without a bias": (
        lambda: from_torchscale({name: x for name, x in three().items() if name != "k_proj.bias"}, improved=True),
        "state lacks k_proj.bias",
    ),
    "another length": (lambda: ours.MultiheadDilatedAttention(E, H, **PATTERN)(torch.ones(2, 9, E), torch.ones(2, 8, E)), "key has shape"),
    "a mask of numbers": (
        lambda: MultiheadDilatedAttention(E, H, **PATTERN)(torch.ones(1, 9, E), key_padding_mask=torch.ones(1, 9)),
        "key_padding_mask has values beside 0 and -inf",
    ),
}


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        call()
    assert said in str(raised.value)


@MULTIHEAD
def test_what_it_cannot_give_it_refuses_by_name(kind: type[MultiheadDilatedAttention]) -> None:
    module, x = kind(E, H, **PATTERN), torch.ones(1, 9, E)
    with pytest.raises(Unsupported, match="cannot give attention weights; pass need_weights=False"):
        module(x, need_weights=True)
    with pytest.raises(Unsupported, match="cannot give an attn_mask; pass is_causal=True"):
        module(x, attn_mask=torch.ones(9, 9))
