"""The selective scan: the public calls and their row."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Law, Mechanism, Options, Output, Sizes, Work
from triton_attn.portable.selective_scan import selective_scan as portable
from triton_attn.reference.selective_scan import bound
from triton_attn.reference.selective_scan import selective_scan as reference

WIDEST = 256
LAYOUTS = ("bdl", "bld")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    layout: str = "bdl",
) -> Any:
    """The selective scan of Mamba: a linear recurrence per channel whose step size, input and output vectors depend on the input.

    h_t = exp(Delta_t A) h_{t-1} + Delta_t u_t B_t,  y_t = <C_t, h_t> + D u_t,  out_t = y_t silu(z_t),
    Delta_t = softplus(delta_t + delta_bias) if delta_softplus, else delta_t + delta_bias. Cost O(L D N); states are float32.

    Args:
        u: (B, D, L), float16, bfloat16, float32 or float64; with layout="bld" (B, L, D). Any strides; nothing is copied for them.
        delta: as u. Without softplus it should not be negative: with A < 0 the state would grow.
        A: (D, N), float32 or u's dtype, real; N from 1 to 256. Negative for a state that fades.
        B: (B, N, L), or (B, G, N, L) where G divides D and channel d uses group d // (D / G), or (D, N), the same at every step;
            with layout="bld" (B, L, N) or (B, L, G, N). u's dtype. What is the same at every step is read by its strides and gets
            its gradient by way of (B, D, N, L); beside it several groups are copied, for there is no view of them.
        C: likewise.
        D: (D,), float32 or u's dtype: the skip.
        z: as u: the gate.
        delta_bias: (D,), float32 or u's dtype.
        delta_softplus: whether step sizes pass through softplus.
        return_last_state: also return the state after the last step.
        initial_state: (B, D, N), float32 or u's dtype, the state before the first step; 0 if None. Packed: (S, D, N).
        mask: (B, L) boolean, True = a step, False = padding, at any place. A masked step leaves the state alone, gives 0, and what
            lies there, NaN included, reaches neither output nor gradients.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to L: B is 1, and the row holds S sequences, the s-th from cu_seqlens[s] to
            cu_seqlens[s + 1]; none sees another. On a CPU others than rising ones raise; elsewhere, where looking would wait for the
            device, steps that no sequence has give 0.
        layout: "bdl" or "bld": how u, delta, B, C, z and the output have their axes.

    Returns:
        As u, in its dtype and order in memory; with return_last_state also (B, D, N), packed (S, D, N), float32 (float64 for
        float64), differentiable.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023. Arguments as in mamba_ssm's
    selective_scan_fn, those after the star added.
    """
    if layout not in LAYOUTS:
        raise arguments.ArgumentError(ROW.name, "layout", f"is {layout!r}; allowed: {', '.join(map(repr, LAYOUTS))}")
    if layout == "bld":
        u, delta, z = (_turned(x, 3) for x in (u, delta, z))
        B, C = (x.movedim(1, -1) if isinstance(x, Tensor) and x.ndim in (3, 4) else x for x in (B, C))
    B, C = _grouped(B, C, u), _grouped(C, B, u)
    tensors = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
    }
    sizes = arguments.check(ROW, tensors)
    arguments.within(ROW, "A", "state size", sizes["s"], 1, WIDEST)
    _divides(sizes)
    if mask is not None and mask.dtype != torch.bool:
        raise arguments.ArgumentTypeError(ROW.name, "mask", f"has dtype {mask.dtype}; allowed: torch.bool (True = a step)")
    if cu_seqlens is not None:
        if sizes["b"] != 1:
            raise arguments.ArgumentError(ROW.name, "cu_seqlens", f"is given with a batch of {sizes['b']}; allowed: a batch of 1")
        arguments.within(ROW, "cu_seqlens", "length", sizes["p"], 1, 2**31)
        arguments.offsets(ROW, "cu_seqlens", cu_seqlens, sizes["l"])
    sequences = _sequences(sizes)["q"]
    if initial_state is not None and initial_state.shape[0] != sequences:
        shape = tuple(initial_state.shape)
        raise arguments.ArgumentError(ROW.name, "initial_state", f"has shape {shape}; allowed: q = {sequences} sequences")
    options = {"delta_softplus": arguments.flag(ROW, "delta_softplus", delta_softplus)}
    outputs = operators.run(ROW, tensors, options, return_last_state)
    if layout == "bdl":
        return outputs
    return (outputs[0].transpose(1, 2), outputs[1]) if return_last_state else outputs.transpose(1, 2)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """`selective_scan` under mamba_ssm's name, with its arguments and no others."""
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _turned(x: Any, axes: int) -> Any:
    return x.transpose(1, 2) if isinstance(x, Tensor) and x.ndim == axes else x


def _grouped(x: Any, other: Any, u: Any) -> Any:
    """(B, N, L) as one group, (D, N) as a group for every channel, and then the other too; anything else as it is."""
    if not isinstance(x, Tensor) or not isinstance(u, Tensor) or u.ndim != 3:
        return x
    if x.ndim == 2:
        return x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
    x = x[:, None] if x.ndim == 3 else x
    if not isinstance(other, Tensor) or other.ndim != 2 or x.ndim != 4 or x.shape[1] == 0 or u.shape[1] % x.shape[1]:
        return x
    return x.expand(-1, u.shape[1], -1, -1) if x.shape[1] == 1 else x.repeat_interleave(u.shape[1] // x.shape[1], 1)


def _divides(sizes: Sizes) -> None:
    if sizes["g"] == 0 or sizes["d"] % sizes["g"]:
        raise arguments.ArgumentError(ROW.name, "B", f"has {sizes['g']} groups, which do not divide u's {sizes['d']} channels")


def _sequences(sizes: Sizes) -> Sizes:
    """How many sequences there are: those that are packed, or a row each."""
    return {"b": 1, "q": sizes["p"] - 1} if "p" in sizes else {"q": sizes["b"]}


def _registers() -> Code:
    from triton_attn.kernels.selective_scan import SPACES, selective_scan, selective_scan_backward, tile_key

    return Code(selective_scan, selective_scan_backward, SPACES, tile_key)


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    """Three multiply-adds for every state and step."""
    b, d, length, s, g = (sizes[axis] for axis in "bdlsg")
    moved = itemsize * b * length * (3 * d + 2 * g * s) + 4 * (d * s + b * d * s)
    return Work(flops=6.0 * b * d * length * s, bytes=float(moved), exponentials=float(b * d * length * s))


def _by_doubling(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **other: Any,
) -> Tensor:
    """A scan in log2(L) steps over the whole length, as parallel-scan packages do it in PyTorch, by autograd."""
    if any(x is not None for x in other.values()):
        raise NotImplementedError("the peer knows neither masks nor states nor packed sequences")
    size = delta if delta_bias is None else delta + delta_bias[:, None]
    size = F.softplus(size) if delta_softplus else size
    added, decay = (size * u)[:, :, None] * B, (size[:, :, None] * A[:, :, None]).exp()
    for level in range(math.ceil(math.log2(max(u.shape[2], 1)))):
        step = 2**level
        added = torch.cat((added[..., :step], added[..., step:] + decay[..., step:] * added[..., :-step]), -1)
        decay = torch.cat((decay[..., :step], decay[..., step:] * decay[..., :-step]), -1)
    y = (added * C).sum(2)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z)


def _case(name: str, b: int, d: int, length: int, s: int, g: int = 1, p: int = 0, **options: Any) -> Case:
    sizes = {"b": b, "d": d, "l": length, "s": s, "g": g}
    if p:
        sizes, options = {**sizes, "p": p}, {**options, "cu_seqlens": "drawn"}
    return Case(name, {**sizes, **_sequences(sizes)}, options)


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    given: Options = {"D": "normal", "z": "normal", "delta_bias": "normal", "initial_state": "normal", "mask": "random"}
    everything = _case("everything", 2, 512, 256, width, delta_softplus=True, **given)
    return everything, _case("packed", 1, 512, 256, width, p=5, delta_softplus=True, **given)


_GATED: Options = {"D": "normal", "z": "normal", "delta_bias": "normal", "delta_softplus": True}

ROW = Mechanism(
    name="selective_scan",
    summary="Mamba's selective scan, with gate, skip, states, masks and packed sequences",
    function=selective_scan,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(
        Kernel(
            "registers",
            ((8, 0), (9, 0)),
            _registers,
            (
                Launch("forward"),
                Launch("backward", ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")),
            ),
        ),
    ),
    inputs={
        "u": Input("b d l", differentiable=True, ordered=True),
        "delta": Input("b d l", differentiable=True, sign=1, ordered=True),
        "A": Input("d s", differentiable=True, dtype="float32 or like inputs", sign=-1),
        "B": Input("b g s l", differentiable=True, ordered=True),
        "C": Input("b g s l", differentiable=True, ordered=True),
        "D": Input("d", differentiable=True, optional=True, dtype="float32 or like inputs"),
        "z": Input("b d l", differentiable=True, optional=True, ordered=True),
        "delta_bias": Input("d", differentiable=True, optional=True, dtype="float32 or like inputs", sign=-1),
        "initial_state": Input("q d s", differentiable=True, optional=True, dtype="float32 or like inputs"),
        "mask": Input("b l", kind="mask"),
        "cu_seqlens": Input("p", kind="offsets", into="l"),
    },
    options={"delta_softplus": "bool"},
    outputs={"out": Output("b d l", ordered_as="u"), "last_state": Output("q d s", "float32")},
    more="return_last_state",
    work=_work,
    cases=(
        _case("scan", 2, 3, 10, 5),
        _case("gated", 2, 4, 10, 3, **_GATED),
        _case("groups", 1, 6, 10, 4, 3, D="normal"),
        _case("resumed", 1, 4, 10, 3, initial_state="normal", delta_softplus=True),
        _case("masked", 2, 3, 10, 4, mask="random", z="normal", initial_state="normal"),
        _case("packed", 1, 3, 10, 2, p=4, initial_state="normal", **_GATED),
        _case("longer than a tile", 1, 3, 19, 2, z="normal"),
        _case("narrow parameters", 1, 4, 10, 3, A="narrow", initial_state="narrow", D="narrow"),
        _case("more channels than a tile", 2, 36, 18, 3, 2, D="normal"),
    ),
    probes=_probes,
    workloads={
        "cpu": (_case("Mamba 130M, 2048 tokens", 1, 1536, 2048, 16, **_GATED),),
        "cuda": (
            _case("batch 8, 2048 tokens", 8, 2048, 2048, 16, **_GATED),
            _case("batch 1, 16384 tokens", 1, 2048, 16384, 16, **_GATED),
        ),
    },
    peers={"doubling by autograd": _by_doubling},
    laws=(
        Law.LATER_STEPS_CHANGE_NOTHING,
        Law.RESUMES_ANYWHERE,
        Law.PACKED_IS_SEPARATE,
        Law.MASKED_IS_ABSENT,
        Law.BATCH_CHANGES_NOTHING,
    ),
    derived=lambda sizes, options: _sequences(sizes),
    draws={"d": (2, 6, 16, 18, 34), "s": (1, 2, 3, 8, 17), "p": (2, 3, 5), "l": (0, 1, 2, 7, 15, 16, 17)},
    public=("layout",),
)
