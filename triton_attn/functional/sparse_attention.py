"""Sparse attention by a rule: which keys are kept is chosen here, the attention is `subset_attention`'s and its neighbours'."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, dispatch
from triton_attn.arguments import ArgumentError, ArgumentTypeError
from triton_attn.functional import _softmax as softmax
from triton_attn.functional.attention import attention
from triton_attn.functional.local_global_attention import local_global_attention
from triton_attn.functional.strided_attention import ROW as STRIDED
from triton_attn.functional.strided_attention import strided_attention
from triton_attn.functional.subset_attention import subset_attention

SELECTIONS = ("uniform", "random", "topk", "window", "fixed", "strided")
_NAME = "sparse_attention"
_CHECKED = replace(STRIDED, name=_NAME)  # the same tensors, in messages by the name that was called


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keep_ratio: float | None = None,
    indices: Tensor | None = None,
    selection: str = "uniform",
    score: Tensor | None = None,
    block: int | None = None,
    include_self: bool = True,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Softmax attention to some of the keys, chosen by a rule, and to each query's own key.

    With K = max(1, ceil(keep_ratio Nk)) the rules are
    - "uniform": keys floor(t Nk / K); the first is always among them;
    - "random": K keys drawn from torch's generator, anew in every call;
    - "topk": the K keys of the highest `score`, or of the longest vectors, for each item and key head;
    - "window": h keys on each side of the query and its own, h the largest for which no more than keep_ratio of all pairs are kept
      (local_global_attention). 2 h + 1 is odd: where K is even and small, K - 1 keys;
    - "fixed" and "strided": Child et al.'s two patterns in O(N sqrt(N)), in blocks of `block` = ceil(sqrt(N)) if None. "fixed": the
      query's own block and the last key of every block. "strided": the `block` keys before the query, and those whose distance
      from it is a multiple of `block`; causal by definition.

    Args:
        query: (B, H, Nq, D), as in `triton_attn.attention`.
        key: (B, Hk, Nk, D).
        value: (B, Hk, Nk, E).
        keep_ratio: the share of keys that is kept, above 0 to 1; for the first four rules.
        indices: the kept keys themselves in place of a rule: (K,), (B, K) or (B, Hk, K), duplicates counting once.
        selection: the rule.
        score: (B, Nk), for "topk". Its choice has no gradient.
        block: 1 and more, for "fixed" and "strided".
        include_self: query i also sees key i; Nq must be Nk. False only with the first three rules or indices.
        key_padding_mask: (B, Nk) boolean, True = ignore. "topk" chooses among the others.
        causal: as in `triton_attn.attention`; True for "strided".
        scale: multiplies the scores; D ** -0.5 if None.
        dropout_p: share of attention weights set to zero, as in `triton_attn.attention`.
        return_lse: also return the log-sum-exp.

    Returns:
        As `triton_attn.attention`.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: the sparse residual block of an OpenCLIP fork, as it was meant; Child et al., "Generating Long Sequences with Sparse
    Transformers", 2019, for "fixed" and "strided".
    """
    arguments.choice(_CHECKED, "selection", selection, SELECTIONS)
    _only_with("score", score, selection, ("topk",))
    _only_with("block", block, selection, ("fixed", "strided"))
    sizes = softmax.check(_CHECKED, {"query": query, "key": key, "value": value, "key_padding_mask": key_padding_mask, "seed": None})
    softmax.common_options(_CHECKED, sizes, causal, scale, dropout_p)
    _own_keys(sizes["m"], sizes["n"], selection, include_self)
    common: dict[str, Any]
    common = {"key_padding_mask": key_padding_mask, "causal": causal, "scale": scale, "dropout_p": dropout_p, "return_lse": return_lse}
    if selection in ("fixed", "strided"):
        for name, given in (("keep_ratio", keep_ratio), ("indices", indices)):
            if given is not None:
                raise ArgumentError(_NAME, name, f"is given; allowed with selection={selection!r}: None")
        return _in_blocks(query, key, value, selection, block, **common)
    if (keep_ratio is None) == (indices is None):
        raise ArgumentError(
            _NAME, "keep_ratio", f"and indices are {'both' if indices is not None else 'not'} given; allowed: one of the two"
        )
    if indices is not None:
        if selection != "uniform":
            raise ArgumentError(_NAME, "selection", f"is {selection!r}; allowed with indices: the default")
        return subset_attention(query, key, value, indices=indices, include_self=include_self, **common)
    ratio = _ratio(keep_ratio)
    if selection == "window":
        return local_global_attention(query, key, value, window=2 * _half(sizes["n"], ratio), **common)
    kept = min(max(1, math.ceil(ratio * sizes["n"])), sizes["n"])
    chosen = _chosen(key, selection, kept, score, key_padding_mask)
    return subset_attention(query, key, value, indices=chosen, include_self=include_self, **common)


def _own_keys(m: int, n: int, selection: str, include_self: bool) -> None:
    arguments.flag(_CHECKED, "include_self", include_self)
    if not include_self and selection in ("window", "fixed", "strided"):
        raise ArgumentError(_NAME, "include_self", f"is False; allowed with selection={selection!r}: True")
    if include_self and m != n:
        instead = " or include_self=False" if selection in ("uniform", "random", "topk") else ""
        raise ArgumentError(_NAME, "query", f"has {m} positions, key {n}; allowed with selection={selection!r}: as many of each{instead}")


def _only_with(name: str, given: object, selection: str, allowed: tuple[str, ...]) -> None:
    if given is not None and selection not in allowed:
        raise ArgumentError(_NAME, name, f"is given; allowed with selection={selection!r}: None")


def _ratio(keep_ratio: float | None) -> float:
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, (int, float)) or not 0.0 < keep_ratio <= 1.0:
        raise ArgumentError(_NAME, "keep_ratio", f"is {keep_ratio!r}; allowed: above 0 to 1")
    return keep_ratio


def _half(n: int, keep_ratio: float) -> int:
    """The largest h for which n queries with h keys on each side, fewer at the ends, see no more than keep_ratio n ** 2 keys together.

    With u = h + 1/2 they see 2 n u - u ** 2 + 1/4, whose quarter is left out: a graph takes seconds for a root of a symbol.
    """
    return max(math.floor(n * (1.0 - math.sqrt(1.0 - keep_ratio)) - 0.5), 0)


def _chosen(key: Tensor, selection: str, kept: int, score: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
    b, g, n = key.shape[:3]
    if selection == "uniform":
        return torch.arange(kept, device=key.device) * n // max(kept, 1)
    if selection == "random":
        # a call that is only explained leaves the generator alone
        return (torch.arange if dispatch.explaining() else torch.randperm)(n, device=key.device)[:kept]
    ranked = key.detach().float().norm(dim=-1) if score is None else _scored(key, score)[:, None].expand(b, g, n)
    if key_padding_mask is not None:
        least = -math.inf if ranked.is_floating_point() else torch.iinfo(ranked.dtype).min
        ranked = ranked.masked_fill(key_padding_mask[:, None], least)
    top: Tensor = ranked.topk(kept).indices
    return top


def _scored(key: Tensor, score: Tensor) -> Tensor:
    wanted = (key.shape[0], key.shape[2])
    if not isinstance(score, Tensor):
        raise ArgumentTypeError(_NAME, "score", f"is a {type(score).__name__}; allowed: torch.Tensor")
    if score.dtype == torch.bool or score.is_complex():
        raise ArgumentTypeError(_NAME, "score", f"has dtype {score.dtype}; allowed: of real numbers")
    if score.shape != wanted:
        raise ArgumentError(_NAME, "score", f"has shape {tuple(score.shape)}; allowed: {wanted}")
    if score.device != key.device:
        raise ArgumentError(_NAME, "score", f"is on {score.device}, key on {key.device}; they must be on one device")
    return score.detach()


def _in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: str,
    block: int | None,
    *,
    key_padding_mask: Tensor | None,
    causal: bool | str,
    scale: float | None,
    dropout_p: float,
    return_lse: bool,
) -> Any:
    """Two calls, each seeing keys that the other does not, joined by their log-sum-exps."""
    if selection == "strided" and not causal:
        raise ArgumentError(_NAME, "causal", "is False; allowed with selection='strided': True")
    length = _root(key.shape[2]) if block is None else arguments.whole(_CHECKED, "block", block, 1)
    common: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "return_lse": True}
    if selection == "fixed":
        far = strided_attention(
            query, key, value, stride=length, phase=length - 1, key_padding_mask=key_padding_mask, causal=bool(causal), **common
        )
        near = _own_block(query, key, value, length, key_padding_mask, bool(causal), common)
    else:
        near = local_global_attention(query, key, value, window=2 * length, key_padding_mask=key_padding_mask, causal=True, **common)
        far = _same_residue(query, key, value, length, key_padding_mask, common)
    out, lse = near if far is None else _joined(*near, *far)
    return (out, lse) if return_lse else out


def _root(n: int) -> int:
    """max(1, ceil(sqrt(n))) by comparisons, which a graph is guarded by: it serves the lengths that have this root."""
    low, high = 0, 1
    while high * high < n:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle * middle < n else (low, middle)
    return high


def _own_block(
    query: Tensor, key: Tensor, value: Tensor, length: int, padding: Tensor | None, causal: bool, common: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Each query against its own block, but for the block's last key."""
    n = query.shape[2]
    folded = [_blocks(x, length).transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # (B blocks, H, length, D)
    hidden = _blocks(_padding(query, padding), length, fill=True).clone()
    hidden[..., -1] = True
    out, lse = attention(*folded, key_padding_mask=hidden.flatten(0, 1), causal=causal, **common)

    def back(x: Tensor) -> Tensor:
        return x.view(*hidden.shape[:2], *x.shape[1:]).transpose(1, 2).flatten(2, 3)[:, :, :n]

    return back(out), back(lse)


def _same_residue(
    query: Tensor, key: Tensor, value: Tensor, length: int, padding: Tensor | None, common: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Each query against the earlier keys of its residue class that lie two blocks and more behind it."""
    n = query.shape[2]
    folded = [_blocks(x, length).permute(0, 3, 1, 2, 4).flatten(0, 1) for x in (query, key, value)]  # (B length, H, blocks, D)
    rows, (keys, values) = folded[0], (x[:, :, :-2] for x in folded[1:])
    if keys.shape[2] == 0:
        return None
    hidden = None if padding is None else _blocks(padding, length, fill=True).transpose(1, 2).flatten(0, 1)[:, :-2]
    out, lse = attention(rows, keys, values, key_padding_mask=hidden, causal="bottom_right", **common)

    def back(x: Tensor) -> Tensor:
        return x.view(query.shape[0], length, *x.shape[1:]).movedim(1, 3).flatten(2, 3)[:, :, :n]

    return back(out), back(lse)


def _blocks(x: Tensor, length: int, fill: bool = False) -> Tensor:
    """(..., N, D), or a mask (B, N), with N in blocks of a length; what is missing at the end is zero, or `fill`."""
    axis = 1 if x.dtype == torch.bool else 2
    short = -x.shape[axis] % length
    if short:
        x = F.pad(x, (0, short), value=fill) if axis == 1 else F.pad(x, (0, 0, 0, short))
    return x.reshape(*x.shape[:axis], x.shape[axis] // length, length, *x.shape[axis + 1 :])


def _padding(query: Tensor, padding: Tensor | None) -> Tensor:
    return torch.zeros(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device) if padding is None else padding


def _joined(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax of two: weights exp(lse_i) over their sum. Rows that see nothing stay 0 and -inf."""
    top = torch.maximum(lse, more_lse).detach()
    seen = top > -math.inf
    top = top.where(seen, 0.0)
    a, b = _share(lse, top), _share(more_lse, top)
    total = (a + b).where(seen, 1.0)
    joint = (out * a[..., None] + more * b[..., None]) / total[..., None]
    return joint.to(out.dtype), (top + total.log()).masked_fill(~seen, -math.inf)


def _share(lse: Tensor, top: Tensor) -> Tensor:
    """exp(lse - top). -inf is replaced on both sides of it: what differentiates such a row's log-sum-exp twice is NaN, and ends there."""
    seen = lse > -math.inf
    return (lse.where(seen, top) - top).exp().where(seen, 0.0)


__all__ = ["SELECTIONS", "sparse_attention"]
