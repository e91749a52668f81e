"""Which entries dropout keeps: a pure function of (seed, batch * heads + head, query, key), the same in every backend.

Philox 4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), as in Triton and cuRAND. One
counter (key // 4, query, batch * heads + head, 0) serves four keys; the key's remainder picks one of its four words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def threshold(dropout_p: float) -> int:
    """Words are compared by their upper 31 bits: below this, the entry is dropped."""
    return min(round(dropout_p * 2**31), 2**31 - 1)


def rescale(dropout_p: float) -> float:
    """What kept entries are multiplied by; 0 where nothing is kept."""
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def keep(seed: Tensor, dropout_p: float, heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Boolean (heads, queries, keys) from the indices of each; seed () int64."""
    quarter, lane = keys // 4, keys % 4
    words = philox(seed, quarter, queries[:, None], heads[:, None, None])
    lane = lane.expand(words.shape[1:])
    word = words.gather(0, lane[None])[0]
    return (word >> 1) >= threshold(dropout_p)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Four 32-bit words (4, ...) held in int64, for counters (c0, c1, c2, 0) and a 64-bit seed."""
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    a, b, c, d = torch.broadcast_tensors(c0, c1, c2, zero)  # type: ignore[no-untyped-call]
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        # int64 products wrap, but their bits are the unsigned product's
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & _WORD) ^ b ^ key0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ d ^ key1,
            first & _WORD,
        )
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return torch.stack((a, b, c, d))
