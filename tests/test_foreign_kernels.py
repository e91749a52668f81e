"""Kernels that nobody here wrote, from liger-kernel and fla-core, through their own launchers in the strict interpreter.

`make test-foreign` installs both libraries and runs this file; without them it skips. `HARMLESS` holds calls that must raise no alarm
and agree with their definition in float64, forward and backward. The tests after it hold what the interpreter found, and why it is right.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn.testing import strict_interpreter
from triton_attn.testing.interpreter import IntegerOverflow, OutOfBounds, Race

pytestmark = pytest.mark.slow

DTYPES = FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
IEEE, TF32 = (3e-6, 3e-3, 2e-2), (5e-3, 3e-3, 2e-2)
"""Bounds on rms(kernel - float64) / rms(float64) in each dtype, loose: what raises no alarm and yet is wrong is grossly wrong."""


@dataclass(frozen=True)
class Kernel:
    name: str
    module: str
    call: Callable[..., Any]
    """(module, *inputs) -> tensor or tensors."""
    reference: Callable[..., Any]
    inputs: Callable[[], Sequence[Tensor]]
    bound: tuple[float, float, float] = IEEE
    dtypes: tuple[torch.dtype, ...] = DTYPES
    poison: bool = True
    processors: int = 3
    """How many multiprocessors fla's launchers see; they start as many programs."""


def library(module: str) -> Any:
    """The module, or a skip where its library is not installed. Both libraries warn on a machine without a GPU."""
    pytest.importorskip(module.split(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(module)


def with_processors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and hasattr(module, "get_multiprocessor_count"):
            monkeypatch.setattr(module, "get_multiprocessor_count", lambda *_: count)


# ---- inputs


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def fixed(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def log_gate(*shape: int) -> Tensor:
    return F.logsigmoid(fixed(*shape)).requires_grad_()


def unit(*shape: int) -> Tensor:
    return F.normalize(fixed(*shape), dim=-1).requires_grad_()


def share(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64).requires_grad_()


def placed(x: Tensor, dtype: torch.dtype, strided: bool) -> Tensor:
    """The tensor in this dtype; strided: as a view of NaN, rows apart, its start off by one element, vectors with stride 2."""
    if not x.is_floating_point():
        return x
    *rows, columns = x.shape
    if strided and rows:
        place = torch.full((*rows, columns + 3), torch.nan, dtype=dtype)[..., 1 : columns + 1]
    elif strided:
        place = torch.full((2 * columns,), torch.nan, dtype=dtype)[::2]
    else:
        place = torch.empty(x.shape, dtype=dtype)
    return place.copy_(x.detach()).requires_grad_(x.requires_grad)


def gradient(like: Tensor, strided: bool) -> Tensor:
    """strided: one row for all rows, as a sum over them hands it back."""
    return torch.randn(like.shape[-1:] if strided else like.shape, dtype=like.dtype).expand(like.shape)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).square().mean() / wanted.square().mean()).sqrt().detach())


# ---- definitions


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w, 1e-5)


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def angles(length: int, width: int) -> tuple[Tensor, Tensor]:
    turns = torch.outer(torch.arange(length, dtype=torch.float64), 0.3 ** torch.arange(width // 2)).repeat(1, 2)
    return turns.cos(), turns.sin()


def neighborhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    apart = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, (apart.abs() <= 4) & (apart % 2 == 0))


def mixture(x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, choice: Tensor) -> Tensor:
    gate, up = torch.einsum("ti,tkhi->tkh", x, gate_up[choice]).chunk(2, -1)
    return torch.einsum("tk,tkh,tkih->ti", weight, F.silu(gate) * up, down[choice])


def convolved(x: Tensor, w: Tensor, b: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    start = x.new_zeros(x.shape[0], x.shape[2], w.shape[1] - 1) if before is None else before[..., 1:]
    return F.conv1d(torch.cat([start, x.mT], -1), w[:, None], b, groups=x.shape[2]).mT


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
    """Linear attention step by step: the state decays by exp(g), one number per head or per key; with beta, the delta rule."""
    state, outs = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * (g[:, t].exp()[..., None] if g.ndim == 4 else g[:, t].exp()[..., None, None])
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None] * (new - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, ..., None] * new[..., None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, state))
    return torch.stack(outs, 1)


def attended(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
    """Causal attention, with forget gates added to the scores where there are any."""
    bias = torch.full((q.shape[1],) * 2, -torch.inf, dtype=q.dtype).triu(1)
    bias = bias if g is None else bias + g.cumsum(1).mT[..., :, None] - g.cumsum(1).mT[..., None, :]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias).transpose(1, 2)


def each_sequence(definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apart(*inputs: Tensor) -> Tensor:
        return torch.cat([definition(*(x[:, i:j] for x in inputs)) for i, j in pairwise(BOUNDARIES)], 1)

    return apart


BOUNDARIES = torch.tensor([0, 5, 13, 70])
TARGET = torch.tensor([3, -100, 0, 36, 7, 7])
EXPERTS = torch.tensor([[0, 1], [1, 4], [4, 0], [2, 1], [1, 0], [2, 4], [4, 2]])  # of five, 3 gets no token


def qkv(length: int, batch: int = 1, width: int = 18) -> tuple[Tensor, Tensor, Tensor]:
    return draw(batch, length, 2, width), draw(batch, length, 2, width), draw(batch, length, 2, 20)


def halves(*count: int) -> Callable[[], list[Tensor]]:
    return lambda: [draw(3, 5, 37) for _ in range(*count)]


def normed(*vectors: int) -> Callable[[], list[Tensor]]:
    return lambda: [draw(3, 7, 37), *(draw(width) for width in vectors)]


def simple_gla(name: str, bound: tuple[float, float, float] = TF32, **options: Any) -> Kernel:
    """One recurrence, computed in five ways."""
    return Kernel(
        name + ", packed" * bool(options),
        "fla.ops",
        lambda m, *x: getattr(m, name)(*x, **options)[0],
        each_sequence(recurrent) if options else recurrent,
        lambda: [*qkv(70), log_gate(1, 70, 2)],
        bound,
    )


L = "liger_kernel.ops"
HARMLESS = [
    Kernel("layer_norm", L, lambda m, x, w, b: m.LigerLayerNormFunction.apply(x, w, b, 1e-5), layer_norm, normed(37, 37)),
    Kernel("rms_norm", L, lambda m, x, w: m.LigerRMSNormFunction.apply(x, w, 1e-5, 0.0, "llama", False), rms_norm, normed(37)),
    Kernel(
        "group_norm",
        L,
        lambda m, x, w, b: m.LigerGroupNormFunction.apply(x, w, b, 6, 3, 1e-5),
        lambda x, w, b: F.group_norm(x, 3, w, b, 1e-5),
        lambda: [draw(2, 6, 5, 9), draw(6), draw(6)],
    ),
    Kernel("softmax", L, lambda m, x: m.LigerSoftmaxFunction.apply(x), lambda x: x.softmax(-1), normed()),
    Kernel("geglu", L, lambda m, a, b: m.LigerGELUMulFunction.apply(a, b), lambda a, b: F.gelu(a, approximate="tanh") * b, halves(2)),
    Kernel("swiglu", L, lambda m, a, b: m.LigerSiLUMulFunction.apply(a, b), lambda a, b: F.silu(a) * b, halves(2)),
    Kernel(
        "rope, 3 query and 1 key head",
        L,
        lambda m, q, k, c, s: m.LigerRopeFunction.apply(q.clone(), k.clone(), c, s),  # it rotates in place
        lambda q, k, c, s: (rotated(q, c, s), rotated(k, c, s)),
        lambda: [draw(2, 3, 7, 24), draw(2, 1, 7, 24), *(x[None] for x in angles(7, 24))],
    ),
    Kernel(
        "cross_entropy, weighted, smoothed, capped",
        L,
        lambda m, x, w: m.LigerCrossEntropyFunction.apply(x.clone(), TARGET, w, -100, 0.0, 0.1, "mean", 3.0)[0],
        lambda x, w: F.cross_entropy(3 * torch.tanh(x / 3), TARGET, w, label_smoothing=0.1),
        lambda: [draw(6, 37), fixed(37).abs()],
    ),
    Kernel(
        "neighborhood attention",
        L,
        lambda m, q, k, v: m.LigerFusedNeighborhoodAttentionFunction.apply(q, k, v, 5, 2, None),
        neighborhood,
        lambda: [draw(1, 2, 21, 20) for _ in range(3)],
        bound=TF32,
    ),
    Kernel(
        "fused mixture of experts",
        L,
        lambda m, x, up, down, w: m.LigerFusedMoEFunction.apply(x, up, down, EXPERTS, w),
        lambda x, up, down, w: mixture(x, up, down, w, EXPERTS),
        lambda: [draw(7, 20), draw(5, 28, 20), draw(5, 20, 14), share(7, 2)],
        bound=TF32,
    ),
    # poison=False: see test_a_masked_lane_reaches_a_result
    Kernel("layer_norm", "fla.modules.norm.layernorm", lambda m, *x: m.layer_norm(*x), layer_norm, normed(37, 37), poison=False),
    Kernel(
        "rms_norm_gated",
        "fla.modules.norm.fused_norm_gate",
        lambda m, x, g, w: m.rms_norm_gated(x, g, w, None, eps=1e-5),
        lambda x, g, w: rms_norm(x, w) * F.silu(g),
        lambda: [draw(3, 7, 37), draw(3, 7, 37), draw(37)],
        poison=False,
        processors=1,  # test_two_programs_write_the_same_rows
    ),
    Kernel("logsigmoid", "fla.modules.activations.ops", lambda m, x: m.logsigmoid(x), F.logsigmoid, normed()),
    Kernel(
        "rotary, part of the head",
        "fla.modules.rotary.ops",
        lambda m, x, c, s: m.rotary_embedding(x, c[:, :10], s[:, :10]),
        lambda x, c, s: torch.cat([rotated(x[..., :20], c[:, None], s[:, None]), x[..., 20:]], -1),
        lambda: [draw(2, 21, 2, 24), *angles(21, 20)],
    ),
    Kernel(
        "causal_conv1d",
        "fla.modules.causal_conv1d.ops",
        lambda m, x, w, b: m.causal_conv1d(x, w, b, activation="silu")[0],
        lambda x, w, b: F.silu(convolved(x, w, b)),
        lambda: [draw(2, 70, 19), draw(19, 4), draw(19)],
    ),
    Kernel(
        "causal_conv1d with a state",
        "fla.modules.causal_conv1d.ops",
        lambda m, x, w, h: m.causal_conv1d(x, w, initial_state=h, output_final_state=True)[0],
        lambda x, w, h: convolved(x, w, before=h),
        lambda: [draw(2, 21, 19), draw(19, 4), draw(2, 19, 4)],
    ),
    Kernel(
        "cross_entropy",
        "fla.modules.fused_cross_entropy.ops",
        lambda m, x: m.cross_entropy_loss(x, TARGET, label_smoothing=0.1)[0],
        lambda x: F.cross_entropy(x, TARGET, label_smoothing=0.1, reduction="none"),
        lambda: [draw(6, 37)],
    ),
    simple_gla("chunk_simple_gla"),
    simple_gla("chunk_simple_gla", cu_seqlens=BOUNDARIES),
    simple_gla("fused_chunk_simple_gla"),
    simple_gla("parallel_simple_gla"),
    simple_gla("fused_recurrent_simple_gla", bound=IEEE),
    Kernel(
        "gla, chunks",
        "fla.ops",
        lambda m, *x: m.chunk_gla(*x)[0],
        recurrent,
        lambda: [*qkv(70), log_gate(1, 70, 2, 18)],
        bound=TF32,
    ),
    Kernel(
        "gated delta rule, chunks",
        "fla.ops",
        lambda m, q, k, v, g, b: m.chunk_gated_delta_rule(q, k, v, g=g, beta=b)[0],
        recurrent,
        lambda: [draw(1, 70, 2, 18), unit(1, 70, 2, 18), draw(1, 70, 2, 20), log_gate(1, 70, 2), share(1, 70, 2)],
        dtypes=(FP16, BF16),  # all that it takes
    ),
    Kernel("attention", "fla.ops.attn.parallel", lambda m, *x: m.parallel_attn(*x), attended, lambda: [*qkv(37, 2)], bound=TF32),
    Kernel(
        "forgetting", "fla.ops", lambda m, *x: m.parallel_forgetting_attn(*x), attended, lambda: [*qkv(37, 2), log_gate(2, 37, 2)], TF32
    ),
]


def cases() -> list[Any]:
    return [
        pytest.param(kernel, dtype, strided, id=f"{kernel.module[:3]} {kernel.name}-{str(dtype)[6:]}-{'strided' * strided or 'dense'}")
        for kernel in HARMLESS
        for dtype, strided in ((FP32, False), (FP32, True), (FP16, True), (BF16, False))
        if dtype in kernel.dtypes
    ]


@pytest.mark.parametrize(("kernel", "dtype", "strided"), cases())
def test_no_alarm_and_the_right_numbers(kernel: Kernel, dtype: torch.dtype, strided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = library(kernel.module)
    with_processors(monkeypatch, kernel.processors)
    inputs = [placed(x, dtype, strided) for x in kernel.inputs()]
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    wanted = as_tuple(kernel.reference(*exact))
    with strict_interpreter(order=7, poison=kernel.poison):
        found = as_tuple(kernel.call(module, *inputs))
        slopes = [gradient(x, strided) for x in found]
        torch.autograd.backward(wanted, [slope.double() for slope in slopes])
        torch.autograd.backward(found, slopes)
    gradients = [(torch.as_tensor(x.grad), torch.as_tensor(y.grad)) for x, y in zip(inputs, exact, strict=True) if x.requires_grad]
    errors = [error(x, y) for x, y in [*zip(found, wanted, strict=True), *gradients]]
    most = kernel.bound[DTYPES.index(dtype)]
    assert all(each <= most for each in errors), f"errors {errors}, of at most {most}"


# ---- what was found: memory and arithmetic that a GPU gets wrong without a word


OUT_OF_BOUNDS: dict[str, Callable[[Any], Any]] = {
    # these two get the weight's stride and never use it: they read what lies between its elements
    "strided weight of layer_norm_forward": lambda m: m.layer_norm_forward(torch.randn(5, 37), *torch.randn(2, 74)[:, ::2], 1e-5),
    "strided weight of rms_norm_forward": lambda m: m.rms_norm_forward(torch.randn(5, 37), torch.randn(74)[::2], 1e-5, 0.0, "llama", None),
    # one row stride, the result's, serves gate and up too: row 1 of the gate is read out of row 0 of up, inside the same storage
    "swiglu_forward of two halves": lambda m: m.swiglu_forward(*torch.randn(5, 74).chunk(2, -1)),
    "geglu_forward of two halves": lambda m: m.geglu_forward(*torch.randn(5, 74).chunk(2, -1)),
    # nothing compares the tables with the sequence: positions 6 and 7 are turned by what lies behind cos and sin
    "rope with short tables": lambda m: m.LigerRopeFunction.apply(*torch.randn(2, 1, 1, 8, 16), *torch.randn(2, 1, 6, 16)),
    # torch.nn.functional.embedding raises IndexError
    "embedding of -1": lambda m: m.LigerEmbeddingFunction.apply(torch.randn(37, 20), torch.tensor([0, -1])),
}


@pytest.mark.parametrize("what", OUT_OF_BOUNDS)
def test_reads_out_of_bounds_are_found(what: str) -> None:
    module = library(L)
    with strict_interpreter(), pytest.raises(OutOfBounds) as caught:
        OUT_OF_BOUNDS[what](module)
    assert caught.value.tensor


def test_two_programs_write_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla's gated norm splits 21 tokens among 3 programs, 7 each, but a program stores whole tiles of at least 16 rows, dx and dg both.

    Harmless as it stands, since both store the same numbers; its sibling, layer_norm_bwd_kernel, masks these rows off.
    """
    module = library("fla.modules.norm.fused_norm_gate")
    with_processors(monkeypatch, 3)
    x, g, w = (torch.randn(*shape, requires_grad=True) for shape in ((21, 37), (21, 37), (37,)))
    with strict_interpreter(), pytest.raises(Race) as caught:
        torch.autograd.grad(module.rms_norm_gated(x, g, w, None).sum(), x)
    assert caught.value.tensor == "dx"
    assert caught.value.index == 7 * 37


def test_group_norm_overflows_beyond_two_to_the_31() -> None:
    """liger multiplies an int32 program id by an int32 stride: a batch of more than 2**31 numbers is read from before its start."""
    module = library("liger_kernel.ops.group_norm")
    stride = 2**30
    x = torch.from_numpy(np.zeros(2 * stride + 8, np.float16)).as_strided((3, 1, 8), (stride, 8, 1))  # its pages are never touched
    y, one, statistic = torch.empty(3, 1, 8, dtype=FP16), torch.ones(1), torch.empty(3, 1)
    with strict_interpreter(bounds=False, races=False), pytest.raises(IntegerOverflow):
        module._group_norm_forward_kernel[(3, 1)](
            y, 8, 8, x, stride, 8, statistic, 1, 1, statistic.clone(), 1, 1, one, one, 8, 1, 1e-5, BLOCK_SIZE=8
        )  # fmt: skip


def block_rms_norm(module: Any) -> Tensor:
    """The gradient of the weight, by the kernel that liger takes from 32768 rows of at most 256 columns on."""
    x, dy, dx, w = torch.randn(21, 37), torch.randn(21, 37), torch.empty(21, 37), torch.ones(37)
    rstd, dw = torch.ones(21), torch.empty(2, 37)
    module._block_rms_norm_backward_kernel[(2,)](
        dy, 37, dx, 37, x, 37, module.torch_to_triton_dtype[FP32], w, 1, rstd, 1, dw, 37, 21, 37, 0.0, 0, True, BLOCK_SIZE=64, BLOCK_ROW=16
    )  # fmt: skip
    return dw


def slope(call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Tensor:
    """The gradient of the first input."""
    inputs = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    return torch.autograd.grad(call(*inputs).sum(), inputs[0])[0]


MASKED: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
    # a gradient: b_w = load(w, mask) times a dy of 0 goes into the row's sums
    "layer_norm, of x": ("fla.modules.norm.layernorm", lambda m: slope(m.layer_norm, (21, 37), (37,), (37,))),
    "layer_norm_gated, of x": ("fla.modules.norm.fused_norm_gate", lambda m: slope(m.layer_norm_gated, (21, 37), (21, 37), (37,), (37,))),
    # a result: b_g = load(g, mask) times an x of 0 goes into mean and variance
    "gate before norm": (
        "fla.modules.norm.layernorm_gated",
        lambda m: m.layernorm_fn(torch.randn(21, 37), torch.ones(37), None, z=torch.randn(21, 37), norm_before_gate=False),
    ),
    # b_dz = load(dz, mask) of rows past the end goes into a product with keys of 0
    "based attention, of k": (
        "fla.ops.based.parallel",
        lambda m: slope(lambda k, q: m.triton_parallel_based(q, k, torch.ones_like(q), 0.25)[0], (1, 2, 37, 16), (1, 2, 37, 16)),
    ),
    # rstd = load(rstd, mask) of rows past the end goes into the sum over rows
    "rms_norm, of its weight": ("liger_kernel.ops.rms_norm", block_rms_norm),
}


@pytest.mark.parametrize("what", MASKED)
def test_a_masked_lane_reaches_a_result(what: str) -> None:
    """A load without `other` leaves masked-off lanes undefined. NVIDIA's backend puts 0 there; times 0, that is right by luck."""
    name, call = MASKED[what]
    module = library(name)
    with strict_interpreter():
        assert call(module).isnan().any()
    with strict_interpreter(poison=False):
        assert call(module).isfinite().all()


def test_rope_turns_a_gradient_that_others_need() -> None:
    """No alarm, but a wrong number: liger's backward rotates the gradient where it lies, and a sum gives the same one to both its terms."""
    module = library(L)
    before, keys, w = (torch.randn(2, 1, 7, 24, requires_grad=grad) for grad in (True, True, False))
    with strict_interpreter():
        other = before * 2
        turned = module.LigerRopeFunction.apply(torch.randn(2, 3, 7, 24), keys.clone(), *torch.rand(2, 1, 7, 24))[1]
        found = torch.autograd.grad(((turned + other) * w).sum(), (before, keys))[0]
    assert error(found, 2 * w.double()) > 0.1
