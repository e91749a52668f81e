"""How the class token's attention spreads over an image, for any attention, from its own arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triton_attn.models import VisionTransformer


def class_attention(model: VisionTransformer, images: Tensor) -> Tensor:
    r"""(B, rows, columns) of the last block, the mean over heads, each image's shares summing to 1.

    The share of patch j in head h is $\lVert \partial (u^\top o) / \partial v_{jh} \rVert$ over the sum of it over all patches, with o
    the class token's output of the block's attention and u its own direction. Where o is a mean of values, as in dense attention,
    that is the attention weight itself; where values are pooled or branches fused, it is what is left of it at the patch.

    Args:
        model: in evaluation mode.
        images: (B, channels, side, side), as the model takes them.
    """
    held: dict[str, Tensor] = {}
    attention: Any = model.transformer[-1].attn
    source: nn.Module = attention.to_v if hasattr(attention, "to_v") else attention.to_qkv

    def keep_values(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        # a part of the graph of its own, so that queries and keys count as constants
        if hasattr(attention, "to_v"):
            held["values"] = out.detach().requires_grad_()
            return held["values"]
        *rest, values = out.detach().chunk(3, -1)
        held["values"] = values.requires_grad_()
        return torch.cat((*rest, held["values"]), -1)

    def keep_output(module: nn.Module, given: Any, out: Tensor) -> None:
        held["out"] = out

    hooks = [source.register_forward_hook(keep_values), attention.register_forward_hook(keep_output)]
    try:
        with torch.enable_grad():
            model(images)
            out = held["out"][:, 0]
            (grad,) = torch.autograd.grad((out * out.detach()).sum(), held["values"])
    finally:
        for hook in hooks:
            hook.remove()
    tokens, heads = grad.shape[1], attention.heads
    strength = grad.view(len(grad), tokens, heads, -1).norm(dim=-1)[:, 1:]  # the patches
    shares: Tensor = (strength / strength.sum(1, keepdim=True).clamp_min(torch.finfo(strength.dtype).tiny)).mean(-1)
    side = model.img_size // model.patch_size
    return shares.view(-1, side, side)
