"""What the rows of the softmax family share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from triton_attn import arguments
from triton_attn.mechanism import Case, Input, Launch, Law, Mechanism, Options, Output, Sizes, Tensors, Work

WIDEST = 256  # of a kernel's heads
LAUNCHES = (Launch("forward"), Launch("backward_query", ("query",)), Launch("backward_key", ("key", "value")))
COMPILED = ((8, 0), (9, 0))
OUTPUTS = {"out": Output("b h m e"), "lse": Output("b h m", "float32")}
PATTERN_LAWS = (
    Law.ROWS_SUM_TO_ONE,
    Law.FUTURE_CHANGES_NOTHING,
    Law.PADDING_CHANGES_NOTHING,
    Law.BATCH_CHANGES_NOTHING,
    Law.REDUCES_TO_ATTENTION,
)


def inputs(keys: str = "n", **more: Input) -> dict[str, Input]:
    """Query, key, value and key padding; `keys` is the axis of the keys, "m" where there must be as many as queries."""
    return {
        "query": Input("b h m d", differentiable=True),
        "key": Input(f"b g {keys} d", differentiable=True),
        "value": Input(f"b g {keys} e", differentiable=True),
        **more,
        "key_padding_mask": Input(f"b {keys}", kind="padding"),
        "seed": Input("", kind="seed"),
    }


def check(row: Mechanism, tensors: Mapping[str, Tensor | None]) -> Sizes:
    """Sizes by axis letter; ArgumentError unless dtypes, shapes, heads and widths fit."""
    return arguments.check(row, tensors, _fit)


def _fit(row: Mechanism, sizes: Sizes) -> None:
    arguments.divides(row, sizes, ("g", "key"), ("h", "query"))
    arguments.at_least(row, "query", "width", sizes["d"], 1)
    arguments.at_least(row, "value", "width", sizes["e"], 1)


def too_wide(tensors: Tensors, options: Options) -> list[str]:
    """A kernel holds a row of each head at once."""
    return [
        f"{name} has width {tensor.shape[-1]}; kernels serve up to {WIDEST}"
        for name in ("query", "value")
        if (tensor := tensors[name]) is not None and tensor.shape[-1] > WIDEST
    ]


def common_options(row: Mechanism, sizes: Sizes, causal: bool | str, scale: float | None, dropout_p: float) -> dict[str, Any]:
    """Causal alignment, scale and dropout, checked."""
    return {
        "causal": arguments.alignment(row, causal, sizes["m"], sizes.get("n", sizes["m"])),
        "scale": sizes["d"] ** -0.5 if scale is None else arguments.finite(row, "scale", scale),
        "dropout_p": arguments.probability(row, "dropout_p", dropout_p),
    }


def work(sizes: Sizes, itemsize: int, pairs: int, keys_read: int) -> Work:
    """Of `pairs` (query, key) pairs in each head, all inputs and outputs moved once."""
    b, h, g, m, d, e = (sizes[axis] for axis in "bhgmde")
    moved = itemsize * b * (h * m * (d + e) + g * keys_read * (d + e)) + 4 * b * h * m
    return Work(flops=2.0 * b * h * pairs * (d + e), bytes=float(moved), exponentials=float(b * h * pairs))


def case(name: str, b: int, h: int, g: int, m: int, n: int, d: int, e: int, **options: Any) -> Case:
    """A call with as many keys as are said."""
    return Case(name, {"b": b, "h": h, "g": g, "m": m, "n": n, "d": d, "e": e}, options)


def probes(width: int, plain: bool, **options: Any) -> tuple[Case, ...]:
    """The call with nothing riding along, or the one with everything, of `options`."""
    if plain:
        return (case("causal", 2, 8, 4, 1024, 1024, width, width, causal="top_left", **options),)
    riders: Options = {"causal": "bottom_right", "key_padding_mask": "random", "dropout_p": 0.1}
    return (case("everything", 2, 8, 4, 1000, 1000, width - 4, width - 4, **riders, **options),)
