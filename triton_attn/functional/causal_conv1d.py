"""The short causal convolution before a scan: the public calls and their row."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.arguments import ArgumentError
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Law, Mechanism, Options, Output, Sizes, Work
from triton_attn.portable.causal_conv1d import causal_conv1d as portable
from triton_attn.reference.causal_conv1d import bound
from triton_attn.reference.causal_conv1d import causal_conv1d as reference

NARROWEST, WIDEST = 2, 4


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Any:
    """A convolution of every channel by itself with its last few steps: out_t = act(bias + sum_i weight_i x_{t - (K - 1) + i}).

    Steps before the first are the initial states, or 0. Sums are in float32. Cost O(B D L K).

    Args:
        x: (B, D, L), float16, bfloat16, float32 or float64. Any strides, channels last among them; nothing is copied for them.
        weight: (D, K), float32 or x's dtype; K from 2 to 4. The last column is the step's own.
        bias: (D,), float32 or x's dtype.
        activation: None, "silu" or "swish", its other name.
        initial_states: (B, D, K - 1), float32 or x's dtype: the steps before the first.
        seq_idx: (B, L) int32 or int64: a step sees only steps of its own number, as packed sequences need it.
        return_final_states: also return the last K - 1 steps of what came before and x.

    Returns:
        As x, in its dtype and order in memory; with return_final_states also (B, D, K - 1) in x's dtype, differentiable.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: Gu and Dao, "Mamba", 2023, section 3.4; the causal_conv1d package.
    """
    tensors = {"x": x, "weight": weight, "bias": bias, "initial_states": initial_states, "seq_idx": seq_idx}
    if activation is not None:
        arguments.choice(ROW, "activation", activation, ("silu", "swish"))
    sizes = arguments.check(ROW, tensors)
    arguments.within(ROW, "weight", "width", sizes["k"], NARROWEST, WIDEST)
    if initial_states is not None:
        if sizes["j"] != sizes["k"] - 1:
            shape = tuple(initial_states.shape)
            raise ArgumentError(ROW.name, "initial_states", f"has shape {shape}; allowed: {sizes['k'] - 1} steps, one less than weight")
        if seq_idx is not None:
            raise ArgumentError(ROW.name, "initial_states", "is given with seq_idx; allowed: one of the two")
    options = {"activation": activation and "silu"}
    return operators.run(ROW, tensors, options, arguments.flag(ROW, "return_final_states", return_final_states))


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """`causal_conv1d` under the causal_conv1d package's name, with its arguments in its order.

    final_states_out, (B, D, K - 1), is filled with the final states and returned in their place.
    """
    returned = causal_conv1d(
        x, weight, bias, activation, initial_states=initial_states, seq_idx=seq_idx, return_final_states=return_final_states
    )
    if final_states_out is None:
        return returned
    if not return_final_states:
        raise ArgumentError("causal_conv1d_fn", "final_states_out", "is given; allowed without return_final_states: None")
    out, final = returned
    if not isinstance(final_states_out, Tensor) or final_states_out.shape != final.shape:
        raise ArgumentError("causal_conv1d_fn", "final_states_out", f"is no tensor of shape {tuple(final.shape)}; allowed: that")
    return out, final_states_out.copy_(final)


def _taps() -> Code:
    from triton_attn.kernels.causal_conv1d import SPACES, causal_conv1d, causal_conv1d_backward, tile_key

    return Code(causal_conv1d, causal_conv1d_backward, SPACES, tile_key)


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    """A multiply-add for every tap and step."""
    b, d, length, k = (sizes[axis] for axis in "bdlk")
    moved = itemsize * (2 * b * d * length + d * (k + 1))
    return Work(2.0 * b * d * length * k, float(moved), float(b * d * length) if options.get("activation") else 0.0)


def _torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """torch's grouped convolution, and its silu."""
    if initial_states is not None or seq_idx is not None:
        raise NotImplementedError("the peer knows neither states nor packed sequences")
    y = F.conv1d(x, weight[:, None].to(x.dtype), None if bias is None else bias.to(x.dtype), padding=weight.shape[1] - 1, groups=x.shape[1])
    y = y[..., : x.shape[2]]
    return y if activation is None else F.silu(y)


def _case(name: str, b: int, d: int, length: int, k: int, **options: Any) -> Case:
    return Case(name, {"b": b, "d": d, "l": length, "k": k, "j": k - 1}, {"activation": None, **options})


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    sizes = (2, 512, 2048, WIDEST)
    given: Options = {"bias": "normal", "activation": "silu"}
    resumed, packed = _case("resumed", *sizes, initial_states="normal", **given), _case("packed", *sizes, seq_idx="random", **given)
    return resumed, packed


_MAMBA: Options = {"bias": "normal", "activation": "silu"}

ROW = Mechanism(
    name="causal_conv1d",
    summary="Mamba's short causal convolution of each channel, with bias, silu, states and packed sequences",
    function=causal_conv1d,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(
        Kernel(
            "taps",
            ((8, 0), (9, 0)),
            _taps,
            (Launch("forward"), Launch("backward", ("x", "weight", "bias", "initial_states"))),
        ),
    ),
    inputs={
        "x": Input("b d l", differentiable=True, ordered=True),
        "weight": Input("d k", differentiable=True, dtype="float32 or like inputs"),
        "bias": Input("d", differentiable=True, optional=True, dtype="float32 or like inputs"),
        "initial_states": Input("b d j", differentiable=True, optional=True, dtype="float32 or like inputs", ordered=True),
        "seq_idx": Input("b l", kind="index", into="k", optional=True),
    },
    options={"activation": "str?"},
    outputs={"out": Output("b d l", ordered_as="x"), "final_states": Output("b d j")},
    more="return_final_states",
    work=_work,
    cases=(
        _case("convolution", 2, 3, 10, 4),
        _case("with bias and silu", 2, 6, 17, 4, **_MAMBA),
        _case("three taps, resumed", 2, 2, 7, 3, initial_states="normal"),
        _case("two taps, resumed", 1, 4, 10, 2, initial_states="normal", **_MAMBA),
        _case("narrow parameters", 2, 18, 37, 4, weight="narrow", bias="narrow"),
        _case("packed", 2, 3, 10, 4, seq_idx="random", **_MAMBA),
        _case("shorter than its taps", 1, 3, 2, 4, initial_states="normal", activation="silu"),
        _case("longer than a tile", 1, 18, 37, 4, **_MAMBA),
    ),
    probes=_probes,
    workloads={
        "cpu": (
            _case("Mamba 130M, batch 8, 2048 tokens", 8, 1536, 2048, 4, **_MAMBA),
            _case("Mamba 130M, 2048 tokens", 1, 1536, 2048, 4, **_MAMBA),
        ),
        "cuda": (_case("batch 8, 2048 tokens", 8, 2048, 2048, 4, **_MAMBA),),
    },
    peers={"F.conv1d and silu": _torch},
    laws=(Law.LATER_STEPS_CHANGE_NOTHING, Law.RESUMES_ANYWHERE, Law.BATCH_CHANGES_NOTHING),
    derived=lambda sizes, options: {"j": sizes["k"] - 1},
    draws={"d": (1, 2, 6, 16, 18, 34), "k": (2, 3, 4), "l": (0, 1, 2, 3, 7, 15, 16, 17, 33)},
    backward_share=6.0,  # the sums once more at each tap, then two products
)
