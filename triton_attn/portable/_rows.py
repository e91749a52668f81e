"""Softmax attention a block of query rows at a time over pieces of the keys: what torch's fused call lacks (lse, our dropout, unions)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triton_attn.reference import _dropout

SCORES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Piece:
    """Keys (B, Hk, N, D) and values that a block of queries visits; `seen` (broadcastable to (B, H, M, N)) hides some of them.

    `columns` (N,) or (B, Hk, N) are the positions that dropout knows them by; `added` is added to their scores.
    """

    key: Tensor
    value: Tensor
    columns: Tensor
    seen: Tensor | None = None
    added: Tensor | None = None


Visit = Callable[[int, int], Sequence[Piece]]  # the pieces that queries start..stop visit


def by_rows(
    query: Tensor,
    visit: Visit,
    visited: int,
    *,
    first: int = 0,
    most: int | None = None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a softmax over the union of the pieces.

    `visited` is about how many keys a block of queries visits; `most` is how many queries a block has where that number grows with it;
    `first` is the position of the first query. A captured graph has one block of all queries, in O(queries visited) memory.
    """
    b, h, m = query.shape[:3]
    rows = max(1, SCORES_AT_ONCE // max(b * h * visited, 1))
    rows = rows if most is None else min(rows, most)
    if torch.compiler.is_compiling():
        rows = m  # a graph for every length has no loop
    # torch.func refuses the hooks of a checkpoint
    again = torch.is_grad_enabled() and rows < m and not torch._C._are_functorch_transforms_active()

    def block(start: int, stop: int) -> tuple[Tensor, Tensor]:
        pieces = visit(first + start, first + stop)
        return _attend(query[:, :, start:stop], pieces, first + start, scale, dropout_p, seed)

    parts = []
    for start in range(0, m, rows) if rows is not m and m else (0,):
        place = (start, min(start + rows, m))
        # recomputed in the backward pass, or every score would be kept for it
        parts.append(checkpoint(block, *place, use_reentrant=False) if again else block(*place))
    outs, lses = zip(*parts, strict=True)
    return (torch.cat(outs, 2), torch.cat(lses, 2)) if len(outs) > 1 else (outs[0], lses[0])


def _attend(
    query: Tensor, pieces: Sequence[Piece], start: int, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = torch.cat([_scores(query, piece, scale) for piece in pieces], -1) if len(pieces) > 1 else _scores(query, pieces[0], scale)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)).exp()
    sizes = [piece.key.shape[2] for piece in pieces]
    parts = zip(torch.split(weights, sizes, -1) if len(pieces) > 1 else (weights,), pieces, strict=True)
    products = [_product(_thinned(part, piece, start, dropout_p, seed), piece) for part, piece in parts]
    out = products[0] if len(products) == 1 else torch.stack(products).sum(0)
    return out, lse[..., 0]


def _scores(query: Tensor, piece: Piece, scale: float) -> Tensor:
    (b, h, m, d), (g, n) = query.shape, piece.key.shape[1:3]
    # heads that share a key stand below one another, so that one product serves them
    folded = query.reshape(b, g, h // max(g, 1) * m, d)
    # in half precision a score may overflow, and is rounded to what exp makes a large error of
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (folded.to(wide) @ piece.key.to(wide).mT).view(b, h, m, n) * scale
    if piece.added is not None:
        scores = scores + piece.added
    return scores if piece.seen is None else scores.masked_fill(~piece.seen, -math.inf)


def _thinned(weights: Tensor, piece: Piece, start: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    if dropout_p == 0:
        return weights
    assert seed is not None
    b, h, m, n = weights.shape
    heads, queries = (torch.arange(first, first + size, device=weights.device) for first, size in ((0, b * h), (start, m)))
    columns = piece.columns
    if columns.ndim > 1:
        columns = columns.repeat_interleave(h // columns.shape[1], 1).reshape(b * h, 1, n)
    kept = _dropout.keep(seed, dropout_p, heads, queries, columns)
    return weights * kept.view(b, h, m, n) * _dropout.rescale(dropout_p)


def _product(weights: Tensor, piece: Piece) -> Tensor:
    (b, h, m, n), g, e = weights.shape, piece.value.shape[1], piece.value.shape[-1]
    # float16 has no room for small weights, and on a CPU no faster products
    value = piece.value.float() if piece.value.dtype == torch.float16 else piece.value
    product = weights.to(value.dtype).reshape(b, g, h // max(g, 1) * m, n) @ value
    return product.to(piece.value.dtype).view(b, h, m, e)
