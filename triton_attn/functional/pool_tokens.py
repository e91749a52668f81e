"""Pooling of tokens: means over the cells of a grid that know how much each counts; the public call and its row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Law, Mechanism, Options, Output, Sizes, Tensors, Work
from triton_attn.portable.pool_tokens import pool_tokens as portable
from triton_attn.reference.pool_tokens import bound
from triton_attn.reference.pool_tokens import pool_tokens as reference

WIDEST = 256  # of a kernel


def pool_tokens(
    x: Tensor,
    *,
    rows: int = 1,
    count: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    return_count: bool = False,
) -> Any:
    """Means of tokens over cells of 2 x 2 of a grid, of 2 in a sequence, each token weighted by how many it stands for.

    out_c = sum_{t in c} w_t x_t / W_c with W_c = sum_{t in c} w_t, summed in float32; 0 in a cell without any weight. At odd ends cells
    have fewer tokens. Pooling again with the counts of the first pass gives the means of larger cells.

    Args:
        x: (B, H, N, D), float16, bfloat16, float32 or float64; the grid's tokens row by row. Any strides; it is not copied.
        rows: of the grid; it divides N. 1: a sequence, whose cells are 1 x 2.
        count: w, (B, N), 0 and more, float32 (float64 for float64); no gradient. None: each token counts once.
        key_padding_mask: (B, N) boolean, True = ignore: w is 0. What lies where w is 0, NaN included, reaches nothing.
        return_count: also return W.

    Returns:
        (B, H, C, D) in x's dtype, contiguous, C = ceil(rows / min(rows, 2)) ceil(N / rows / 2); with return_count also W, (B, C), like
        count, which has no gradient.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: the pooling stages of RippleAttention of Linear-ViT, over the image's two axes and weighted by counts.
    """
    tensors = {"x": x, "count": count, "key_padding_mask": key_padding_mask}
    options = {"rows": arguments.whole(ROW, "rows", rows, 1)}
    sizes = arguments.check(ROW, tensors)
    if sizes["n"] % rows:
        raise arguments.ArgumentError(ROW.name, "rows", f"is {rows}; allowed: a divisor of the {sizes['n']} tokens")
    arguments.at_least(ROW, "x", "width", sizes["d"], 1)
    return operators.run(ROW, tensors, options, arguments.flag(ROW, "return_count", return_count))


def _code() -> Code:
    from triton_attn.kernels.pool_tokens import SPACES, pool_tokens, pool_tokens_backward, tile_key

    return Code(pool_tokens, pool_tokens_backward, SPACES, tile_key)


def _wide(tensors: Tensors, options: Options) -> list[str]:
    width = tensors["x"].shape[-1]
    return [f"x is {width} wide; heads up to {WIDEST} fit into registers"] if width > WIDEST else []


def _cells(sizes: Sizes, options: Options) -> Sizes:
    """Tokens that fill the rows, and their cells."""
    rows = options.get("rows", 1)
    height, columns = min(rows, 2), sizes["n"] // rows
    return {"n": rows * columns, "c": (rows + height - 1) // height * ((columns + 1) // 2)}


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    """No matrix products: a multiply-add for each number that is read."""
    b, h, n, c, d = (sizes[axis] for axis in "bhncd")
    return Work(flops=2.0 * b * h * n * d, bytes=float(itemsize * b * h * d * (n + c) + 4 * b * (n + c)))


def _average_pool(x: Tensor, *, rows: int = 1, count: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
    """torch's own pooling of channels first, for tokens that count alike."""
    if count is not None or key_padding_mask is not None:
        raise NotImplementedError("its tokens have no weights")
    heads, width = x.shape[1], x.shape[3]
    channels = torch.unflatten(x, 2, (rows, x.shape[2] // rows)).permute(0, 1, 4, 2, 3).flatten(1, 2)
    pooled = F.avg_pool2d(channels, (min(rows, 2), 2), ceil_mode=True)
    return torch.unflatten(pooled, 1, (heads, width)).permute(0, 1, 3, 4, 2).flatten(2, 3)


def _case(name: str, b: int, h: int, n: int, d: int, **options: Any) -> Case:
    sizes = {"b": b, "h": h, "n": n, "d": d}
    return Case(name, {**sizes, **_cells(sizes, options)}, options)


_HIDDEN: Options = {"count": "positive", "key_padding_mask": "random"}

ROW = Mechanism(
    name="pool_tokens",
    summary="means of tokens over the cells of a grid, weighted by counts",
    function=pool_tokens,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(Kernel("cells", ((8, 0), (9, 0)), _code, (Launch("forward"), Launch("backward", ("x",))), _wide),),
    inputs={
        "x": Input("b h n d", differentiable=True),
        "count": Input("b n", optional=True, dtype="float32", sign=1),
        "key_padding_mask": Input("b n", kind="padding"),
    },
    options={"rows": "int"},
    outputs={"out": Output("b h c d"), "pooled_count": Output("b c", "float32", differentiable=False)},
    more="return_count",
    work=_work,
    cases=(
        _case("a sequence", 2, 2, 41, 20),
        _case("a grid", 1, 2, 3 * 21, 16, rows=3),
        _case("a grid, several blocks", 1, 2, 9 * 11, 16, rows=9),
        _case("counted", 2, 1, 3 * 10, 24, rows=3, count="positive"),
        _case("padded", 2, 2, 3 * 11, 16, rows=3, key_padding_mask="random"),
        _case("counted and padded", 2, 2, 37, 16, **_HIDDEN),
    ),
    probes=lambda width, plain: (_case("everything", 2, 8, 63 * 63, width, rows=63, **_HIDDEN),),
    workloads={
        "cpu": (_case("64 x 64 tokens", 1, 12, 4096, 64, rows=64),),
        "cuda": (_case("64 x 64 tokens, batch 16", 16, 12, 4096, 64, rows=64), _case("64k tokens", 1, 16, 65536, 64)),
    },
    peers={"F.avg_pool2d": _average_pool},
    laws=(Law.BATCH_CHANGES_NOTHING,),
    equal_lengths=lambda options: False,
    derived=_cells,
    backward_share=1.0,
)
