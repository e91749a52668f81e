"""The norms and scales of OpenCLIP's residual blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triton_attn import add_layer_norm


class LayerNorm(nn.LayerNorm):
    """torch's, whose result has its input's dtype under autocast too, as OpenCLIP's has."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(input.dtype)


class LayerScale(nn.Module):
    """gamma x, a factor for each feature."""

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


def added_norm(branch: Tensor, residual: Tensor, norm: nn.Module, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """(norm(alpha residual + branch), the sum), in one pass where the norm is ours and has no hooks."""
    if type(norm) is LayerNorm and branch.dtype == residual.dtype and not _hooked(norm):
        with torch.autocast(branch.device.type, enabled=False):  # which would round the sum
            out, total = add_layer_norm(branch, residual, norm.weight, norm.bias, alpha=alpha, eps=norm.eps, return_sum=True)
        return out, total
    total = (residual if alpha == 1.0 else alpha * residual) + branch
    return norm(total), total


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
