"""Linear attention: the public call, one step of it, and its row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.functional import _softmax as softmax
from triton_attn.functional._softmax import case
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Law, Mechanism, Options, Output, Sizes, Tensors, Work
from triton_attn.portable.linear_attention import linear_attention as portable
from triton_attn.reference._features import count
from triton_attn.reference.linear_attention import bound
from triton_attn.reference.linear_attention import linear_attention as reference

FEATURE_MAPS = ("elu", "relu", "crelu", "identity")


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "elu",
    causal: bool = False,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
) -> Any:
    """Attention whose scores are products of features, so that keys and values are summed once: O(N D E), and O(D E) to go on.

    out_i = phi(q_i)^T S / (<phi(q_i), z> + eps / scale) with S = S_0 + sum_j phi(k_j) v_j^T and z = z_0 + sum_j phi(k_j), over all keys,
    or over j <= i if causal. Features are computed in the kernel and never written; sums are held in float32.

    Args:
        query: (B, H, Nq, D), float16, bfloat16, float32 or float64. Any strides; no argument is ever copied for its layout.
        key: (B, Hk, Nk, D); Hk divides H, and query head h uses key head h // (H / Hk).
        value: (B, Hk, Nk, E). D and E powers of two or not; no kernel serves more than 256 features or values of a head.
        feature_map: phi. "elu": elu(x) + 1. "relu". "crelu": [relu(x), relu(-x)], F = 2 D features. "identity", which may be negative.
        causal: query i sees keys 0..i; Nq must be Nk.
        normalize: divide by the sum of the scores. If not, out_i = scale phi(q_i)^T S.
        scale: multiplies the scores <phi(q_i), phi(k_j)>; 1 if None. Where normalised it only weighs them against eps.
        eps: added to the sum of the scores; 0 and more. With 0, a query whose scores are all 0, or that sees no key, gives NaN, 0 / 0.
        key_padding_mask: (B, Nk) boolean, True = ignore: absent from numerator and denominator. What lies there, NaN included, reaches
            neither output nor gradients.
        initial_state: (S_0, z_0) of earlier keys, (B, Hk, F, E) and (B, Hk, F), float32 (float64 for float64).
        return_state: also return (S, z) after the last key.

    Returns:
        (B, H, Nq, E) in the inputs' dtype, contiguous; with return_state also (S, z), shaped and typed like initial_state,
        differentiable. A query whose scores are all 0 gives 0 if eps is above 0.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, for elu(x) + 1; Yang et al., "Gated Linear Attention Transformers with
    Hardware-Efficient Training", 2023, for the chunked form; Shang et al., "Understanding and Improving Convolutional Neural Networks
    via Concatenated Rectified Linear Units", 2016, for crelu.
    """
    state, normalizer = _pair(initial_state)
    tensors: dict[str, Tensor | None] = {
        "query": query,
        "key": key,
        "value": value,
        "key_padding_mask": key_padding_mask,
        "initial_state": state,
        "initial_normalizer": normalizer,
    }
    options: dict[str, Any] = {
        "feature_map": arguments.choice(ROW, "feature_map", feature_map, FEATURE_MAPS),
        "causal": arguments.flag(ROW, "causal", causal),
        "normalize": arguments.flag(ROW, "normalize", normalize),
        "scale": 1.0 if scale is None else arguments.finite(ROW, "scale", scale),
        "eps": arguments.finite(ROW, "eps", eps),
    }
    if options["eps"] < 0:
        raise arguments.ArgumentError(ROW.name, "eps", f"is {eps}; allowed: 0 and more")
    sizes = softmax.check(ROW, tensors)
    if causal and sizes["m"] != sizes["n"]:
        raise arguments.ArgumentError(
            ROW.name, "causal", f"is True with {sizes['m']} queries and {sizes['n']} keys; allowed: as many of each"
        )
    wanted = count(sizes["d"], feature_map)
    if sizes.get("f", wanted) != wanted:
        raise arguments.ArgumentError(
            ROW.name, "initial_state", f"has {sizes['f']} features; allowed: {wanted}, those of {feature_map!r} at width {sizes['d']}"
        )
    out = operators.run(ROW, tensors, options, arguments.flag(ROW, "return_state", return_state))
    return (out[0], (out[1], out[2])) if return_state else out


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    feature_map: str = "elu",
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One token of causal linear attention: (its output, the state after it), in O(D E) whatever came before.

    Args:
        query: (B, H, D).
        key: (B, Hk, D).
        value: (B, Hk, E).
        state: (S, z) of the tokens before, as `linear_attention` and this function return it; None at the first token.
        feature_map: as in `linear_attention`, like what follows.
        normalize: likewise.
        scale: likewise.
        eps: likewise.

    Returns:
        (B, H, E) in the inputs' dtype, and (S, z). The state handed in is left as it was.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, section 3.4.
    """
    tokens = {}
    for name, given in (("query", query), ("key", key), ("value", value)):
        if not isinstance(given, Tensor) or given.ndim != 3:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise arguments.ArgumentError("linear_attention_step", name, f"has shape {shape}; allowed: 3 axes, one token")
        tokens[name] = given[:, :, None]
    out, state = linear_attention(
        **tokens, feature_map=feature_map, causal=True, normalize=normalize, scale=scale, eps=eps, initial_state=state, return_state=True
    )
    return out[:, :, 0], state


def _pair(initial_state: object) -> tuple[Any, Any]:
    """S_0 and z_0."""
    if initial_state is None:
        return None, None
    if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2 or not all(isinstance(x, Tensor) for x in initial_state):
        raise arguments.ArgumentTypeError(ROW.name, "initial_state", f"is a {type(initial_state).__name__}; allowed: two tensors (S, z)")
    return initial_state[0], initial_state[1]


def _pointers() -> Code:
    from triton_attn.kernels.linear_attention import SPACES, linear_attention, linear_attention_backward, tile_key

    return Code(linear_attention, linear_attention_backward, SPACES, tile_key)


def _refuses(tensors: Tensors, options: Options) -> list[str]:
    """A state lives in registers; of wider ones every tile that was tried spilled."""
    dtype = tensors["query"].dtype
    widest, held = 256, "bfloat16"
    if dtype == torch.float16 or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"):
        # with padding, no tile for 128 is without spills under both compilers
        padded_keys = tensors.get("key_padding_mask") is not None
        widest, held = (64, "tf32 with key_padding_mask") if padded_keys else (128, "tf32")
    elif dtype == torch.float32:
        widest, held = 64, "exact float32"
    features = count(1, options.get("feature_map", "elu")), tensors["query"].shape[-1]
    found = {"query": features[0] * _padded(features[1]), "value": _padded(tensors["value"].shape[-1])}
    return [
        f"{name} has dtype {dtype} and {width} padded columns of features or values; products in {held} go up to {widest}"
        for name, width in found.items()
        if width > widest
    ]


def _padded(width: int) -> int:
    padded = 16
    while padded < width:
        padded *= 2
    return padded


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    b, h, g, m, n, d, e = (sizes[axis] for axis in "bhgmnde")
    feature_map = options.get("feature_map", "elu")
    f = count(d, feature_map)
    moved = itemsize * b * (h * m * (d + e) + g * n * (d + e)) + 4 * b * g * f * (e + 1)
    exponentials = b * (h * m + g * n) * d if feature_map == "elu" else 0
    return Work(flops=2.0 * b * f * e * (h * m + g * n), bytes=float(moved), exponentials=float(exponentials))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, **other: Any) -> Tensor:
    """torch's dense call: what linear attention stands in for. Not the same function."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1])


def _case(name: str, *sizes: int, **options: Any) -> Case:
    made = case(name, *sizes, **options)
    return Case(name, {**made.sizes, "f": count(made.sizes["d"], options.get("feature_map", "elu"))}, options)


_BEGUN = {"initial_state": "normal", "initial_normalizer": "positive"}
_SUMS: Options = {"feature_map": "identity", "normalize": False, "causal": True}


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    # long enough for more than one span, with any tile
    if plain:
        return (_case("causal", 1, 4, 4, 8192, 8192, width, width, causal=True),)
    riders: Options = {"causal": True, "key_padding_mask": "random", **_BEGUN}
    return (
        _case("everything", 1, 8, 4, 8000, 8000, width - 4, width - 4, **riders),
        _case("everything, two signs", 1, 8, 4, 8000, 8000, width // 2 - 4, width - 4, feature_map="crelu", **riders),
    )


ROW = Mechanism(
    name="linear_attention",
    summary="attention by products of features: one carried state instead of scores",
    function=linear_attention,
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
        "key_padding_mask": Input("b n", kind="padding"),
        "initial_state": Input("b g f e", differentiable=True, optional=True, dtype="float32"),
        "initial_normalizer": Input("b g f", differentiable=True, optional=True, dtype="float32"),
    },
    options={"feature_map": "str", "causal": "bool", "normalize": "bool", "scale": "float", "eps": "float"},
    outputs={"out": Output("b h m e"), "state": Output("b g f e", "float32"), "normalizer": Output("b g f", "float32")},
    more="return_state",
    work=_work,
    cases=(
        _case("whole", 2, 2, 2, 33, 33, 16, 16),
        _case("cross", 1, 4, 2, 17, 75, 24, 16, scale=0.5, feature_map="relu"),
        _case("causal", 1, 4, 2, 40, 40, 20, 16, causal=True),
        _case("causal, several spans", 1, 2, 1, 150, 150, 16, 24, causal=True),
        _case("two signs", 1, 2, 1, 33, 40, 20, 16, feature_map="crelu", key_padding_mask="random"),
        _case("two signs, causal", 1, 2, 1, 40, 40, 16, 24, feature_map="crelu", causal=True, **_BEGUN),
        _case("padded keys", 2, 2, 2, 20, 33, 16, 16, key_padding_mask="random"),
        _case("padded keys, causal", 2, 2, 1, 33, 33, 16, 16, key_padding_mask="random", causal=True),
        _case("resumed", 1, 2, 1, 20, 33, 16, 16, **_BEGUN),
        _case("resumed, causal, two spans", 1, 2, 1, 75, 75, 16, 16, causal=True, **_BEGUN),
        _case("not normalised", 1, 2, 2, 33, 33, 16, 16, feature_map="identity", normalize=False, causal=True, scale=0.25),
        _case("not normalised, resumed", 2, 4, 2, 20, 20, 16, 16, normalize=False, causal=True, **_BEGUN),
    ),
    probes=_probes,
    workloads={
        "cpu": (_case("whole 8k", 1, 12, 12, 8192, 8192, 64, 64), _case("causal 2k", 1, 8, 8, 2048, 2048, 64, 64, causal=True)),
        "cuda": (
            _case("causal 8k, 96 heads", 1, 96, 96, 8192, 8192, 128, 128, causal=True),
            _case("causal 16k, 16 heads", 2, 16, 16, 16384, 16384, 128, 128, causal=True),
            _case("causal 4k, 64 heads", 4, 64, 64, 4096, 4096, 128, 128, causal=True),
            _case("causal 2k, 16 heads", 4, 16, 16, 2048, 2048, 128, 128, causal=True),
            _case("sums 8k, 96 heads", 1, 96, 96, 8192, 8192, 128, 128, **_SUMS),
            _case("sums 16k, 16 heads", 2, 16, 16, 16384, 16384, 128, 128, **_SUMS),
            _case("sums 4k, 64 heads", 4, 64, 64, 4096, 4096, 128, 128, **_SUMS),
            _case("two signs, causal 16k, 16 heads", 2, 16, 16, 16384, 16384, 64, 64, feature_map="crelu", causal=True),
            _case("whole 16k", 2, 16, 16, 16384, 16384, 64, 64),
            _case("whole 4k, 64 heads", 4, 64, 64, 4096, 4096, 128, 128),
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
    derived=lambda sizes, options: {"f": count(sizes["d"], options.get("feature_map", "elu"))},
    packed={"initial_state": ("initial_state", "initial_normalizer")},
    backward_share=2.0,
)
