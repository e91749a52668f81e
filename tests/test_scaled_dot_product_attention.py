"""`triton_attn.scaled_dot_product_attention` is torch's, call for call: outputs, gradients, shapes, dtypes, refusals."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import triton_attn
from triton_attn import ArgumentError, Unsupported, use_backend
from triton_attn.functional import scaled_dot_product_attention as module

pytestmark = pytest.mark.filterwarnings("ignore:triton_attn.attention takes its portable path")  # float64 on a GPU
sdpa: Any = triton_attn.scaled_dot_product_attention
theirs: Any = F.scaled_dot_product_attention
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Shape = tuple[int, ...]


class Call(NamedTuple):
    query: Shape
    key: Shape
    value: Shape
    mask: Shape | None = None
    kind: str = "boolean"  # "boolean", "additive", "hidden rows" or "hidden rows, additive"
    options: dict[str, Any] = {}  # noqa: RUF012  never changed


PLAIN = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
GROUPED: dict[str, Any] = {"enable_gqa": True}
CALLS = {
    "plain": Call(*PLAIN),
    "2 dimensions": Call((5, 8), (7, 8), (7, 8)),
    "3 dimensions": Call((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "5 dimensions": Call((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)),
    "6 dimensions": Call((2, 1, 2, 3, 5, 8), (2, 1, 2, 3, 7, 8), (2, 1, 2, 3, 7, 8)),
    "query batch broadcasts": Call((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "key batch broadcasts": Call((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)),
    "value batch broadcasts": Call((2, 3, 5, 8), (2, 3, 7, 8), (1, 3, 7, 8)),
    "query heads broadcast": Call((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "key heads broadcast": Call((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "3 dimensions broadcast": Call((3, 5, 8), (1, 7, 8), (1, 7, 8)),
    "5 dimensions broadcast": Call((2, 1, 3, 5, 8), (2, 2, 1, 7, 8), (1, 2, 3, 7, 8)),
    "as many dimensions as each likes": Call((2, 3, 5, 8), (3, 7, 8), (7, 8)),
    "wider values": Call((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 12)),
    "causal": Call(*PLAIN[:1] * 3, options={"is_causal": True}),
    "causal, more keys: from the top left": Call(*PLAIN, options={"is_causal": True}),
    "causal, fewer keys: from the top left": Call(PLAIN[1], *PLAIN[:1] * 2, options={"is_causal": True}),
    "causal, 3 dimensions": Call((3, 5, 8), (3, 7, 8), (3, 7, 8), options={"is_causal": True}),
    "boolean mask": Call(*PLAIN, mask=(2, 3, 5, 7)),
    "boolean mask of keys": Call(*PLAIN, mask=(2, 1, 1, 7)),
    "boolean mask of 2 dimensions": Call(*PLAIN, mask=(5, 7)),
    "boolean mask of 3 dimensions": Call(*PLAIN, mask=(3, 5, 7)),
    "boolean mask in 2 dimensions": Call((5, 8), (7, 8), (7, 8), mask=(5, 7)),
    "boolean mask in 3 dimensions": Call((3, 5, 8), (3, 7, 8), (3, 7, 8), mask=(3, 1, 7)),
    "boolean mask in 5 dimensions": Call((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8), mask=(2, 2, 3, 5, 7)),
    "boolean mask of keys in 5 dimensions": Call((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8), mask=(2, 1, 1, 1, 7)),
    "boolean mask for all in 5 dimensions": Call((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8), mask=(1, 1, 3, 5, 7)),
    "shorter boolean mask in 5 dimensions": Call((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8), mask=(2, 1, 5, 7)),
    "additive mask": Call(*PLAIN, mask=(2, 3, 5, 7), kind="additive"),
    "additive mask of keys": Call(*PLAIN, mask=(2, 1, 1, 7), kind="additive"),
    "additive mask of heads": Call(*PLAIN, mask=(3, 5, 7), kind="additive"),
    "additive mask in 5 dimensions": Call((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8), mask=(2, 1, 5, 7), kind="additive"),
    "rows that see no key": Call(*PLAIN, mask=(2, 3, 5, 7), kind="hidden rows"),
    "rows that see no key, additive": Call(*PLAIN, mask=(2, 3, 5, 7), kind="hidden rows, additive"),
    "grouped heads": Call((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), options=GROUPED),
    "grouped heads, causal": Call((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), options={**GROUPED, "is_causal": True}),
    "grouped heads, masked": Call((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), mask=(6, 5, 7), options=GROUPED),
    "grouped heads, 3 dimensions": Call((6, 5, 8), (2, 7, 8), (2, 7, 8), options=GROUPED),
    "grouped heads, 5 dimensions": Call((2, 1, 6, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8), options=GROUPED),
    "grouped heads, keys for every batch": Call((2, 6, 5, 8), (2, 7, 8), (2, 7, 8), options=GROUPED),
    "as many key heads as query heads": Call(*PLAIN, options=GROUPED),
    "scale": Call(*PLAIN, options={"scale": 0.3}),
    "negative scale": Call(*PLAIN, options={"scale": -2}),
    "scale 0": Call(*PLAIN, options={"scale": 0.0}),
    "scale 0, masked": Call(*PLAIN, mask=(5, 7), options={"scale": 0}),
    "no key": Call((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
    "no key, masked": Call((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8), mask=(5, 0)),
    "no query": Call((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    "no batch": Call((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)),
    "no head": Call((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
    "no batch, 5 dimensions": Call((2, 0, 3, 5, 8), (2, 1, 3, 7, 8), (2, 1, 3, 7, 8)),
}
INTERPRETED = [
    "plain",
    "2 dimensions",
    "5 dimensions broadcast",
    "wider values",
    "causal, more keys: from the top left",
    "causal, fewer keys: from the top left",
    "boolean mask of keys in 5 dimensions",
    "additive mask of heads",
    "rows that see no key",
    "rows that see no key, additive",
    "grouped heads, 3 dimensions",
    "scale 0",
    "no key",
]


def draw(call: Call, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    leaves = [torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in call[:3]]
    if call.mask is None:
        return leaves, None
    mask = torch.rand(call.mask, device=DEVICE) > 0.4
    if mask.numel():
        mask[..., 0] = True
    if call.kind.startswith("hidden rows"):
        mask[..., 2, :] = False
    if call.kind == "additive":
        return leaves, torch.randn(call.mask, dtype=dtype, device=DEVICE)
    return leaves, mask.to(dtype).log() if "additive" in call.kind else mask


def results(function: Callable[..., Tensor], leaves: list[Tensor], mask: Tensor | None, **options: Any) -> list[Tensor]:
    """Output and gradients, the mask's too where it has one."""
    out = function(*leaves, mask, **options)
    wanted = [x for x in (*leaves, mask) if x is not None and x.requires_grad]
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), wanted)]


def assert_as_torch(leaves: list[Tensor], mask: Tensor | None, options: dict[str, Any], **tolerance: Any) -> None:
    ours = results(sdpa, leaves, mask, **options)
    for found, expected in zip(ours, results(theirs, leaves, mask, **options), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("name", CALLS)
def test_it_gives_what_torch_gives(name: str) -> None:
    call = CALLS[name]
    with use_backend("portable"):
        assert_as_torch(*draw(call, torch.float64), call.options, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_it_gives_what_torch_gives_without_gradients(name: str) -> None:
    """torch's fused calls run only here."""
    call = CALLS[name]
    leaves, mask = draw(call, torch.float32)
    with torch.no_grad(), use_backend("portable"):
        expected = theirs(*leaves, mask, **call.options)
        torch.testing.assert_close(sdpa(*leaves, mask, **call.options), expected)


@pytest.mark.parametrize("name", INTERPRETED)
def test_a_kernel_gives_what_torch_gives(name: str) -> None:
    pytest.importorskip("triton")
    call = CALLS[name]
    with use_backend("triton"):
        assert_as_torch(*draw(call, torch.float32), call.options)


def test_every_call_is_explained_as_attention() -> None:
    for call in CALLS.values():
        leaves, mask = draw(call, torch.float32)
        assert triton_attn.explain(sdpa, *leaves, mask, **call.options).mechanism == "attention"


def test_it_has_torchs_signature() -> None:
    parameters = inspect.signature(sdpa).parameters.values()
    assert [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        ("query", inspect.Parameter.empty),
        ("key", inspect.Parameter.empty),
        ("value", inspect.Parameter.empty),
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
    ]
    assert [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY] == [("scale", None), ("enable_gqa", False)]


# masks that learn


def relative_bias(dtype: torch.dtype) -> Tensor:
    """T5's: one number for each head and distance."""
    table = torch.randn(3, 12, dtype=dtype, device=DEVICE)
    distance = torch.arange(7, device=DEVICE)[None] - torch.arange(5, device=DEVICE)[:, None] + 4
    return table[:, distance].requires_grad_()


def alibi(dtype: torch.dtype) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, 4, dtype=dtype, device=DEVICE)
    distance = (torch.arange(7, device=DEVICE)[None] - torch.arange(5, device=DEVICE)[:, None]).abs()
    return (-slopes[:, None, None] * distance).requires_grad_()


def shared(dtype: torch.dtype) -> Tensor:
    return torch.randn(1, 5, 7, dtype=dtype, device=DEVICE, requires_grad=True)


BIASES = pytest.mark.parametrize("bias", [relative_bias, alibi, shared])


@BIASES
def test_a_bias_gets_torchs_gradient(bias: Callable[[torch.dtype], Tensor]) -> None:
    leaves, _ = draw(CALLS["plain"], torch.float64)
    assert_as_torch(leaves, bias(torch.float64), {}, rtol=0, atol=1e-12)


@BIASES
def test_explain_says_why_a_bias_that_learns_takes_the_portable_path(bias: Callable[[torch.dtype], Tensor]) -> None:
    leaves, _ = draw(CALLS["plain"], torch.float32)
    learning = bias(torch.float32)
    explained = triton_attn.explain(sdpa, *leaves, learning)
    assert explained.path == "portable"
    assert "mask requires a gradient, which no kernel computes" in str(explained)
    with use_backend("triton"), pytest.raises(Unsupported, match="mask requires a gradient"):
        sdpa(*leaves, learning)
    pytest.importorskip("triton")
    with use_backend("triton"):
        assert triton_attn.explain(sdpa, *leaves, learning.detach()).path == "kernel"


# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask_dtype", ["float32", "own"])
def test_half_precision_takes_masks_of_its_own_dtype_and_of_float32(dtype: torch.dtype, mask_dtype: str) -> None:
    leaves, mask = draw(CALLS["additive mask of keys"], dtype)
    assert mask is not None
    assert_as_torch(leaves, mask.float() if mask_dtype == "float32" else mask, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_in_torch(dtype: torch.dtype) -> None:
    (query, key, value), mask = draw(CALLS["additive mask"], torch.float32)
    doubles = [x.detach().double().requires_grad_() for x in (query, key, value)]
    with torch.autocast(DEVICE, dtype):
        for leaves in ([query, key, value], [query, key.detach().to(dtype).requires_grad_(), value], doubles):
            assert_as_torch(leaves, None, {})
        assert sdpa(query, key, value).dtype is dtype
        assert sdpa(*doubles).dtype is torch.float64
        found = sdpa(query, key, value, mask)
    # torch rounds the mask, too; here it keeps its precision
    torch.testing.assert_close(found, theirs(*(x.to(dtype) for x in (query, key, value)), mask))


def test_parameters_are_tensors() -> None:
    leaves, _ = draw(CALLS["plain"], torch.float64)
    assert_as_torch([torch.nn.Parameter(x) for x in leaves], None, {}, rtol=0, atol=1e-12)


# dropout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_with_dropout_scores_of_half_precision_are_as_exact_as_torchs(dtype: torch.dtype) -> None:
    shape = (1, 2, 64, 64)
    leaves = [(3 * x).detach().to(dtype) for x in draw(Call(shape, shape, shape), torch.float32)[0]]
    truth = theirs(*(x.double() for x in leaves))
    ours, expected = ((f(*leaves, dropout_p=1e-12).double() - truth).square().mean().sqrt() for f in (sdpa, theirs))
    assert ours <= 2 * expected
    large = torch.full((1, 1, 4, 64), 40.0, dtype=dtype, device=DEVICE)
    torch.testing.assert_close(sdpa(large, large, leaves[2][:1, :1, :4], dropout_p=1e-12), theirs(large, large, leaves[2][:1, :1, :4]))


@pytest.mark.parametrize("mask", [None, "given"])
def test_dropout_zeroes_its_share_of_weights_and_scales_the_others(mask: str | None) -> None:
    (query, key, _), given = draw(Call((4, 8, 32, 8), (4, 8, 32, 8), (4, 8, 32, 8), mask=(32, 32), kind="additive"), torch.float64)
    given = given if mask else None
    eye = torch.eye(32, dtype=torch.float64, device=DEVICE)
    weights = sdpa(query, key, eye, given)
    torch.manual_seed(1)
    dropped = sdpa(query, key, eye, given, 0.25)
    fallen = dropped == 0
    torch.testing.assert_close(dropped, weights.masked_fill(fallen, 0) / 0.75, rtol=0, atol=1e-12)
    assert abs(fallen.double().mean().item() - 0.25) < 0.01  # four standard deviations of 32768 draws
    torch.manual_seed(1)
    assert torch.equal(sdpa(query, key, eye, given, 0.25), dropped)
    assert not torch.equal(sdpa(query, key, eye, given, 0.25), dropped)


def test_dropout_has_the_gradient_of_what_it_computed() -> None:
    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        out: Tensor = sdpa(*tensors, dropout_p=0.5)
        return out

    assert torch.autograd.gradcheck(call, draw(Call((5, 4), (6, 4), (6, 4)), torch.float64)[0])


def test_dropout_of_everything_leaves_zeros() -> None:
    assert_as_torch(*draw(CALLS["plain"], torch.float64), {"dropout_p": 1.0})


# what is refused


def wrong(argument: str, said: str, error: type[Exception] = ArgumentError, **changes: Any) -> Any:
    return pytest.param(argument, said, error, changes, id=f"{argument} {said}")


@pytest.mark.parametrize(
    ("argument", "said", "error", "changes"),
    [
        wrong("is_causal", "beside an attn_mask", attn_mask=torch.zeros(5, 7), is_causal=True),
        wrong("is_causal", "is 1; allowed: True, False", TypeError, is_causal=1),
        wrong("attn_mask", "has dtype torch.int64", TypeError, attn_mask=torch.ones(5, 7, dtype=torch.int64)),
        wrong("attn_mask", "has dtype torch.float16", TypeError, attn_mask=torch.ones(5, 7).half()),
        wrong("attn_mask", "is a list", TypeError, attn_mask=[[True]]),
        wrong("attn_mask", r"has shape \(7,\)", attn_mask=torch.zeros(7)),
        wrong("attn_mask", r"has shape \(1, 2, 3, 5, 7\)", attn_mask=torch.zeros(1, 2, 3, 5, 7)),
        wrong("attn_mask", r"has shape \(2, 2, 5, 7\)", attn_mask=torch.zeros(2, 2, 5, 7)),
        wrong("attn_mask", r"has leading sizes \(3, 1\)", query=torch.ones(2, 1, 3, 5, 8), attn_mask=torch.zeros(3, 1, 1, 5, 7)),
        wrong("key", r"has leading sizes \(2, 2\).*enable_gqa", query=torch.ones(2, 4, 5, 8), key=torch.ones(2, 2, 7, 8)),
        wrong("key", "has 3 heads", query=torch.ones(2, 4, 5, 8), enable_gqa=True),
        wrong("value", "g = 1", key=torch.ones(2, 1, 7, 8), enable_gqa=True),
        wrong("query", r"has shape \(5, 8\); allowed: dimensions from 3", query=torch.ones(5, 8), enable_gqa=True),
        wrong("query", r"has shape \(8,\); allowed: dimensions from 2", query=torch.ones(8)),
        wrong("key", r"has shape \(2, 3, 7, 6\)", key=torch.ones(2, 3, 7, 6)),
        wrong("value", r"has shape \(2, 3, 6, 8\)", value=torch.ones(2, 3, 6, 8)),
        wrong("key", "has dtype torch.float64", TypeError, key=torch.ones(2, 3, 7, 8).double()),
        wrong("query", "has dtype torch.int32", TypeError, query=torch.ones(2, 3, 5, 8).int()),
        wrong("query", "is a nested tensor", TypeError, query=torch.nested.nested_tensor([torch.ones(3, 5, 8)], layout=torch.jagged)),
        wrong("value", "is a nested tensor", TypeError, value=torch.nested.nested_tensor([torch.ones(3, 7, 8)], layout=torch.jagged)),
        wrong("value", "is a NoneType", TypeError, value=None),
        wrong("query", "has width 0", query=torch.ones(2, 3, 5, 0), key=torch.ones(2, 3, 7, 0)),
        wrong("dropout_p", "is 1.5", dropout_p=1.5),
        wrong("dropout_p", "is -0.1", dropout_p=-0.1),
        wrong("dropout_p", "is nan", dropout_p=float("nan")),
        wrong("dropout_p", "is '0.1'", TypeError, dropout_p="0.1"),
        wrong("dropout_p", "is 2", dropout_p=2, attn_mask=torch.zeros(5, 7)),
        wrong("scale", "is inf", scale=float("inf")),
        wrong("scale", "is '1'", TypeError, scale="1", attn_mask=torch.zeros(5, 7)),
    ],
)
def test_a_wrong_argument_is_named_as_torch_names_it(argument: str, said: str, error: type[Exception], changes: dict[str, Any]) -> None:
    leaves, _ = draw(CALLS["plain"], torch.float32)
    given = {**dict(zip(("query", "key", "value"), leaves, strict=True)), **changes}
    given = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in given.items()}
    with pytest.raises(ArgumentError, match=rf"^scaled_dot_product_attention: {argument} .*{said}") as raised:
        sdpa(**given)
    assert raised.value.argument == argument
    assert isinstance(raised.value, error)


def test_scale_is_no_positional_argument() -> None:
    leaves, _ = draw(CALLS["plain"], torch.float32)
    with pytest.raises(TypeError, match="positional"):
        sdpa(*leaves, None, 0.0, False, 0.5)


# how


@pytest.mark.parametrize("name", ["query batch broadcasts", "key heads broadcast", "3 dimensions broadcast", "grouped heads, 3 dimensions"])
def test_nothing_is_copied_to_broadcast_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    run = module.attention  # type: ignore[attr-defined]

    def watch(*tensors: Tensor, **options: Any) -> Any:
        seen.extend(tensors)
        return run(*tensors, **options)

    monkeypatch.setattr(module, "attention", watch)
    leaves, mask = draw(CALLS[name], torch.float32)
    sdpa(*leaves, mask, **CALLS[name].options)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in leaves]


@pytest.mark.parametrize("backend", ["portable", "triton"])
@pytest.mark.parametrize("name", ["plain", "causal, more keys: from the top left", "boolean mask of keys in 5 dimensions"])
def test_it_compiles_in_one_graph(name: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    compiled: Any = torch.compile(sdpa, backend="aot_eager", fullgraph=True)
    call = CALLS[name]
    leaves, mask = draw(call, torch.float32)
    with use_backend(backend):
        ours = results(compiled, leaves, mask, **call.options)
        for found, expected in zip(ours, results(theirs, leaves, mask, **call.options), strict=True):
            torch.testing.assert_close(found, expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves, mask, **call.options), ours[0])


@pytest.mark.parametrize("name", ["plain", "grouped heads", "3 dimensions broadcast"])
def test_it_maps(name: str) -> None:
    pytest.importorskip("triton")
    call = CALLS[name]
    leaves, _ = draw(call, torch.float32)
    stacked = [torch.stack((x, 2 * x)).detach() for x in leaves]
    with use_backend("triton"):
        mapped = torch.func.vmap(lambda *t: sdpa(*t, **call.options))(*stacked)
    torch.testing.assert_close(mapped[1], theirs(*(2 * x for x in leaves), **call.options))


@pytest.mark.parametrize(("items", "keys"), [(1, 0), (0, 7)])
def test_a_mask_of_nothing_beside_grouped_heads(items: int, keys: int) -> None:
    """What decoding begins with: an empty cache."""
    query, key = torch.randn(items, 4, 1, 16), torch.randn(items, 2, keys, 16)
    mask = torch.ones(1, 1, 1, keys, dtype=torch.bool)
    with use_backend("triton"):
        found = sdpa(query, key, key, mask, enable_gqa=True)
    assert torch.equal(found, torch.zeros(items, 4, 1, 16))
