"""Sparse attention by a rule: which keys are kept is chosen here, the attention is `subset_attention`'s and its neighbours'."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments
from triton_attn.arguments import ArgumentError
from triton_attn.functional import _softmax as softmax
from triton_attn.functional.attention import attention
from triton_attn.functional.local_global_attention import local_global_attention
from triton_attn.functional.strided_attention import ROW as STRIDED
from triton_attn.functional.strided_attention import strided_attention
from triton_attn.functional.subset_attention import subset_attention

SELECTIONS = ("uniform", "random", "topk", "window", "fixed", "strided")
_NAME = "sparse_attention"


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
    - "window": the keys around the query, K at the most (local_global_attention);
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
    if selection not in SELECTIONS:
        raise ArgumentError(_NAME, "selection", f"is {selection!r}; allowed: {', '.join(map(repr, SELECTIONS))}")
    _only_with("score", score, selection, ("topk",))
    _only_with("block", block, selection, ("fixed", "strided"))
    if not include_self and selection in ("window", "fixed", "strided"):
        raise ArgumentError(_NAME, "include_self", f"is {include_self!r}; allowed with selection={selection!r}: True")
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
    kept = _kept(key, keep_ratio)
    if selection == "window":
        return local_global_attention(query, key, value, window=max(kept - 1, 0), **common)
    chosen = _chosen(key, selection, kept, score, key_padding_mask)
    return subset_attention(query, key, value, indices=chosen, include_self=include_self, **common)


def _only_with(name: str, given: object, selection: str, allowed: tuple[str, ...]) -> None:
    if given is not None and selection not in allowed:
        raise ArgumentError(_NAME, name, f"is given; allowed with selection={selection!r}: None")


def _kept(key: Tensor, keep_ratio: float | None) -> int:
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, (int, float)) or not 0.0 < keep_ratio <= 1.0:
        raise ArgumentError(_NAME, "keep_ratio", f"is {keep_ratio!r}; allowed: above 0 to 1")
    return min(max(1, math.ceil(keep_ratio * key.shape[2])), key.shape[2])


def _chosen(key: Tensor, selection: str, kept: int, score: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
    b, g, n = key.shape[:3]
    if selection == "uniform":
        return torch.arange(kept, device=key.device) * n // max(kept, 1)
    if selection == "random":
        return torch.randperm(n, device=key.device)[:kept]
    if score is None:
        ranked = key.detach().float().norm(dim=-1)
    elif score.shape != (b, n):
        raise ArgumentError(_NAME, "score", f"has shape {tuple(score.shape)}; allowed: {(b, n)}")
    else:
        ranked = score.detach()[:, None].expand(b, g, n)
    if key_padding_mask is not None:
        ranked = ranked.masked_fill(key_padding_mask[:, None], -math.inf)
    top: Tensor = ranked.topk(kept).indices
    return top


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
    sizes = softmax.check(STRIDED, {"query": query, "key": key, "value": value, "key_padding_mask": key_padding_mask, "seed": None})
    n = sizes["n"]
    if sizes["m"] != n:
        raise ArgumentError(_NAME, "query", f"has {sizes['m']} positions, key {n}; allowed with selection={selection!r}: as many of each")
    if selection == "strided" and not causal:
        raise ArgumentError(_NAME, "causal", "is False; allowed with selection='strided': True")
    length = max(math.isqrt(max(n - 1, 0)) + 1, 1) if block is None else arguments.whole(STRIDED, "block", block, 1)
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
        return x.view(query.shape[0], -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)[:, :, :n]

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
        return x.view(query.shape[0], -1, *x.shape[1:]).movedim(1, 3).flatten(2, 3)[:, :, :n]

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
    """One softmax of two: weights exp(lse_i - lse). Rows that see nothing stay 0 and -inf, without a NaN in their gradients."""
    least = torch.finfo(lse.dtype).min / 4
    a, b = lse.clamp(min=least), more_lse.clamp(min=least)
    both = torch.logaddexp(a, b)
    joint = out * (a - both).exp().to(out.dtype)[..., None] + more * (b - both).exp().to(out.dtype)[..., None]
    return joint, both.masked_fill((lse == -math.inf) & (more_lse == -math.inf), -math.inf)


__all__ = ["SELECTIONS", "sparse_attention"]
