"""Wrong calls: each is refused by name, with what came and what is allowed, before anything is allocated. And right calls at the limits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import triton_attn
from triton_attn import CATALOG, ArgumentError, Unsupported, arguments, attention, device, dispatch, use_backend
from triton_attn.arguments import ArgumentTypeError
from triton_attn.testing import inputs, numerics

ROW = CATALOG["attention"]


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names every operator that makes a tensor with storage of its own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(returned.type, torch.TensorType) and returned.alias_info is None for returned in func._schema.returns):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def values(b: int = 2, h: int = 4, length: int = 5, width: int = 8, **how: Any) -> Tensor:
    return torch.zeros(b, h, length, width, **how)


def everything(**how: Any) -> dict[str, Any]:
    return {name: values(**how) for name in ("query", "key", "value")}


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        return torch.nested.nested_tensor([torch.zeros(4, 5, 8), torch.zeros(4, 3, 8)], layout=layout)


def sparse_rows() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # and so is this layout
        return torch.zeros(5, 8).to_sparse_csr()


def boolean(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


@dataclass(frozen=True)
class Wrong:
    """What differs from a right call, and what the error must say."""

    change: Callable[[], dict[str, Any]]
    argument: str
    came: str
    allowed: str
    error: type[Exception] = ArgumentError
    backend: str = "auto"


TYPE = ArgumentTypeError
WRONG = {
    "a list instead of a tensor": Wrong(lambda: {"query": [[[[0.0]]]]}, "query", "list", "torch.Tensor", TYPE),
    "None instead of a tensor": Wrong(lambda: {"value": None}, "value", "NoneType", "torch.Tensor", TYPE),
    "an array instead of a tensor": Wrong(lambda: {"key": values().numpy()}, "key", "ndarray", "torch.Tensor", TYPE),
    "a list as mask": Wrong(lambda: {"mask": [True]}, "mask", "list", "torch.Tensor", TYPE),
    "integers": Wrong(lambda: {"query": values(dtype=torch.int64)}, "query", "torch.int64", "torch.float16", TYPE),
    "complex numbers": Wrong(lambda: {"query": values(dtype=torch.complex64)}, "query", "torch.complex64", "torch.float16", TYPE),
    "booleans": Wrong(lambda: {"query": values(dtype=torch.bool)}, "query", "torch.bool", "torch.float16", TYPE),
    "eight-bit floats": Wrong(lambda: {"query": values().to(torch.float8_e5m2)}, "query", "torch.float8_e5m2", "torch.float16", TYPE),
    "key of another dtype": Wrong(lambda: {"key": values(dtype=torch.float16)}, "key", "torch.float16", "query has torch.float32", TYPE),
    "value of another dtype": Wrong(
        lambda: {"value": values(dtype=torch.float64)}, "value", "torch.float64", "query has torch.float32", TYPE
    ),
    "key elsewhere": Wrong(lambda: {"key": values(device="meta")}, "key", "meta", "query on cpu"),
    "mask elsewhere": Wrong(lambda: {"mask": boolean(5, 5).to("meta")}, "mask", "meta", "query on cpu"),
    "padding elsewhere": Wrong(lambda: {"key_padding_mask": boolean(2, 5).to("meta")}, "key_padding_mask", "meta", "query on cpu"),
    "nested, strided": Wrong(lambda: {"query": nested(torch.strided)}, "query", "nested", "dense", TYPE),
    "nested, jagged": Wrong(lambda: {"key": nested(torch.jagged)}, "key", "nested", "dense", TYPE),
    "sparse": Wrong(lambda: {"query": values().to_sparse()}, "query", "sparse_coo", "dense", TYPE),
    "sparse rows as mask": Wrong(lambda: {"mask": sparse_rows()}, "mask", "sparse_csr", "dense", TYPE),
    "of oneDNN": Wrong(lambda: {"value": values().to_mkldnn()}, "value", "mkldnn", "dense", TYPE),
    "three axes": Wrong(lambda: {"query": torch.zeros(4, 5, 8)}, "query", "(4, 5, 8)", "'b h m d'"),
    "five axes": Wrong(lambda: {"value": torch.zeros(1, 2, 4, 5, 8)}, "value", "(1, 2, 4, 5, 8)", "'b g n e'"),
    "no axes": Wrong(lambda: {"key": torch.tensor(1.0)}, "key", "()", "'b g n d'"),
    "heads that do not divide": Wrong(lambda: {"key": values(h=3), "value": values(h=3)}, "key", "3 heads", "query's 4"),
    "more key heads than query heads": Wrong(lambda: {"key": values(h=8), "value": values(h=8)}, "key", "8 heads", "query's 4"),
    "no key heads": Wrong(lambda: {"key": values(h=0), "value": values(h=0)}, "key", "0 heads", "query's 4"),
    "value of other heads": Wrong(lambda: {"value": values(h=2)}, "value", "(2, 2, 5, 8)", "g = 4"),
    "width 0": Wrong(lambda: {"query": values(width=0), "key": values(width=0)}, "query", "width 0", "1 or more"),
    "value width 0": Wrong(lambda: {"value": values(width=0)}, "value", "width 0", "1 or more"),
    "key of another width": Wrong(lambda: {"key": values(width=9)}, "key", "(2, 4, 5, 9)", "d = 8"),
    "value of another length": Wrong(lambda: {"value": values(length=6)}, "value", "(2, 4, 6, 8)", "n = 5"),
    "key of another batch": Wrong(lambda: {"key": values(b=1)}, "key", "(1, 4, 5, 8)", "b = 2"),
    "value of another batch": Wrong(lambda: {"value": values(b=3)}, "value", "(3, 4, 5, 8)", "b = 2"),
    "mask too long": Wrong(lambda: {"mask": boolean(5, 6)}, "mask", "(5, 6)", "(2, 4, 5, 5)"),
    "mask of other heads": Wrong(lambda: {"mask": boolean(2, 5, 5)}, "mask", "(2, 5, 5)", "(2, 4, 5, 5)"),
    "mask of five axes": Wrong(lambda: {"mask": boolean(1, 2, 4, 5, 5)}, "mask", "(1, 2, 4, 5, 5)", "(2, 4, 5, 5)"),
    "mask of integers": Wrong(lambda: {"mask": boolean(5, 5).int()}, "mask", "torch.int32", "torch.bool, torch.float32", TYPE),
    "mask of another float": Wrong(lambda: {"mask": boolean(5, 5).half()}, "mask", "torch.float16", "torch.bool, torch.float32", TYPE),
    "padding of the queries": Wrong(
        lambda: {"query": values(length=6), "key_padding_mask": boolean(2, 6)}, "key_padding_mask", "(2, 6)", "n = 5"
    ),
    "padding without a batch": Wrong(lambda: {"key_padding_mask": boolean(5)}, "key_padding_mask", "(5,)", "'b n'"),
    "padding of floats": Wrong(lambda: {"key_padding_mask": torch.zeros(2, 5)}, "key_padding_mask", "torch.float32", "torch.bool", TYPE),
    "causal with unequal lengths": Wrong(
        lambda: {"query": values(length=3), "causal": True}, "causal", "3 queries and 5 keys", "'top_left' or 'bottom_right'"
    ),
    "scale not a number": Wrong(lambda: {"scale": math.nan}, "scale", "nan", "finite"),
    "scale infinite": Wrong(lambda: {"scale": -math.inf}, "scale", "-inf", "finite"),
    "scale a text": Wrong(lambda: {"scale": "0.1"}, "scale", "0.1", "finite", TYPE),
    "dropout below 0": Wrong(lambda: {"dropout_p": -0.1}, "dropout_p", "-0.1", "0 to 1"),
    "dropout above 1": Wrong(lambda: {"dropout_p": 1.1}, "dropout_p", "1.1", "0 to 1"),
    "dropout not a number": Wrong(lambda: {"dropout_p": math.nan}, "dropout_p", "nan", "0 to 1"),
    "dropout a text": Wrong(lambda: {"dropout_p": "0.1"}, "dropout_p", "0.1", "0 to 1", TYPE),
    "dropout None": Wrong(lambda: {"dropout_p": None}, "dropout_p", "None", "0 to 1", TYPE),
    "a kernel for float64": Wrong(
        lambda: everything(dtype=torch.float64), "query", "torch.float64", "float16, bfloat16 and float32", Unsupported, "triton"
    ),
    "a kernel for float64, with dropout": Wrong(
        lambda: everything(dtype=torch.float64) | {"dropout_p": 0.1}, "query", "torch.float64", "float16", Unsupported, "triton"
    ),
    "a kernel on a device without one": Wrong(lambda: everything(device="meta"), "query", "meta", "CUDA", Unsupported, "triton"),
    "a kernel for a mask that requires a gradient": Wrong(
        lambda: {"mask": torch.zeros(5, 5, requires_grad=True)}, "mask", "requires a gradient", "no kernel", Unsupported, "triton"
    ),
}
# bool is an int, and 1 == True: an alignment must not be taken from a number by accident
for other in ("nonsense", "", "True", None, 0, 1, 2, 1.0, ["top_left"]):
    WRONG[f"causal={other!r}"] = Wrong(lambda other=other: {"causal": other}, "causal", repr(other), "'top_left', 'bottom_right'")  # type: ignore[misc]


def refusal(call: Callable[[], object], error: type[Exception]) -> Exception:
    """The error of a call, which must have allocated nothing and drawn no random number."""
    before = torch.get_rng_state()
    with Allocations() as allocations, pytest.raises(error) as refused:
        call()
    assert allocations.seen == []
    assert torch.equal(torch.get_rng_state(), before)
    return refused.value


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_call_is_refused_by_name_before_anything_is_allocated(wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreting", lambda: True)
    call: dict[str, Any] = everything() | wrong.change()
    with use_backend(wrong.backend):
        error = refusal(lambda: attention(**call), wrong.error)
    text = str(error)
    assert text.startswith("attention: ")
    assert wrong.argument in text
    assert wrong.came in text
    assert wrong.allowed in text
    if isinstance(error, ArgumentError):
        assert error.argument == wrong.argument
        assert text.startswith(f"attention: {wrong.argument} ")
        # who catches torch's own errors catches ours
        assert isinstance(error, TypeError if wrong.error is TYPE else ValueError)


def test_the_call_that_the_wrong_ones_differ_from_is_right() -> None:
    assert attention(**everything()).shape == (2, 4, 5, 8)


def test_every_argument_is_refused_by_name_at_least_once() -> None:
    named = {wrong.argument for wrong in WRONG.values()}
    assert named >= {*ROW.inputs, *ROW.options} - {"seed"}


def test_a_wrong_call_under_autocast_is_refused_before_anything_is_cast() -> None:
    q, longer = values(), values(length=6)
    with torch.autocast("cpu", torch.bfloat16):
        assert "n = 5" in str(refusal(lambda: attention(q, q, longer), ArgumentError))


def test_a_kernel_on_a_cpu_without_the_interpreter_is_refused_and_the_way_to_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreting", lambda: False)
    q = values()
    with use_backend("triton"):
        error = refusal(lambda: attention(q, q, q), Unsupported)
    assert "query is on cpu" in str(error)
    assert "TRITON_INTERPRET=1" in str(error)


@pytest.mark.parametrize("unknown", ["cuda", "", "Triton", None, 1, ["auto"]])
def test_an_unknown_backend_is_refused_with_the_known_ones(unknown: Any) -> None:
    error = refusal(lambda: use_backend(unknown), ArgumentError)
    assert isinstance(error, ArgumentError)
    assert error.argument == "backend"
    assert repr(unknown) in str(error)
    assert ", ".join(dispatch.BACKENDS) in str(error)


def test_an_unknown_backend_in_the_environment_is_refused_by_the_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DEFAULT_BACKEND", "cuda")
    q = values()
    text = str(refusal(lambda: attention(q, q, q), ArgumentError))
    assert "'cuda'" in text
    assert ", ".join(dispatch.BACKENDS) in text
    assert "TRITON_ATTN_BACKEND" in text


# right calls at the limits: (b, h, g, m, n, d, e), options

LIMITS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "no item": ((0, 2, 1, 3, 4, 8, 8), {}),
    "no query": ((1, 2, 1, 0, 4, 8, 8), {}),
    "no key": ((1, 2, 1, 3, 0, 8, 8), {}),
    "neither": ((1, 2, 1, 0, 0, 8, 8), {}),
    "no head": ((1, 0, 0, 3, 4, 8, 8), {}),
    "no query head": ((1, 0, 2, 3, 4, 8, 8), {}),
    "no key, from the bottom right": ((1, 2, 1, 3, 0, 8, 8), {"causal": "bottom_right"}),
    "one of everything": ((1, 1, 1, 1, 1, 1, 1), {}),
    "width 256": ((1, 1, 1, 2, 3, 256, 256), {}),
    "no kernel's width": ((1, 2, 1, 3, 4, 257, 300), {}),
    "value wider": ((1, 2, 2, 3, 4, 1, 256), {}),
    "value narrower": ((1, 2, 2, 3, 4, 256, 1), {}),
    "no power of two": ((2, 6, 3, 7, 5, 13, 11), {}),
    "one key head": ((1, 5, 1, 3, 4, 8, 8), {}),
    "top left with fewer keys": ((1, 2, 1, 5, 3, 8, 8), {"causal": "top_left"}),
    "bottom right with fewer keys": ((1, 2, 1, 5, 3, 8, 8), {"causal": "bottom_right"}),
    "everything dropped": ((1, 2, 1, 3, 4, 8, 8), {"dropout_p": 1.0}),
    "scale 0": ((1, 2, 1, 3, 4, 8, 8), {"scale": 0.0}),
    "scale negative": ((1, 2, 1, 3, 4, 8, 8), {"scale": -1.0}),
}


@pytest.mark.parametrize("backend", ["auto", "triton", "portable", "reference"])
@pytest.mark.parametrize(("sizes", "options"), LIMITS.values(), ids=LIMITS.keys())
def test_a_call_at_the_limits_gives_what_the_definition_gives(sizes: tuple[int, ...], options: dict[str, Any], backend: str) -> None:
    if backend == "triton" and not device.interpreting():
        pytest.skip("needs the interpreter: TRITON_INTERPRET=1")
    named = dict(zip("bhgmnde", sizes, strict=True))
    q, k, v = (torch.randn(inputs.shape(ROW.inputs[name].axes, named)) for name in ("query", "key", "value"))
    with use_backend(backend):
        out, lse = attention(q, k, v, **options, return_lse=True)
        alone = attention(q, k, v, **options)
    wide = [x.double() for x in (q, k, v)]
    truth = ROW.reference(*wide, **options, return_lse=True, seed=torch.tensor(0))
    size = {"out": truth[0], "lse": truth[1]}
    if truth[0].numel():
        size = ROW.bound(*wide, torch.zeros_like(truth[0]), **options, seed=torch.tensor(0))
    found = {"out": out, "lse": lse, "out alone": alone}
    judged = [numerics.compare(name, x, truth[name == "lse"], size[name[:3]], dtype=torch.float32) for name, x in found.items()]
    numerics.assert_right(judged)
    assert (out.dtype, lse.dtype, alone.dtype) == (torch.float32,) * 3


@pytest.mark.parametrize("shape", [(), (5,), (3, 1), (3, 5), (4, 1, 5), (2, 1, 3, 5), (1, 1, 1, 1), (2, 4, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_mask_of_every_shape_that_broadcasts_is_the_mask_it_broadcasts_to(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    drawn = torch.randn(shape)
    mask = drawn > 0 if dtype == torch.bool else drawn
    assert torch.equal(attention(q, k, v, mask=mask), attention(q, k, v, mask=mask.expand(2, 4, 3, 5)))


@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
def test_with_equal_lengths_every_causal_alignment_is_one(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    with use_backend(backend):
        results = [attention(q, k, v, causal=causal) for causal in (True, "top_left", "bottom_right")]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert not torch.equal(results[0], attention(q, k, v))


def test_a_call_on_the_meta_device_gives_shapes() -> None:
    out, lse = attention(**everything(device="meta"), return_lse=True)
    assert (out.device.type, out.shape, lse.shape, lse.dtype) == ("meta", (2, 4, 5, 8), (2, 4, 5), torch.float32)


def test_the_public_errors_are_catchable_by_torchs_own_names() -> None:
    assert issubclass(triton_attn.ArgumentError, ValueError)
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(triton_attn.Unsupported, NotImplementedError)


def test_a_call_that_passed_vouches_for_none_that_differs_in_what_is_checked() -> None:
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    attention(query, key, key)
    attention(query, key, key, mask=torch.ones(3, 5, dtype=torch.bool))
    wrong: list[dict[str, Any]] = [
        {"key": key.half()},
        {"value": key.to("meta")},
        {"value": key[:, :, :4]},
        {"key": key.to_sparse()},
        {"mask": torch.ones(3, 5, dtype=torch.int32)},
        {"mask": torch.ones(5, 3, dtype=torch.bool)},
    ]
    for change in wrong:
        with pytest.raises(ArgumentError):
            attention(**{"query": query, "key": key, "value": key, **change})
    with torch.autocast("cpu", torch.bfloat16):  # casts both
        attention(query, key.half(), key)
    with pytest.raises(ArgumentError):
        attention(query, key.half(), key)


def test_no_more_calls_are_remembered_than_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_passed", {})
    monkeypatch.setattr(arguments, "MOST_PASSED", 3)
    for length in range(1, 8):
        attention(*(torch.randn(1, 1, length, 8) for _ in range(3)))
        assert len(arguments._passed) <= 3
