"""`triton_attn.nn.MultiheadAttention` is torch's: state dicts, initial values, outputs, weights, gradients, refusals."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import triton_attn
from triton_attn import ArgumentError, Unsupported, refusals, use_backend
from triton_attn.nn import MultiheadAttention, attention_weights

pytestmark = pytest.mark.filterwarnings("ignore:triton_attn.attention takes its portable path")  # float64 on a GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E, H, N, L, S = 16, 2, 3, 5, 7
DOUBLE: dict[str, Any] = {"dtype": torch.float64, "device": DEVICE}
SINGLE: dict[str, Any] = {"dtype": torch.float32, "device": DEVICE}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias=False": {"bias": False},
    "add_bias_kv": {"add_bias_kv": True},
    "add_zero_attn": {"add_zero_attn": True},
    "add_bias_kv, add_zero_attn, bias=False": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "kdim": {"kdim": 12},
    "vdim": {"vdim": 20},
    "kdim, vdim, bias=False": {"kdim": 12, "vdim": 20, "bias": False},
    "kdim, vdim, add_bias_kv, add_zero_attn": {"kdim": 12, "vdim": 20, "add_bias_kv": True, "add_zero_attn": True},
}
LAYOUTS = ["sequence first", "batch first", "unbatched", "unbatched, batch_first"]
EACH_VARIANT = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
WEIGHTS = pytest.mark.parametrize(("need", "average"), [(True, True), (True, False), (False, True)], ids=["averaged", "per head", "none"])


def pair(**options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module, trained a little, and ours with its state."""
    theirs: nn.MultiheadAttention = nn.MultiheadAttention(E, H, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(layout: str, factory: dict[str, Any], kdim: int = E, vdim: int = E) -> list[Tensor]:
    lead = {"sequence first": lambda n: (n, N), "batch first": lambda n: (N, n)}.get(layout, lambda n: (n,))
    return [torch.randn(*lead(length), width, **factory, requires_grad=True) for length, width in ((L, E), (S, kdim), (S, vdim))]


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, **DOUBLE).masked_fill(mask, -torch.inf)


def masks(layout: str) -> Iterator[dict[str, Tensor | None]]:
    """Every kind of attn_mask with every kind of key_padding_mask; no row is without a key, where torch gives NaN."""
    hidden = torch.rand(N * H, L, S, device=DEVICE) > 0.5
    hidden[..., 0] = False
    padded = torch.arange(S, device=DEVICE) >= torch.tensor([S, 4, 2], device=DEVICE)[:, None]
    bias = torch.randn(N, S, **DOUBLE)
    if "unbatched" in layout:
        hidden, padded, bias = hidden[:H], padded[1], bias[0]
    for attn in (None, hidden[0], hidden, additive(hidden[0]), torch.randn(hidden.shape, **DOUBLE)):
        for padding in (None, padded, additive(padded), bias):
            yield {"attn_mask": attn, "key_padding_mask": padding}


def results(module: nn.Module, given: list[Tensor], **call: Any) -> list[Tensor]:
    """Output, weights and the gradients of a loss that both enter, of inputs and parameters."""
    out, weights = module(*given, **call)
    found = [out] if weights is None else [out, weights]
    loss: Any = sum((x.square() * torch.linspace(1, 2, x.numel(), device=x.device).view(x.shape)).sum() for x in found)
    leaves = [*dict.fromkeys(given), *module.parameters()]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return found + [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """32 roundings at the scale of the largest number among them: in float32 either run was seen 14 from its float64 truth."""
    bound = 32 * torch.finfo(theirs[0].dtype).eps * max(x.detach().abs().max().item() for x in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


def assert_results_equal(ours: list[Tensor], theirs: list[Tensor], need_weights: bool) -> None:
    """Output and weights each at their own scale; small gradients are what is left of large terms."""
    for i in range(1 + need_weights):
        assert_equal(ours[i : i + 1], theirs[i : i + 1])
    assert_equal(ours[1 + need_weights :], theirs[1 + need_weights :])


def assert_same(ours: nn.Module, theirs: nn.Module, given: list[Tensor], **call: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # torch's, that masks of two dtypes are deprecated
        expected = results(theirs, given, **call)
    assert_results_equal(results(ours, given, **call), expected, call.get("need_weights", True))


# state


@EACH_VARIANT
def test_one_seed_gives_torchs_weights_under_torchs_names(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(E, H, **options).state_dict()
    torch.manual_seed(3)
    ours = MultiheadAttention(E, H, **options).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@EACH_VARIANT
def test_a_state_loads_both_ways(options: dict[str, Any]) -> None:
    theirs, ours = pair(**options)
    back = nn.MultiheadAttention(E, H, **options)
    back.load_state_dict(copy.deepcopy(ours).state_dict(), strict=True)
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], parameter)


def test_it_has_torchs_signatures_and_is_torchs_module() -> None:
    assert isinstance(pair()[1], nn.MultiheadAttention)
    for method in ("__init__", "forward"):
        ours, theirs = (
            inspect.signature(getattr(module, method)).parameters.values() for module in (MultiheadAttention, nn.MultiheadAttention)
        )
        positional = [(p.name, p.default) for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == [(p.name, p.default) for p in theirs]


def test_it_is_saved_and_loaded_without_pickled_code() -> None:
    theirs, ours = pair(add_bias_kv=True)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True), strict=True)


# the same outputs, weights and gradients


@EACH_VARIANT
@EACH_LAYOUT
@WEIGHTS
def test_it_gives_what_torch_gives(options: dict[str, Any], layout: str, need: bool, average: bool) -> None:
    theirs, ours = pair(**options, **DOUBLE, batch_first="batch" in layout.split(", ")[-1])
    given = inputs(layout, DOUBLE, options.get("kdim", E), options.get("vdim", E))
    for mask in masks(layout):
        assert_same(ours, theirs, given, need_weights=need, average_attn_weights=average, **mask)


@WEIGHTS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("same", ["query, key, value", "key, value"])
def test_one_tensor_for_several_inputs(same: str, training: bool, need: bool, average: bool) -> None:
    for bias in (True, False):
        theirs, ours = (module.train(training) for module in pair(**DOUBLE, bias=bias, dropout=0.0, batch_first=True))
        query, key, _ = inputs("batch first", DOUBLE)
        given = [query, query, query] if same == "query, key, value" else [query, key, key]
        assert_same(ours, theirs, given, need_weights=need, average_attn_weights=average)
        with torch.no_grad():  # where torch's own module takes its fast path
            call = {"need_weights": need, "average_attn_weights": average}
            for a, b in zip(*(module(*given, **call) for module in (ours, theirs)), strict=True):
                if need or a is not None:
                    assert_equal([a], [b])


@WEIGHTS
def test_a_kernel_gives_what_torch_gives(need: bool, average: bool) -> None:
    pytest.importorskip("triton")
    for options in (VARIANTS["plain"], VARIANTS["kdim, vdim, add_bias_kv, add_zero_attn"]):
        theirs, ours = pair(**options, **SINGLE)
        given = inputs("sequence first", SINGLE, options.get("kdim", E), options.get("vdim", E))
        every = list(masks("sequence first"))
        for mask in (every[0], every[5], every[9], every[14]):
            mask = {name: x.float() if x is not None and x.is_floating_point() else x for name, x in mask.items()}
            with use_backend("triton"):
                assert_same(ours, theirs, given, need_weights=need, average_attn_weights=average, **mask)


@WEIGHTS
@pytest.mark.parametrize("tiles", ["one tile", "many tiles"])
def test_masks_that_learn_get_torchs_gradient(tiles: str, need: bool, average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_attn.nn.attention_weights.SCORES_AT_ONCE", 2**22 if tiles == "one tile" else 1)
    theirs, ours = pair(**DOUBLE)
    given = inputs("sequence first", DOUBLE)
    for shape in ((L, S), (N * H, L, S)):
        bias, padding = (torch.randn(size, **DOUBLE, requires_grad=True) for size in (shape, (N, S)))
        call: dict[str, Any] = {"attn_mask": bias, "key_padding_mask": padding, "need_weights": need, "average_attn_weights": average}
        found = []
        for module in (ours, theirs):
            loss = sum(x.square().sum() for x in module(*given, **call) if x is not None)
            found.append(list(torch.autograd.grad(loss, (bias, padding))))
        assert_equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_in_torch(dtype: torch.dtype) -> None:
    for options in (VARIANTS["plain"], VARIANTS["add_bias_kv"]):
        theirs, ours = pair(**options, **SINGLE)
        given = inputs("sequence first", SINGLE)
        with torch.autocast(DEVICE, dtype):
            (out, weights), (expected, expected_weights) = ours(*given), theirs(*given)
        assert out.dtype is expected.dtype is dtype
        torch.testing.assert_close(out, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
        torch.testing.assert_close(weights, expected_weights.float(), rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize(("n", "m", "keys"), [(0, L, S), (N, 0, S), (N, L, 0)], ids=["batch", "query", "key"])
def test_a_mask_of_three_dimensions_may_hold_nothing(n: int, m: int, keys: int) -> None:
    theirs, ours = pair(**SINGLE, add_zero_attn=True)
    given = [torch.randn(length, n, E, **SINGLE) for length in (m, keys, keys)]
    found, expected = (module(*given, attn_mask=torch.zeros(n * H, m, keys, **SINGLE)) for module in (ours, theirs))
    torch.testing.assert_close(found, expected)


# is_causal


def causal() -> Tensor:
    return torch.ones(L, L, dtype=torch.bool, device=DEVICE).triu(1)


@WEIGHTS
def test_a_causal_hint_is_believed_where_torch_believes_it(need: bool, average: bool) -> None:
    theirs, ours = pair(**DOUBLE)
    query = inputs("sequence first", DOUBLE)[0]
    padded = torch.arange(L, device=DEVICE).expand(N, L) == L - 1
    nothing = torch.zeros(L, L, dtype=torch.bool, device=DEVICE)
    for mask, padding in itertools.product((causal(), additive(causal()), nothing), (None, padded)):
        call: dict[str, Any] = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": True}
        assert_same(ours, theirs, [query] * 3, need_weights=need, average_attn_weights=average, **call)


def test_a_causal_hint_hides_no_added_key() -> None:
    """torch's does where no weights are asked for, and then its two answers differ."""
    theirs, ours = pair(**DOUBLE, add_bias_kv=True)
    query = inputs("sequence first", DOUBLE)[0]
    with_weights = theirs(query, query, query, attn_mask=causal(), is_causal=True)[0]
    without = theirs(query, query, query, attn_mask=causal(), is_causal=True, need_weights=False)[0]
    assert (with_weights - without).abs().max() > 0.01
    found = ours(query, query, query, attn_mask=causal(), is_causal=True, need_weights=False)[0]
    assert_equal([found], [with_weights])


# dropout and weights


@EACH_LAYOUT
@pytest.mark.parametrize("average", [True, False])
def test_weights_are_returned_after_dropout_as_in_torch(layout: str, average: bool) -> None:
    theirs, ours = pair(**DOUBLE, dropout=0.4, batch_first="batch" in layout.split(", ")[-1])
    given = inputs(layout, DOUBLE)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(4)
        found.append(results(module, given, average_attn_weights=average))
    assert_results_equal(found[0], found[1], need_weights=True)
    assert not torch.allclose(found[0][1].sum(-1), torch.ones((), **DOUBLE))


def test_dropout_without_weights_goes_by_the_seed_and_rests_in_evaluation() -> None:
    theirs, ours = pair(**DOUBLE, dropout=0.4)
    given = inputs("sequence first", DOUBLE)
    torch.manual_seed(4)
    first = ours(*given, need_weights=False)[0]
    torch.manual_seed(4)
    assert torch.equal(ours(*given, need_weights=False)[0], first)
    assert not torch.equal(ours(*given, need_weights=False)[0], first)
    assert_same(ours.eval(), theirs.eval(), given)


def test_what_on_unsupported_says_about_weights_after_dropout() -> None:
    given = inputs("sequence first", SINGLE)
    strict, quiet = (MultiheadAttention(E, H, dropout=0.4, **SINGLE, on_unsupported=policy) for policy in ("raise", "none"))
    with pytest.raises(Unsupported, match=r"^MultiheadAttention cannot give weights after dropout .*; pass need_weights=False"):
        strict(*given)
    assert quiet(*given)[1] is None
    for module in (strict.eval(), quiet.eval()):
        assert module(*given)[1] is not None
    with pytest.raises(ArgumentError, match="on_unsupported is 'ignore'; allowed: 'raise', 'reference', 'none'"):
        MultiheadAttention(E, H, on_unsupported="ignore")
    assert MultiheadAttention(E, H).on_unsupported == "reference" in refusals.POLICIES


def test_a_module_of_torchs_may_become_ours() -> None:
    theirs, ours = pair(dropout=0.4, **SINGLE)
    theirs.__class__ = MultiheadAttention
    given, found = inputs("sequence first", SINGLE), []
    for module in (theirs, ours):
        torch.manual_seed(4)
        found.append(module(*given))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_after_dropout_are_explained() -> None:
    _, ours = pair(dropout=0.4, **SINGLE)
    explained = triton_attn.explain(ours, *inputs("sequence first", SINGLE))
    assert (explained.mechanism, explained.path) == ("MultiheadAttention", "reference")
    assert "not a kernel: none can give weights after dropout" in str(explained)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The size of the largest tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("gradient", [False, True])
def test_averaged_weights_never_hold_a_copy_for_each_head(gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = (torch.randn(2, 4, length, 4, **SINGLE).requires_grad_(gradient) for length in (33, 40))
    few = 2 * 33 * 40
    monkeypatch.setattr("triton_attn.nn.attention_weights.SCORES_AT_ONCE", 1)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        weights = attention_weights.attention_weights(query, key, average=True)
        if gradient:
            weights.sum().backward()  # type: ignore[no-untyped-call]
    assert largest.numel <= few


@WEIGHTS
def test_weights_by_tiles_are_the_same(need: bool, average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_attn.nn.attention_weights.SCORES_AT_ONCE", 1)
    theirs, ours = pair(**DOUBLE)
    given = inputs("sequence first", DOUBLE)
    for mask in masks("sequence first"):
        assert_same(ours, theirs, given, need_weights=need, average_attn_weights=average, **mask)


# rows that see no key


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("floating", [True, False])
def test_a_fully_padded_item_gives_the_bias_alone(training: bool, need: bool, floating: bool) -> None:
    for dropout in (0.0, 0.4):
        _, ours = pair(**DOUBLE, dropout=dropout, batch_first=True)
        given = inputs("batch first", DOUBLE)
        padded = torch.zeros(N, S, dtype=torch.bool, device=DEVICE)
        padded[1] = True
        found = results(ours.train(training), given, key_padding_mask=additive(padded) if floating else padded, need_weights=need)
        assert all(x.isfinite().all() for x in found)
        assert_equal([found[0][1]], [ours.out_proj.bias.expand(L, E)])
        if need:
            assert (found[1][1] == 0).all()


# what is refused


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_refused_by_name(layout: torch.layout) -> None:
    _, ours = pair(batch_first=True, **SINGLE)
    parts = [torch.randn(length, E, device=DEVICE) for length in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    with pytest.raises(Unsupported, match=r"^MultiheadAttention cannot give attention over a nested query; pad it .* or use torch.nn"):
        ours.eval()(nested, nested, nested)


@pytest.mark.parametrize(
    ("argument", "said", "changes"),
    [
        ("is_causal", "is True without an attn_mask", {"is_causal": True}),
        ("query", r"has shape \(1, 5, 3, 16\)", {"query": torch.zeros(1, L, N, E)}),
        ("key", r"has shape \(7, 16\)", {"key": torch.zeros(S, E)}),
        ("value", "has width 15; allowed: 16", {"value": torch.zeros(S, N, E - 1)}),
        ("value", r"has shape \(6, 3, 16\)", {"value": torch.zeros(S - 1, N, E)}),
        ("key", "has batch size 1", {"key": torch.zeros(S, 1, E), "value": torch.zeros(S, 1, E)}),
        ("attn_mask", r"has shape \(7, 5\); allowed: \(5, 7\) or \(6, 5, 7\)", {"attn_mask": torch.zeros(S, L)}),
        ("attn_mask", r"has shape \(3, 5, 7\)", {"attn_mask": torch.zeros(N, L, S)}),
        ("attn_mask", "has dtype torch.int64", {"attn_mask": torch.zeros(L, S).long()}),
        ("attn_mask", "has dtype torch.float64", {"attn_mask": torch.zeros(L, S).double()}),
        ("key_padding_mask", r"has shape \(7, 3\); allowed: \(3, 7\)", {"key_padding_mask": torch.zeros(S, N, dtype=torch.bool)}),
        ("key_padding_mask", "has dtype torch.uint8", {"key_padding_mask": torch.zeros(N, S).byte()}),
    ],
)
def test_a_wrong_argument_is_named(argument: str, said: str, changes: dict[str, Any]) -> None:
    theirs, ours = pair(**SINGLE)
    given = {**dict(zip(("query", "key", "value"), inputs("sequence first", SINGLE), strict=True)), **changes}
    given = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in given.items()}
    with pytest.raises(ArgumentError, match=rf"^MultiheadAttention: {argument} {said}") as raised:
        ours(**given)
    assert raised.value.argument == argument
    with pytest.raises((RuntimeError, AssertionError)):
        theirs(**given)


# how


@pytest.mark.parametrize("backend", ["portable", "triton"])
@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12}, {"dropout": 0.3}], ids=str)
def test_it_compiles_in_one_graph(options: dict[str, Any], need: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    monkeypatch.setattr("triton_attn.nn.attention_weights.SCORES_AT_ONCE", 40)
    _, ours = pair(**options, **SINGLE)
    given, mask = inputs("sequence first", SINGLE, options.get("kdim", E)), list(masks("sequence first"))[5]
    compiled: Any = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = []
    for module in (compiled, ours):
        torch.manual_seed(4)
        with use_backend(backend):
            found.append(results(module, given, need_weights=need, **mask))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_in_evaluation_it_is_ours_that_runs_even_in_a_layer_of_torchs() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, **SINGLE).eval()
    x = torch.randn(N, L, E, **SINGLE)
    expected = layer(x)
    _, ours = pair(batch_first=True, **SINGLE)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours.eval()
    with torch.no_grad():
        assert triton_attn.explain(ours, x, x, x).mechanism == "attention"
        with pytest.raises(ArgumentError, match="made no call of this package"):
            triton_attn.explain(layer, x)  # torch's layer has a fast path of its own, and asks its module for parameters only
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert triton_attn.explain(layer, x).mechanism == "attention"
            torch.testing.assert_close(layer(x), expected)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
