"""FlexAttention as a peer of the patterns that it can mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]


def dense() -> Call | None:
    return None


def strided(stride: int, phase: int = 0, include_self: bool = False) -> Call:
    return lambda b, h, i, j: (j % stride == phase) | (include_self & (i == j))


def local_global(window: int, global_tokens: int = 0) -> Call:
    return lambda b, h, i, j: ((i - j).abs() <= window // 2) | (i < global_tokens) | (j < global_tokens)


def flex_local_global() -> Call:
    """Summaries stand before the keys, in a copy that each call makes."""
    plain, behind = (
        flex(local_global),
        flex(lambda window, summaries: lambda b, h, i, j: (j < summaries) | ((i + summaries - j).abs() <= window // 2)),
    )

    def call(
        query: Tensor, key: Tensor, value: Tensor, *, global_key: Tensor | None = None, global_value: Tensor | None = None, **options: Any
    ) -> Any:
        if global_key is None or global_value is None:
            return plain(query, key, value, **options)
        if options.get("causal") or options.get("key_padding_mask") is not None or options.pop("global_tokens", 0):
            raise NotImplementedError("summaries and a window alone")
        key, value = torch.cat((global_key, key), 2), torch.cat((global_value, value), 2)
        return behind(query, key, value, summaries=global_key.shape[2], **options)

    return call


def flex_subset() -> Call:
    """A score modification that reads a table of the chosen keys, made once for each tensor of indices: no block is without one."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs")
    rules: dict[tuple[int, bool], tuple[Tensor, Call]] = {}

    def call(query: Tensor, key: Tensor, value: Tensor, *, indices: Tensor, include_self: bool = True, **options: Any) -> Any:
        if any(option is not None and option for option in options.values()):
            raise NotImplementedError("a subset alone")
        if query.device.type == "cpu" and query.requires_grad:
            raise NotImplementedError("FlexAttention has no backward on a CPU")
        name = id(indices), include_self
        if name not in rules:
            chosen = torch.zeros(key.shape[:3], dtype=torch.bool, device=key.device).scatter(2, indices.long(), True)
            chosen = chosen.repeat_interleave(query.shape[1] // key.shape[1], 1)

            def rule(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return torch.where(chosen[b, h, j] | (i == j) if include_self else chosen[b, h, j], score, -torch.inf)

            rules[name] = indices, rule
        try:
            return compiled(query, key, value, score_mod=rules[name][1], enable_gqa=query.shape[1] != key.shape[1])
        except torch._inductor.exc.InductorError as error:
            raise NotImplementedError("this rule does not compile here") from error

    return call


def flex(rule: Callable[..., Call | None]) -> Call:
    """FlexAttention with the block mask of `rule(**options)`: (b, h, i, j) -> whether query i sees key j, None where it always does."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs")
    masks: dict[Any, Any] = {}

    def call(
        query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None, causal: Any = False, **options: Any
    ) -> Any:
        options = {name: option for name, option in options.items() if option is not None and not (name == "dropout_p" and not option)}
        if options.keys() & {"mask", "dropout_p", "global_key", "global_value"}:
            raise NotImplementedError("no dropout, no dense mask, no keys from elsewhere")
        if query.device.type == "cpu" and query.requires_grad:
            raise NotImplementedError("FlexAttention has no backward on a CPU")
        name = (query.shape, key.shape, causal, key_padding_mask is None, tuple(options.items()))
        if name not in masks:
            rules = [rule(**options), (lambda b, h, i, j: i >= j) if causal else None]
            if key_padding_mask is not None:
                visible = ~key_padding_mask
                rules.append(lambda b, h, i, j: visible[b, j])
            asked = [each for each in rules if each is not None]
            batch = query.shape[0] if key_padding_mask is not None else None
            masks[name] = asked and create_block_mask(_all_of(asked), batch, None, query.shape[2], key.shape[2], device=query.device)
        try:
            return compiled(query, key, value, block_mask=masks[name] or None, enable_gqa=query.shape[1] != key.shape[1])
        except torch._inductor.exc.InductorError as error:
            raise NotImplementedError("this rule does not compile here") from error

    return call


def _all_of(rules: list[Call]) -> Call:
    from torch.nn.attention.flex_attention import and_masks

    together: Call = and_masks(*rules)
    return together
