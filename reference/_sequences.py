"""Which steps of a packed row belong to one sequence."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def same_sequence(seq_idx: Tensor, distance: int) -> Tensor:
    """(B, 1, L): whether a step has a step so far before it, in its own sequence."""
    earlier = seq_idx[:, : max(seq_idx.shape[1] - distance, 0)]
    same = earlier == seq_idx[:, seq_idx.shape[1] - earlier.shape[1] :]
    return F.pad(same, (seq_idx.shape[1] - earlier.shape[1], 0))[:, None]
