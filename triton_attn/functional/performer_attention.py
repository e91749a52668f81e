"""Performer attention: softmax attention by random features, which `linear_attention` sums, or a running maximum carries if causal."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments
from triton_attn.arguments import ArgumentError, ArgumentTypeError
from triton_attn.functional import _softmax as softmax
from triton_attn.functional.linear_attention import ROW as LINEAR
from triton_attn.functional.linear_attention import linear_attention

KERNELS = ("softmax", "relu", "elu")
CHUNK = 64
_WHO: Any = SimpleNamespace(name="performer_attention")


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
    initial_state: tuple[Tensor, ...] | None = None,
    return_state: bool = False,
) -> Any:
    """Attention by M random features: out_i = sum_j <phi(q_i), phi(k_j)> v_j / (sum_j <phi(q_i), phi(k_j)> + eps), in O(N M E).

    "softmax" (FAVOR+): phi(x) = M^-1/2 e^m (e^(W y - |y|^2 / 2 - m) + kernel_epsilon), with y = sqrt(scale) x and m the largest of
    W y - |y|^2 / 2 over the features, so that <phi(q), phi(k)> estimates e^(scale <q, k>). No power of e leaves its range: keys are
    scaled by the largest that a query sees, causal ones by the largest so far, so that no later key changes a bit.
    "elu": phi(x) = M^-1/2 (elu(W x) + 1). "relu": M^-1/2 relu(W x).

    Args:
        query: (B, H, N, D), float16, bfloat16, float32 or float64.
        key: (B, G, Nk, D); G divides H, and query head h uses key head h // (H / G).
        value: (B, G, Nk, E).
        projection: W, (M, D), such as `orthogonal_projection` draws it; it gets no gradient.
        kernel: phi.
        causal: query i sees keys 0..i; N must be Nk.
        kernel_epsilon: of "softmax"; 0 and more. It keeps the sum of the scores away from 0.
        scale: of the softmax that is estimated; D ** -0.5 if None.
        eps: added to the sum of the scores, relative to their largest possible one; 0 and more.
        key_padding_mask: (B, Nk) boolean, True = ignore: absent from numerator and denominator.
        initial_state: of earlier keys, under the same projection and scale: (S, z), (B, G, M, E) and (B, G, M), as `linear_attention`
            has them; for "softmax" (S, z, m) with m (B, G), S and z being divided by e^m. float32 (float64 for float64).
        return_state: also return the state after the last key. Its size does not grow with the number of keys.

    Returns:
        (B, H, N, E) in the inputs' dtype; with return_state also the state, shaped and typed like initial_state.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: Choromanski et al., "Rethinking Attention with Performers", 2021. Features are computed by torch, not in a kernel.
    """
    absent = dict.fromkeys(LINEAR.inputs)
    tensors = {**absent, "query": query, "key": key, "value": value, "key_padding_mask": key_padding_mask}
    sizes = softmax.check(LINEAR, tensors)
    if not isinstance(projection, Tensor) or projection.ndim != 2 or projection.shape[1] != sizes["d"]:
        found = tuple(projection.shape) if isinstance(projection, Tensor) else type(projection).__name__
        raise ArgumentError(_WHO.name, "projection", f"has shape {found}; allowed: (M, {sizes['d']})")
    for name, given in (("kernel_epsilon", kernel_epsilon), ("eps", eps)):
        if arguments.finite(_WHO, name, given) < 0:
            raise ArgumentError(_WHO.name, name, f"is {given}; allowed: 0 and more")
    if arguments.flag(_WHO, "causal", causal) and sizes["m"] != sizes["n"]:
        complaint = f"is True with {sizes['m']} queries and {sizes['n']} keys; allowed: as many of each"
        raise ArgumentError(_WHO.name, "causal", complaint)
    features = projection.shape[0]
    softmax_kernel = arguments.choice(_WHO, "kernel", kernel, KERNELS) == "softmax"
    wide = torch.promote_types(query.dtype, torch.float32)
    b, g, e = sizes["b"], sizes["g"], sizes["e"]
    shapes = ((b, g, features, e), (b, g, features), (b, g))[: 3 if softmax_kernel else 2]
    begun = _begun(initial_state, shapes, wide)
    arguments.flag(_WHO, "return_state", return_state)
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    if not softmax_kernel:
        query, key = (x @ projection.detach().to(x.dtype).mT for x in (query, key))
        options: dict[str, Any] = {"feature_map": kernel, "causal": causal, "scale": 1.0 / features, "eps": eps}
        return linear_attention(
            query, key, value, key_padding_mask=key_padding_mask, initial_state=begun, return_state=return_state, **options
        )
    scale = sizes["d"] ** -0.5 if scale is None else arguments.finite(_WHO, "scale", scale)
    if scale <= 0:
        raise ArgumentError(_WHO.name, "scale", f"is {scale}; allowed with kernel='softmax': above 0")
    with torch.autocast(query.device.type, enabled=False):
        rows, _ = _features(query.to(wide), projection, scale, kernel_epsilon)
        columns, largest = _features(key.to(wide), projection, scale, kernel_epsilon)
        if key_padding_mask is not None:
            largest = largest.masked_fill(key_padding_mask[:, None, :], -math.inf)
        # (B, G, queries of a key head, N, M): what they share has one axis of length 1
        rows = rows.reshape(b, g, sizes["h"] // g if g else 1, *rows.shape[2:])
        columns, largest, value = (x[:, :, None] for x in (columns, largest, value.to(wide)))
        walk = _running if causal else _whole
        out, state, at = walk(rows, columns, largest, value, eps * features, _joined(begun))
        out = out.flatten(1, 2).to(query.dtype)
    return (out, (state[:, :, 0, :, :-1], state[:, :, 0, :, -1], at[:, :, 0, 0])) if return_state else out


def _begun(given: object, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Any:
    """The initial state, checked."""
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or len(given) != len(shapes) or not all(isinstance(x, Tensor) for x in given):
        raise ArgumentTypeError(_WHO.name, "initial_state", f"is a {type(given).__name__}; allowed: {len(shapes)} tensors of this kernel")
    for part, shape in zip(given, shapes, strict=True):
        if tuple(part.shape) != shape or part.dtype != dtype:
            found = f"has shape {tuple(part.shape)} and dtype {part.dtype}"
            raise ArgumentError(_WHO.name, "initial_state", f"{found}; allowed: {shape} and {dtype}")
    return tuple(given)


def _joined(state: Any) -> tuple[Tensor, Tensor] | None:
    """S and z side by side, and m, with the axis of the queries of a key head."""
    if state is None:
        return None
    return torch.cat((state[0], state[1][..., None]), -1)[:, :, None], state[2][:, :, None, None]


def _features(x: Tensor, projection: Tensor, scale: float, epsilon: float) -> tuple[Tensor, Tensor]:
    """(features of vectors relative to their largest, the logarithm of that), without M^-1/2, which cancels."""
    exponents = x @ (projection.detach().to(x.dtype).mT * math.sqrt(scale))
    # a constant to the gradient: whatever it is, it cancels
    largest = exponents.detach().amax(-1, keepdim=True)
    # in place: fresh memory costs more than these operations
    found = exponents.sub_(largest).exp_()
    found = found + epsilon if found.requires_grad else found.add_(epsilon)
    return found, largest[..., 0] - 0.5 * scale * x.square().sum(-1)


Walked = tuple[Tensor, Tensor, Tensor]  # outputs, the state after the last key, the logarithm of what it was divided by


def _whole(rows: Tensor, columns: Tensor, largest: Tensor, value: Tensor, eps: float, begun: tuple[Tensor, Tensor] | None) -> Walked:
    top = largest.amax(-1, keepdim=True) if largest.shape[-1] else largest.new_full((*largest.shape[:-1], 1), -math.inf)
    top = top if begun is None else torch.maximum(top, begun[1])
    safe = top.masked_fill(top == -math.inf, 0.0)
    weight = (largest - safe).exp()
    # the keys' scale goes to the values, which have fewer columns than features
    state = columns.mT @ torch.cat((value * weight[..., None], weight[..., None]), -1)
    if begun is not None:
        state = state + begun[0] * (begun[1] - safe).exp()[..., None]
    both = rows @ state
    return both[..., :-1] / (both[..., -1:] + eps), state, top


def _running(rows: Tensor, columns: Tensor, largest: Tensor, value: Tensor, eps: float, begun: tuple[Tensor, Tensor] | None) -> Walked:
    """Chunk by chunk; the state is relative to the largest key so far, `at`, and so is every score."""
    b, g, _, n, features = columns.shape
    if begun is None:
        begun = value.new_zeros(b, g, 1, features, value.shape[-1] + 1), value.new_full((b, g, 1, 1), -math.inf)
    state, at = begun
    outs = []
    value = F.pad(value, (0, 1), value=1.0)
    for start in range(0, n, CHUNK):
        part = slice(start, min(start + CHUNK, n))
        q, k, v, m = rows[..., part, :], columns[..., part, :], value[..., part, :], largest[..., part]
        so_far = torch.maximum(m.cummax(-1).values, at)
        safe = so_far.masked_fill(so_far == -math.inf, 0.0)
        # above the diagonal a key may be the larger one: it is hidden before its exponential is taken
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        weight = (m[..., None, :] - safe[..., None]).masked_fill(later, -math.inf).exp()
        both = (q @ k.mT * weight) @ v + (q @ state) * (at - safe).exp()[..., None]
        outs.append(both[..., :-1] / (both[..., -1:] + eps))
        last = safe[..., -1:]
        state = state * (at - last).exp()[..., None] + k.mT @ (v * (m - last).exp()[..., None])
        at = so_far[..., -1:]
    return torch.cat(outs, -2) if outs else rows.new_zeros(*rows.shape[:-1], value.shape[-1] - 1), state, at


def orthogonal_projection(
    features: int,
    dim: int,
    scaling: int = 0,
    *,
    generator: torch.Generator | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(features, dim) random rows, orthogonal within blocks of dim rows: features that err less than independent ones.

    Args:
        features: how many rows; 1 and more.
        dim: width of a head.
        scaling: 0: rows as long as those of a Gaussian matrix; 1: all of length sqrt(dim).
        generator: on the CPU; what draws. The same seed gives the same rows on every device.
        device, dtype: of the result.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: Choromanski et al., "Rethinking Attention with Performers", 2021, section 2.4.
    """
    who: Any = SimpleNamespace(name="orthogonal_projection")
    arguments.whole(who, "features", features, 1)
    arguments.whole(who, "dim", dim, 1)
    arguments.whole(who, "scaling", scaling, 0, 1)
    blocks = []
    for _ in range(-(-features // dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        blocks.append((q * r.diagonal().sign()).mT)  # the signs make it uniform
    rows = torch.cat(blocks)[:features]
    if scaling == 1:
        lengths = torch.full((features, 1), math.sqrt(dim), dtype=torch.float64)
    else:
        lengths = torch.randn(features, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (rows * lengths).to(device=device, dtype=dtype or torch.get_default_dtype())
