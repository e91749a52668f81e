"""Of the carried state, which linear attention and hydra run."""

from __future__ import annotations

from triton_attn.testing.equivalents.argument import Argument

CARRIED: tuple[Argument, ...] = ()
