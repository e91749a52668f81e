"""Dense and cross attention: the public call and its row."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.functional import _softmax as softmax
from triton_attn.functional._softmax import LAUNCHES
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Law, Mechanism, Options, Output, Sizes, Tensors, Work
from triton_attn.portable.attention import attention as portable
from triton_attn.reference.attention import attention as reference
from triton_attn.reference.attention import bound


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention, dense or cross, with grouped key and value heads.

    out = dropout(softmax(scale query key^T + mask)) value, over the keys that a query sees.

    Args:
        query: (B, H, Nq, D), float16, bfloat16, float32 or float64. Any strides; no argument is ever copied for its layout.
        key: (B, Hk, Nk, D); Hk divides H, and query head h uses key head h // (H / Hk).
        value: (B, Hk, Nk, E). D and E of any size, powers of two or not; kernels serve up to 256.
        mask: broadcastable to (B, H, Nq, Nk). Boolean: True = attend. Floating: added to the scores; -inf hides a key.
            A floating mask that requires a gradient gets one, from the portable path.
        key_padding_mask: (B, Nk) boolean, True = ignore. What lies there, NaN included, reaches neither output nor gradients.
        causal: False; True (only where Nq == Nk); "top_left": query i sees keys 0..i; "bottom_right": keys 0..i + Nk - Nq.
        scale: multiplies the scores; D ** -0.5 if None.
        dropout_p: share of attention weights set to zero, the others being divided by 1 - dropout_p; applied whenever it is
            positive. The seed comes from torch's generator of the device; which entries fall depends on seed and position only.
        return_lse: also return the log-sum-exp.

    Returns:
        (B, H, Nq, E) in the inputs' dtype, contiguous; with return_lse also (B, H, Nq), natural logarithm, float32 (float64
        for float64), differentiable. A query that sees no key gives 0, lse -inf and no gradient.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: Vaswani et al., "Attention Is All You Need", 2017; Dao, "FlashAttention-2", 2023, for the algorithm; Ainslie et al.,
    "GQA", 2023, for grouped heads. Masks as in torch.nn.functional.scaled_dot_product_attention (`mask`) and
    torch.nn.MultiheadAttention (`key_padding_mask`).
    """
    tensors: dict[str, Tensor | None]
    tensors = {"query": query, "key": key, "value": value, "mask": mask, "key_padding_mask": key_padding_mask, "seed": None}
    sizes = softmax.check(ROW, tensors)
    if mask is not None and mask.ndim < 4:
        tensors["mask"] = mask[(None,) * (4 - mask.ndim)]
    if mask is not None and 0 in (sizes["b"], sizes["n"]) and not mask.requires_grad:
        tensors["mask"] = None  # it hides nothing, and heads that share no keys are not told apart by its shape
    options = {
        "causal": arguments.alignment(ROW, causal, sizes["m"], sizes["n"]),
        "scale": sizes["d"] ** -0.5 if scale is None else arguments.finite(ROW, "scale", scale),
        "dropout_p": arguments.probability(ROW, "dropout_p", dropout_p),
    }
    return operators.run(ROW, tensors, options, return_lse)


def _pointers() -> Code:
    from triton_attn.kernels.attention import SPACES, attention, attention_backward, splits, tile_key

    return Code(attention, attention_backward, SPACES, tile_key, splits)


def _descriptors() -> Code:
    from triton_attn.kernels.attention import DESCRIPTOR_SPACES, attention_backward, attention_by_descriptors, tile_key

    return Code(attention_by_descriptors, attention_backward, DESCRIPTOR_SPACES, tile_key)


def _undescribable(tensors: Tensors, options: Options) -> list[str]:
    """Bulk copies need rows of 16 aligned bytes and know no masked rows."""
    reasons = [f"{name} is not read by bulk copies" for name in ("mask", "key_padding_mask") if tensors[name] is not None]
    for name in ("query", "key", "value"):
        tensor = tensors[name]
        size = tensor.element_size()
        if size != 2:
            reasons.append(f"{name} has dtype {tensor.dtype}; bulk copies serve float16 and bfloat16")
        elif tensor.stride(-1) != 1 or any(stride * size % 16 for stride in tensor.stride()[:-1]) or tensor.shape[-1] * size % 16:
            reasons.append(f"{name} has strides {tensor.stride()}; bulk copies need rows of 16 aligned bytes")
        elif tensor.device.type != "meta" and tensor.data_ptr() % 16:
            reasons.append(f"{name} does not start at a multiple of 16 bytes")
    if not reasons and tensors["query"].is_cuda and (splits := _pointers().splits(tensors, options)) > 1:
        reasons.append(f"{splits} programs share the keys, which bulk copies do not serve")
    return reasons


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    b, h, g, m, n, d, e = (sizes[axis] for axis in "bhgmnde")
    seen = pairs(m, n, options.get("causal", False))
    moved = itemsize * b * (h * m * (d + e) + g * n * (d + e)) + 4 * b * h * m
    return Work(flops=2.0 * b * h * seen * (d + e), bytes=float(moved), exponentials=float(b * h * seen))


def pairs(m: int, n: int, causal: bool | str) -> int:
    """How many (query, key) pairs of m and n are visible."""
    if not causal:
        return m * n
    shift = n - m if causal == "bottom_right" else 0
    return sum(min(max(i + shift + 1, 0), n) for i in range(m))


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """torch's own call for the same arguments; where lengths differ it aligns causal masks from the top left."""
    if key_padding_mask is not None:
        mask = ~key_padding_mask[:, None, None, :]
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, bool(causal), scale=scale, enable_gqa=grouped)


def _case(name: str, b: int, h: int, g: int, m: int, n: int, d: int, e: int, **options: Any) -> Case:
    return Case(name, {"b": b, "h": h, "g": g, "m": m, "n": n, "d": d, "e": e}, options)


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    if plain:
        return (_case("causal", 2, 8, 4, 1024, 1024, width, width, causal="top_left"),)
    riders: Options = {"causal": "bottom_right", "mask": "additive", "key_padding_mask": "random", "dropout_p": 0.1}
    return (_case("everything", 2, 8, 4, 1000, 1100, width - 4, width - 4, **riders),)


_COMPILED = ((8, 0), (8, 6), (8, 9), (9, 0))

ROW = Mechanism(
    name="attention",
    summary="softmax attention, dense and cross, with grouped heads, masks, dropout and lse",
    function=attention,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(
        Kernel("descriptors", ((9, 0),), _descriptors, (Launch("forward"),), _undescribable),
        Kernel("pointers", _COMPILED, _pointers, (*LAUNCHES, Launch("split", shared=True)), softmax.too_wide),
    ),
    inputs={
        "query": Input("b h m d", differentiable=True),
        "key": Input("b g n d", differentiable=True),
        "value": Input("b g n e", differentiable=True),
        "mask": Input("b h m n", kind="mask"),
        "key_padding_mask": Input("b n", kind="padding"),
        "seed": Input("", kind="seed"),
    },
    options={"causal": "str", "scale": "float", "dropout_p": "float"},
    outputs={"out": Output("b h m e"), "lse": Output("b h m", "float32")},
    more="return_lse",
    work=_work,
    cases=(
        _case("dense", 2, 2, 2, 33, 33, 16, 16),
        _case("cross", 1, 4, 2, 17, 40, 24, 16),
        _case("causal", 1, 2, 2, 40, 40, 16, 16, causal=True),
        _case("causal, fewer queries", 1, 2, 1, 18, 35, 16, 16, causal="bottom_right"),
        _case("causal, fewer keys", 1, 2, 1, 35, 18, 16, 16, causal="bottom_right"),
        _case("boolean mask", 1, 2, 2, 20, 33, 16, 16, mask="boolean"),
        _case("additive mask", 1, 2, 2, 20, 33, 16, 16, mask="additive"),
        _case("padded keys", 2, 2, 2, 20, 33, 16, 16, key_padding_mask="random"),
        _case("dropout", 1, 2, 1, 20, 20, 16, 16, dropout_p=0.2, causal="top_left"),
    ),
    probes=_probes,
    workloads={
        "cpu": (_case("dense", 1, 8, 8, 2048, 2048, 64, 64), _case("cross", 4, 8, 8, 256, 1024, 64, 64)),
        "cuda": (
            _case("dense d128", 1, 16, 16, 16384, 16384, 128, 128),
            _case("dense d64", 1, 32, 32, 16384, 16384, 64, 64),
            _case("causal d128 16k", 1, 16, 16, 16384, 16384, 128, 128, causal=True),
            _case("causal d128 2k", 8, 16, 16, 2048, 2048, 128, 128, causal=True),
            _case("dense d64 8k", 1, 32, 32, 8192, 8192, 64, 64),
            _case("short d64", 32, 32, 32, 512, 512, 64, 64),
            _case("dropout d64", 4, 16, 16, 4096, 4096, 64, 64, dropout_p=0.1),
            _case("padded keys d64", 8, 16, 16, 2048, 2048, 64, 64, key_padding_mask="suffix"),
            _case("cross d64", 4, 16, 16, 4096, 512, 64, 64),
            _case("decoding d128", 1, 32, 8, 1, 32768, 128, 128),
            _case("few queries d96", 1, 8, 8, 77, 1369, 96, 96),
            _case("text to patches d96, 16 images", 16, 8, 8, 77, 1369, 96, 96),
            _case("16 prompts for each of 16 images d96", 16, 8, 8, 1232, 1369, 96, 96),
        ),
    },
    peers={"torch SDPA": _sdpa},
    laws=(
        Law.ROWS_SUM_TO_ONE,
        Law.FUTURE_CHANGES_NOTHING,
        Law.PADDING_CHANGES_NOTHING,
        Law.KEY_ORDER_CHANGES_NOTHING,
        Law.BATCH_CHANGES_NOTHING,
    ),
)
