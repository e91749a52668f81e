"""transformers' CLIPModel with random weights, small: 4 text blocks, 5 vision blocks, 4 x 4 patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

WIDTH, JOINT, SIDE, PATCHES, TOKENS, END = 24, 16, 32, 16, 9, 30


def small_clip(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    text = {"hidden_size": JOINT, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 32}
    vision = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 3}
    config = transformers.CLIPConfig(
        text_config={**text, "max_position_embeddings": TOKENS, "eos_token_id": END},
        vision_config={**vision, "image_size": SIDE, "patch_size": 8},
        projection_dim=JOINT,
    )
    return transformers.CLIPModel(config).to(dtype).eval()


def texts(*lead: int, length: int = 6) -> Tensor:
    """(..., TOKENS) words, an end, padding."""
    found = torch.randint(1, END, (*lead, TOKENS))
    found[..., length - 1] = END
    found[..., length:] = 0
    return found


def pictures(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, dtype=dtype)
