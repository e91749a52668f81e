"""Performer attention: softmax attention by random features. The public call and its row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.arguments import ArgumentError, ArgumentTypeError
from triton_attn.functional import _softmax as softmax
from triton_attn.functional._softmax import case
from triton_attn.functional.linear_attention import ROW as LINEAR
from triton_attn.functional.linear_attention import linear_attention
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Law, Mechanism, Options, Output, Sizes, Tensors, Work
from triton_attn.portable.performer_attention import performer_attention as portable
from triton_attn.reference.performer_attention import bound
from triton_attn.reference.performer_attention import performer_attention as reference

KERNELS = ("softmax", "relu", "elu")
# what linear attention's call and this one have in common, under this one's name
_CALL = replace(
    LINEAR,
    name="performer_attention",
    inputs={name: LINEAR.inputs[name] for name in ("query", "key", "value", "key_padding_mask")},
)


def performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    kernel: str = "softmax",
    causal: bool = False,
    kernel_epsilon: float = 1e-4,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
) -> Any:
    """Attention by M random features: out_i = sum_j <phi(q_i), phi(k_j)> v_j / (sum_j <phi(q_i), phi(k_j)> + eps), in O(N M E).

    "softmax" (FAVOR+): phi(x) = M^-1/2 e^m (e^(W y - |y|^2 / 2 - m) + kernel_epsilon), with y = sqrt(scale) x and m the largest of
    W y - |y|^2 / 2 over the features, so that <phi(q), phi(k)> estimates e^(scale <q, k>). No power of e leaves its range: keys are
    scaled by the largest that a query sees, causal ones by the largest so far, so that no later key changes a bit.
    "elu": phi(x) = M^-1/2 (elu(W x) + 1). "relu": M^-1/2 relu(W x).

    Args:
        query: (B, H, N, D), float16, bfloat16, float32 or float64. Any strides; no argument is ever copied for its layout.
        key: (B, G, Nk, D); G divides H, and query head h uses key head h // (H / G).
        value: (B, G, Nk, E).
        projection: W, (M, D), such as `orthogonal_projection` draws it, cast to what it is computed in; it gets no gradient.
        kernel: phi.
        causal: query i sees keys 0..i; N must be Nk.
        kernel_epsilon: of "softmax"; 0 and more. It keeps the sum of the scores away from 0. Gradients take the e^m beside it for a
            constant, as the original's do: those of query and key are the formula's at 0, and else the further from it the longer
            vectors are, by 2 % at heads of 64 and unit variance, 256 features and 1e-4. docs/performer_attention.md has more sizes.
        scale: of the softmax that is estimated; D ** -0.5 if None.
        eps: added to the sum of the scores, relative to their largest possible one; 0 and more. With 0, a query of "elu" or "relu" whose
            scores are all 0, or that sees no key, gives NaN, 0 / 0.
        key_padding_mask: (B, Nk) boolean, True = ignore: absent from numerator and denominator, whatever lies there.
        initial_state: of earlier keys, under the same projection and scale: (S, z), (B, G, M, E) and (B, G, M), as `linear_attention`
            has them; for "softmax" (S, z, m) with m (B, G), S and z being divided by e^m. float32 (float64 for float64).
        return_state: also return the state after the last key. Its size does not grow with the number of keys.

    Returns:
        (B, H, N, E) in the inputs' dtype; with return_state also the state, shaped and typed like initial_state; its m has no gradient.
        A query that sees no key gives 0; so does one whose scores are all 0 if eps is above 0.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: Choromanski et al., "Rethinking Attention with Performers", 2021. Features of "softmax" are computed in the kernel and never
    written; those of "elu" and "relu" by torch, which `linear_attention` sums.
    """
    tensors: dict[str, Any] = {"query": query, "key": key, "value": value, "key_padding_mask": key_padding_mask}
    sizes = softmax.check(_CALL, tensors)
    _check_projection(projection, sizes["d"], query)
    for name, given in (("kernel_epsilon", kernel_epsilon), ("eps", eps)):
        if arguments.finite(ROW, name, given) < 0:
            raise ArgumentError(ROW.name, name, f"is {given}; allowed: 0 and more")
    if arguments.flag(ROW, "causal", causal) and sizes["m"] != sizes["n"]:
        complaint = f"is True with {sizes['m']} queries and {sizes['n']} keys; allowed: as many of each"
        raise ArgumentError(ROW.name, "causal", complaint)
    features = projection.shape[0]
    by_softmax = arguments.choice(ROW, "kernel", kernel, KERNELS) == "softmax"
    wide = torch.promote_types(query.dtype, torch.float32)
    b, g, e = sizes["b"], sizes["g"], sizes["e"]
    shapes = ((b, g, features, e), (b, g, features), (b, g))[: 3 if by_softmax else 2]
    begun = _begun(initial_state, shapes, wide, query)
    scale = sizes["d"] ** -0.5 if scale is None else arguments.finite(ROW, "scale", scale)
    arguments.flag(ROW, "return_state", return_state)
    if not by_softmax:
        return _by_torch(tensors, projection, begun, return_state, feature_map=kernel, causal=causal, eps=eps)
    if scale <= 0:
        raise ArgumentError(ROW.name, "scale", f"is {scale}; allowed with kernel='softmax': above 0")
    state, normalizer, level = begun or (None, None, None)
    tensors |= {
        "projection": projection.detach().to(wide),
        "initial_state": state,
        "initial_normalizer": normalizer,
        "initial_level": level,
    }
    tensors = {name: tensors[name] for name in ROW.inputs}
    options = {"causal": causal, "kernel_epsilon": float(kernel_epsilon), "scale": scale, "eps": float(eps)}
    out = operators.run(ROW, tensors, options, return_state)
    return (out[0], tuple(out[1:])) if return_state else out


def _by_torch(tensors: dict[str, Any], projection: Tensor, begun: Any, return_state: bool, **options: Any) -> Any:
    """Linear attention to features that have no maximum."""
    query, key, value, hidden = tensors.values()
    if hidden is not None:
        key, value = (x.masked_fill(hidden[:, None, :, None], 0.0) for x in (key, value))
    query, key = (x @ projection.detach().to(x.dtype).mT for x in (query, key))
    options |= {"scale": 1.0 / projection.shape[0], "initial_state": begun, "return_state": return_state}
    return linear_attention(query, key, value, key_padding_mask=hidden, **options)


def _check_projection(projection: object, width: int, query: Tensor) -> None:
    if not isinstance(projection, Tensor):
        raise ArgumentTypeError(ROW.name, "projection", f"is a {type(projection).__name__}; allowed: torch.Tensor, (M, {width})")
    if projection.ndim != 2 or projection.shape[1] != width:
        raise ArgumentError(ROW.name, "projection", f"has shape {tuple(projection.shape)}; allowed: (M, {width})")
    if not projection.dtype.is_floating_point:
        raise ArgumentTypeError(ROW.name, "projection", f"has dtype {projection.dtype}; allowed: any of floating point")
    _same_device("projection", projection, query)
    arguments.at_least(ROW, "projection", "features", projection.shape[0], 1)


def _same_device(argument: str, given: Tensor, query: Tensor) -> None:
    if given.device != query.device:
        raise ArgumentError(ROW.name, argument, f"is on {given.device}, query on {query.device}; they must be on one device")


def _begun(given: object, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, query: Tensor) -> Any:
    """The initial state, checked."""
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or len(given) != len(shapes) or not all(isinstance(x, Tensor) for x in given):
        raise ArgumentTypeError(ROW.name, "initial_state", f"is a {type(given).__name__}; allowed: {len(shapes)} tensors of this kernel")
    for part, shape in zip(given, shapes, strict=True):
        if tuple(part.shape) != shape or part.dtype != dtype:
            found = f"has shape {tuple(part.shape)} and dtype {part.dtype}"
            raise ArgumentError(ROW.name, "initial_state", f"{found}; allowed: {shape} and {dtype}")
        _same_device("initial_state", part, query)
    return tuple(given)


def _pointers() -> Code:
    from triton_attn.kernels.performer_attention import SPACES, performer_attention, performer_attention_backward, tile_key

    return Code(performer_attention, performer_attention_backward, SPACES, tile_key)


def _refuses(tensors: Tensors, options: Options) -> list[str]:
    """A pass holds lines of queries, keys and values at once; of wider ones every tile that was tried spilled."""
    dtype = tensors["query"].dtype
    widest, held = 128, "bfloat16"
    if dtype == torch.float16 or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"):
        widest, held = 64, "tf32"
    elif dtype == torch.float32:
        widest, held = 32, "exact float32"
    return [
        f"{name} has dtype {dtype} and width {tensors[name].shape[-1]}; products in {held} go up to {widest}"
        for name in ("query", "value")
        if tensors[name].shape[-1] > widest
    ]


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    b, h, g, m, n, d, e, f = (sizes[axis] for axis in "bhgmndef")
    lines = b * (h * m + g * n)
    moved = itemsize * lines * (d + e) + 4 * b * g * f * (e + 1) + 4 * f * d
    return Work(flops=2.0 * lines * f * (d + e), bytes=float(moved), exponentials=float(lines * f))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, projection: Tensor, *, causal: bool = False, **other: Any) -> Tensor:
    """torch's dense call, which random features estimate."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1])


def _case(name: str, f: int, *sizes: int, **options: Any) -> Case:
    made = case(name, *sizes, **options)
    return Case(name, {**made.sizes, "f": f}, options)


_BEGUN = {"initial_state": "normal", "initial_normalizer": "positive", "initial_level": "normal"}


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    # long enough for more than one span, with any tile
    riders: Options = {} if plain else {"key_padding_mask": "random", **_BEGUN}
    return (_case("causal", 256, 1, 8, 4, 8000, 8000, width, width, causal=True, **riders),)


ROW = Mechanism(
    name="performer_attention",
    summary="softmax attention estimated by random features, on one carried state that knows its logarithm",
    function=performer_attention,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(
        Kernel(
            "pointers",
            ((8, 0), (9, 0)),
            _pointers,
            (
                Launch("forward"),
                Launch("backward_query", ("query",)),
                Launch("backward_key", ("key", "value", "initial_state", "initial_normalizer")),
            ),
            _refuses,
        ),
    ),
    inputs={
        "query": Input("b h m d", differentiable=True),
        "key": Input("b g n d", differentiable=True),
        "value": Input("b g n e", differentiable=True),
        "projection": Input("f d", dtype="float32"),
        "key_padding_mask": Input("b n", kind="padding"),
        "initial_state": Input("b g f e", differentiable=True, optional=True, dtype="float32"),
        "initial_normalizer": Input("b g f", differentiable=True, optional=True, dtype="float32"),
        "initial_level": Input("b g", optional=True, dtype="float32"),
    },
    options={"causal": "bool", "kernel_epsilon": "float", "scale": "float", "eps": "float"},
    outputs={
        "out": Output("b h m e"),
        "state": Output("b g f e", "float32"),
        "normalizer": Output("b g f", "float32"),
        "level": Output("b g", "float32", differentiable=False),
    },
    more="return_state",
    work=_work,
    cases=(
        _case("whole", 32, 2, 2, 2, 20, 33, 16, 16),
        _case("cross", 16, 1, 4, 2, 17, 40, 12, 16, scale=0.5),
        _case("three features", 3, 1, 2, 1, 20, 20, 16, 16, causal=True, kernel_epsilon=0.25),
        _case("causal", 33, 1, 2, 2, 40, 40, 16, 24, causal=True),
        _case("causal, several spans", 16, 1, 2, 1, 130, 130, 16, 16, causal=True, kernel_epsilon=0.01),
        _case("padded keys", 20, 2, 2, 2, 20, 33, 16, 16, key_padding_mask="random"),
        _case("padded keys, causal", 20, 2, 2, 1, 33, 33, 16, 16, key_padding_mask="prefix", causal=True),
        _case("resumed", 20, 1, 2, 1, 20, 33, 16, 16, **_BEGUN),
        _case("resumed, causal, two spans", 20, 1, 2, 2, 75, 75, 16, 16, causal=True, **_BEGUN),
    ),
    probes=_probes,
    workloads={
        "cpu": (
            _case("whole 2k", 256, 1, 8, 8, 2048, 2048, 64, 64),
            _case("causal 2k", 256, 1, 8, 8, 2048, 2048, 64, 64, causal=True),
        ),
        "cuda": (
            _case("whole 4k", 256, 1, 8, 8, 4096, 4096, 64, 64),
            _case("causal 4k", 256, 1, 8, 8, 4096, 4096, 64, 64, causal=True),
            _case("causal 16k", 256, 2, 16, 16, 16384, 16384, 64, 64, causal=True),
        ),
    },
    peers={"torch SDPA": _sdpa},
    laws=(
        Law.ROWS_SUM_TO_ONE,
        Law.FUTURE_CHANGES_NOTHING,
        Law.PADDING_CHANGES_NOTHING,
        Law.KEY_ORDER_CHANGES_NOTHING,
        Law.BATCH_CHANGES_NOTHING,
        Law.RESUMES,
    ),
    equal_lengths=lambda options: options.get("causal") is True,
    packed={"initial_state": ("initial_state", "initial_normalizer", "initial_level")},
    backward_share=2.5,
    draws={"f": (1, 3, 16, 17, 33)},
    public=("kernel",),
)
