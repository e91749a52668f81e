"""OpenCLIP's Transformer with any of the residual blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triton_attn import ArgumentError, arguments
from triton_attn.nn._block_norms import LayerNorm
from triton_attn.nn.deep_norm_block import DeepNormResidualAttentionBlock
from triton_attn.nn.parallel_block import ParallelResidualAttentionBlock
from triton_attn.nn.residual_blocks import (
    LinearAttentionResidualBlock,
    ResidualAttentionBlock,
    SparseAttentionResidualBlock,
    SubLNResidualAttentionBlock,
)

BLOCK_TYPES: dict[str, type[ResidualAttentionBlock]] = {
    "standard": ResidualAttentionBlock,
    "parallel": ParallelResidualAttentionBlock,
    "linear": LinearAttentionResidualBlock,
    "deepnorm": DeepNormResidualAttentionBlock,
    "sparse": SparseAttentionResidualBlock,
    "subln": SubLNResidualAttentionBlock,
}


class EnhancedTransformer(nn.Module):
    """Residual blocks one after the other.

    Args:
        width: of tokens.
        layers: how many blocks.
        heads: a divisor of width.
        mlp_ratio, ls_init_value, act_layer, norm_layer: of every block.
        block_type: "standard", "parallel", "linear", "deepnorm", "sparse" or "subln".
        batch_first: tokens are (B, N, width), as since OpenCLIP 2.26, whatever its own batch_first says; False: (N, B, width), before it.
        options: further arguments of the block, such as sparsity_ratio. "deepnorm" gets num_layers and layer_depth by itself.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: Transformer of OpenCLIP, whose state dicts load, with EnhancedTransformer's choice of blocks of a DA-CLIP fork.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        block_type: str = "standard",
        batch_first: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        block = BLOCK_TYPES[arguments.choice(self, "block_type", block_type, tuple(BLOCK_TYPES))]
        self.width, self.layers, self.block_type = width, arguments.whole(self, "layers", layers, 0), block_type
        self.batch_first = batch_first
        self.grad_checkpointing = False
        common: dict[str, Any] = {"mlp_ratio": mlp_ratio, "ls_init_value": ls_init_value, "act_layer": act_layer, "norm_layer": norm_layer}
        depths = [{"num_layers": layers, "layer_depth": i + 1} if block_type == "deepnorm" else {} for i in range(layers)]
        self.resblocks = nn.ModuleList(block(width, heads, batch_first=batch_first, **common, **{**depth, **options}) for depth in depths)

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def get_cast_dtype(self) -> torch.dtype:
        """Of the weights."""
        block: Any = self.resblocks[0]
        dtype: torch.dtype = block.get_weight_dtype()
        return dtype

    def set_grad_checkpointing(self, enable: bool = True, impl: str = "inline") -> None:
        """Compute each block again in the backward pass, in place of keeping what it computed."""
        if impl != "inline":
            raise ArgumentError(self.name, "impl", f"is {impl!r}; allowed: 'inline'")
        self.grad_checkpointing = enable

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, output_hiddens: bool = False, control: Sequence[Tensor] | None = None
    ) -> Any:
        """Every block.

        Args:
            x: (B, N, width), without batch_first (N, B, width).
            attn_mask: as in the blocks.
            output_hiddens: also return the output of every block, before its control is added, as DA-CLIP asks for it.
            control: what is added after each block, the last one first; never changed (the original empties it).

        Returns:
            Of x's shape; with output_hiddens also a list.

        Raises:
            ArgumentError: control has another length.
            Unsupported: a mask that the blocks cannot honour.
        """
        if control is not None and len(control) != self.layers:
            raise ArgumentError(self.name, "control", f"has {len(control)} tensors; allowed: {self.layers}, one for each layer")
        hiddens = []
        for i, block in enumerate(self.resblocks):
            x = self._run(block, x, attn_mask)
            hiddens.append(x)
            if control is not None:
                x = x + control[-1 - i]
        return (x, hiddens) if output_hiddens else x

    def forward_intermediates(
        self, x: Tensor, attn_mask: Tensor | None = None, indices: int | Sequence[int] | None = None, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The output and those of some blocks.

        Args:
            x: (B, N, width), without batch_first (N, B, width).
            attn_mask: as in the blocks.
            indices: None: every block; a number: the last so many; otherwise the blocks, from the end if negative.
            stop_early: no block after the last that is asked for.

        Returns:
            (output, list), the list in the order of the blocks.
        """
        taken, last = self._taken(indices)
        found = []
        for i, block in enumerate(self.resblocks):
            if stop_early and i > last:
                break
            x = self._run(block, x, attn_mask)
            if i in taken:
                found.append(x)
        return x, found

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1) -> list[int]:
        """Drop the blocks after the last that is asked for, and return which are."""
        taken, last = self._taken(indices)
        self.resblocks = self.resblocks[: last + 1]
        self.layers = len(self.resblocks)
        return sorted(taken)

    def _run(self, block: nn.Module, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, x, None, None, attn_mask, use_reentrant=False)
            return again
        out: Tensor = block(x, attn_mask=attn_mask)
        return out

    def _taken(self, indices: int | Sequence[int] | None) -> tuple[set[int], int]:
        if indices is None:
            wanted = list(range(self.layers))
        elif isinstance(indices, int):
            wanted = list(range(self.layers - indices, self.layers))
        else:
            wanted = [index + self.layers if index < 0 else index for index in indices]
        if not wanted or min(wanted) < 0 or max(wanted) >= self.layers:
            raise ArgumentError(self.name, "indices", f"is {indices}; allowed: blocks of {self.layers}")
        return set(wanted), max(wanted)
