"""The next steps of a short causal convolution, in place on its state."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn import arguments
from triton_attn.arguments import ArgumentError, ArgumentTypeError
from triton_attn.functional.causal_conv1d import causal_conv1d

_NAME = "causal_conv1d_update"


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d` of one step or a few, after those that the state remembers; the state then remembers these, in place.

    Args:
        x: (B, D), one step, or (B, D, T).
        conv_state: (B, D, S), the last S steps, S at least K - 1; float32 or x's dtype. Overwritten.
        weight: (D, K), K from 2 to 4, as in `causal_conv1d`.
        bias: (D,).
        activation: None, "silu" or "swish".
        cache_seqlens: (B,) int32 or int64, how many steps came before: the state is a ring, whose step t lies at t modulo S. None:
            the state is in order, and is moved along.
        conv_state_indices: (B,) int32 or int64, which rows of a larger state the items have, no row twice; the others stay.

    Returns:
        As x. It has gradients, and the state gets a history; under torch.no_grad() memory stays constant.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: the causal_conv1d package, whose arguments these are.
    """
    for name, given in (("x", x), ("conv_state", conv_state), ("weight", weight)):
        if not isinstance(given, Tensor):
            raise ArgumentTypeError(_NAME, name, f"is a {type(given).__name__}; allowed: torch.Tensor")
    if x.ndim not in (2, 3):
        raise ArgumentError(_NAME, "x", f"has shape {tuple(x.shape)}; allowed: (B, D) or (B, D, T)")
    steps = x if x.ndim == 3 else x[..., None]
    batch, channels, count = steps.shape
    if conv_state.ndim != 3 or conv_state.shape[1] != channels or (conv_state_indices is None and conv_state.shape[0] != batch):
        rows = "S" if conv_state_indices is not None else batch
        raise ArgumentError(_NAME, "conv_state", f"has shape {tuple(conv_state.shape)}; allowed: ({rows}, {channels}, K - 1 or more)")
    if weight.ndim != 2 or conv_state.shape[2] < weight.shape[1] - 1:
        complaint = f"has shape {tuple(weight.shape)}; allowed: ({channels}, K), K - 1 up to conv_state's {conv_state.shape[2]}"
        raise ArgumentError(_NAME, "weight", complaint)
    held = torch.promote_types(x.dtype, torch.float32)
    if conv_state.dtype not in (held, x.dtype):
        raise ArgumentTypeError(_NAME, "conv_state", f"has dtype {conv_state.dtype}; allowed: {held}, {x.dtype}")
    for name, given_index in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if given_index is not None:
            arguments.indices(_Self, name, given_index, batch)
    size, past = conv_state.shape[2], weight.shape[1] - 1
    state = conv_state
    if conv_state_indices is not None:
        arguments.inside(_Self, "conv_state_indices", conv_state_indices, conv_state.shape[0])
        state = conv_state.index_select(0, conv_state_indices)
    if cache_seqlens is None:
        before = state[:, :, size - past :]
        after = torch.cat((state, steps.to(state.dtype)), 2)[:, :, count:]
    else:
        ring = torch.arange(-past, 0, device=x.device) + cache_seqlens[:, None]
        before = state.gather(2, _in_ring(ring, size, channels))
        # of more steps than the ring holds only the last are written
        written = steps[:, :, max(count - size, 0) :]
        ring = torch.arange(max(count - size, 0), count, device=x.device) + cache_seqlens[:, None]
        after = state.scatter(2, _in_ring(ring, size, channels), written.to(state.dtype))
    before = before.clone() if torch.is_grad_enabled() else before  # autograd keeps it, and we write
    out: Tensor = causal_conv1d(steps, weight, bias, activation, initial_states=before)
    if conv_state_indices is None:
        conv_state.copy_(after)
    else:
        conv_state.index_copy_(0, conv_state_indices.long(), after)
    return out if x.ndim == 3 else out[..., 0]


def _in_ring(positions: Tensor, size: int, channels: int) -> Tensor:
    """(B, T) -> (B, D, T), modulo the ring."""
    return positions.long().remainder(size)[:, None].expand(-1, channels, -1)


class _Self:
    """Who complains."""

    name = _NAME
