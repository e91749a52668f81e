"""Peers of dilated attention, as peers.py has them for attention."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]
USUAL = {None, 0.0, "longnet", "block", "count"}


def of_dilated_attention() -> dict[str, Call]:
    """torchscale's way, FlexAttention for each branch, and the package that gives each branch heads of its own."""
    peers: dict[str, Call] = {"torchscale's way": _gathered, "FlexAttention for each branch": _flex_branches()}
    if importlib.util.find_spec("dilated_attention_pytorch") and importlib.util.find_spec("xformers"):
        peers["dilated-attention-pytorch"] = _dilated_attention_pytorch
    return peers


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment_lengths: Any,
    dilation_rates: Any,
    causal: Any = False,
    **options: Any,
) -> Tensor:
    """As torchscale has it: for each branch gather, attend, scatter; then a mixture by log-sum-exps without a gradient."""
    n = query.shape[2]
    if query.shape[1] != key.shape[1] or any(n % length for length in segment_lengths) or not USUAL.issuperset(options.values()):
        raise NotImplementedError("one key head for each query head, whole segments, the common options")
    attend: Any = torch.ops.aten._scaled_dot_product_flash_attention
    if query.device.type == "cpu":
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    outs, lses = [], []
    for length, rate in zip(segment_lengths, dilation_rates, strict=True):
        # heads in groups of one offset, segments in the batch
        groups = -(-query.shape[1] // rate)
        whole = torch.zeros_like(query)
        weight = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
        for offset, heads in enumerate(range(0, query.shape[1], groups)):
            here = slice(heads, heads + groups)
            q, k, v = (
                torch.unflatten(x[:, here], 2, (-1, length))[:, :, :, offset::rate].transpose(1, 2).flatten(0, 1)
                for x in (query, key, value)
            )
            found, lse, *_ = attend(q.contiguous(), k.contiguous(), v.contiguous(), 0.0, bool(causal))
            lse = lse.detach()
            shape = (query.shape[0], n // length)
            torch.unflatten(whole[:, here], 2, (-1, length))[:, :, :, offset::rate] = torch.unflatten(found, 0, shape).transpose(1, 2)
            torch.unflatten(weight[:, here], 2, (-1, length))[:, :, :, offset::rate] = torch.unflatten(lse, 0, shape).transpose(1, 2)
        outs.append(whole)
        lses.append(weight)
    mixture = torch.stack(lses).softmax(0).nan_to_num().to(query.dtype).unsqueeze(-1)
    return (mixture * torch.stack(outs)).sum(0)


def _flex_branches() -> Call:
    """A mask for each branch, then a mixture by log-sum-exps, with its gradient: no block of a class is empty, none can be left out."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs")
    masks: dict[Any, list[Any]] = {}

    def masked(length: int, rate: int, heads: int, causal: bool, n: int, where: torch.device) -> Any:
        groups = -(-heads // rate)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            offset = h // groups
            chosen = (i % length % rate == offset) & (j % length % rate == offset)
            seen = (i // length == j // length) & chosen
            return seen & (i >= j) if causal else seen

        return create_block_mask(visible, None, heads, n, n, device=where)

    def call(
        query: Tensor, key: Tensor, value: Tensor, *, segment_lengths: Any, dilation_rates: Any, causal: Any = False, **options: Any
    ) -> Tensor:
        heads, n = query.shape[1:3]
        if key.shape[1] != heads or not USUAL.issuperset(options.values()):
            raise NotImplementedError("one key head for each query head, the common options")
        branches = tuple(zip(segment_lengths, dilation_rates, strict=True))
        name = (heads, n, bool(causal), branches)
        if name not in masks:
            masks[name] = [masked(length, rate, heads, bool(causal), n, query.device) for length, rate in branches]
        outs, lses = [], []
        for mask in masks[name]:
            try:
                out, found = compiled(query, key, value, block_mask=mask, return_aux=AuxRequest(lse=True))
            except torch._inductor.exc.InductorError as error:
                raise NotImplementedError("FlexAttention gives no log-sum-exp on a CPU") from error
            outs.append(out)
            lses.append(found.lse)
        mixture = torch.stack(lses).softmax(0).nan_to_num().to(query.dtype).unsqueeze(-1)
        return (mixture * torch.stack(outs)).sum(0)

    return call


def _dilated_attention_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment_lengths: Any,
    dilation_rates: Any,
    causal: Any = False,
    mode: str = "longnet",
    **options: Any,
) -> Tensor:
    """Its module: the same pairs as mode="head_group", but it divides its outputs by their sums."""
    n = query.shape[2]
    if mode != "head_group" or query.shape[1] != key.shape[1] or any(n % length for length in segment_lengths):
        raise NotImplementedError("heads of its own for each branch, one key head for each query head, whole segments")
    if not USUAL.issuperset(options.values()):
        raise NotImplementedError("the common options")
    attend = _dilated_module(tuple(segment_lengths), tuple(dilation_rates))
    found: Tensor = attend(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=bool(causal))
    return found.transpose(1, 2)


@functools.cache
def _dilated_module(segment_lengths: tuple[int, ...], dilation_rates: tuple[int, ...]) -> Any:
    from dilated_attention_pytorch.dilated_attention import DilatedAttention

    return DilatedAttention(segment_lengths, dilation_rates)


__all__ = ["of_dilated_attention"]
