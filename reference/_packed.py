"""Sequences of any lengths, packed one behind the other: which keys each query sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def visible(query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, window_size: Sequence[int]) -> Tensor:
    """Boolean (Nq, Nk): which key each query sees. A query's place among the keys counts from the end of its sequence."""
    rows, columns = (torch.arange(x.shape[0], device=query.device) for x in (query, key))
    in_q, in_k = (
        (offsets[:-1] <= places[:, None]) & (places[:, None] < offsets[1:])
        for offsets, places in ((cu_seqlens_q, rows), (cu_seqlens_k, columns))
    )
    seen = (in_q[:, None] & in_k[None]).any(-1)
    # distance to the end of the own sequence, of a query and of a key
    left_q, left_k = (
        (member * (offsets[1:] - places[:, None])).sum(-1)
        for member, offsets, places in ((in_q, cu_seqlens_q, rows), (in_k, cu_seqlens_k, columns))
    )
    ahead = left_q[:, None] - left_k[None]
    if causal:
        seen = seen & (ahead <= 0)
    if window_size[0] >= 0:
        seen = seen & (ahead >= -window_size[0])
    if window_size[1] >= 0:
        seen = seen & (ahead <= window_size[1])
    return seen
