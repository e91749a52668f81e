"""What an adapted CLIP is shown beside its text and images: is it right, and keys and values that are kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triton_attn.arguments import FLOATS, ArgumentError, ArgumentTypeError, Named, autocast_dtype
from triton_attn.nn import CrossAttentionModule
from triton_attn.nn.cross_attention import ProjectedContext


class ContextRemembered(nn.Module):
    """`expects_context`: whether text adapters have learned beside contexts. Training and checkpoints set it, the state holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.expects_context = False

    def get_extra_state(self) -> Tensor:
        """`expects_context`."""
        return torch.tensor(self.expects_context, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """`expects_context`."""
        self.expects_context = bool(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # the original's say nothing, and its text adapters always had a context; what brings no text adapters changes nothing
        foreign = f"{prefix}text_cross_attn.q_proj.weight" in state_dict
        state_dict.setdefault(f"{prefix}_extra_state", torch.tensor(foreign or self.expects_context, device="cpu"))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def say_without_context(self, context: Tensor | None) -> None:
        """Warn the caller's caller."""
        # Dynamo takes no warnings
        if context is None and self.expects_context and not torch.compiler.is_compiling():
            said = "the text adapters were trained beside an image's context; these embeddings are made without one"
            warnings.warn(said, stacklevel=3)


class KeptProjection:
    """Keys and values of a context, given again for as long as all that they were made of has the same values.

    Values are compared: versions miss what is written through `.data`, addresses miss all that is written. Reading two tensors is
    little beside a product with every row of a matrix.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The next call projects."""
        self._given: list[Tensor] = []
        self._how: Any = None
        self._made: ProjectedContext | None = None

    def of(self, module: CrossAttentionModule, context: Tensor) -> Tensor | ProjectedContext:
        """The context itself where it cannot be known what its projection depends on."""
        given = _read(module, context)
        if given is None:
            return context
        how = (autocast_dtype(context.device.type), torch.get_float32_matmul_precision(), module.num_heads)
        if self._made is None or self._how != how or not _same(self._given, given):
            self._made, self._how = module.project_context(context), how
            self._given = [x.detach().clone() for x in given]
        return self._made


def _read(module: CrossAttentionModule, context: Tensor) -> list[Tensor] | None:
    """All tensors that the projection reads; None if they are not all, or cannot be compared."""
    layers: tuple[Any, ...] = (module.k_proj, module.v_proj)
    if any(type(x) is not nn.Linear or x._forward_hooks or x._forward_pre_hooks or "forward" in vars(x) for x in layers):
        return None
    found = [context, *(x for layer in layers for x in (layer.weight, layer.bias) if x is not None)]
    plain = all(type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and not x.is_meta for x in found)
    mapped = torch._C._are_functorch_transforms_active()
    captured = context.is_cuda and torch.cuda.is_current_stream_capturing()
    return found if plain and not mapped and not captured else None


def _same(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """NaN is like nothing, so that it is projected again."""
    if len(before) != len(now):
        return False
    alike = all((a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) for a, b in zip(before, now, strict=True))
    return alike and all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def check_context(who: Named, argument: str, given: Tensor, axes: str, width: int) -> None:
    """(images, tokens, width)."""
    if not isinstance(given, Tensor) or given.ndim != 3 or given.shape[2] != width:
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ArgumentError(who.name, argument, f"has shape {found}; allowed: ({axes}, {width})")
    if given.dtype not in FLOATS:
        raise ArgumentTypeError(who.name, argument, f"has dtype {given.dtype}; allowed: {', '.join(map(str, FLOATS))}")


def checked_levels(who: Named, given: Sequence[int], blocks: int) -> tuple[int, ...]:
    """After which blocks: at least one, none twice, in order."""
    allowed = f"rising numbers of 1 to {blocks}, the tower's blocks"
    if not isinstance(given, (list, tuple)):
        raise ArgumentTypeError(who.name, "levels", f"is {given!r}, a {type(given).__name__}; allowed: {allowed}")
    found = tuple(given)
    if not found or not all(type(x) is int and 1 <= x <= blocks for x in found) or list(found) != sorted(set(found)):
        raise ArgumentError(who.name, "levels", f"is {found}; allowed: {allowed}")
    return found


def check_text(who: Named, argument: str, given: Tensor) -> None:
    """Token numbers, (N, T) or (B, P, T)."""
    right = isinstance(given, Tensor) and given.ndim in (2, 3) and given.dtype in (torch.int32, torch.int64) and given.numel() > 0
    if not right:
        found = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise ArgumentError(who.name, argument, f"is {found}; allowed: whole numbers, (N, T) or (B, P, T), one and more")


def checked_prompts(who: Named, given: Sequence[Tensor]) -> list[Tensor]:
    """Token numbers of each state, all with the axes (B, P, T), B a common number or 1."""
    parts = list(given.unbind(0)) if isinstance(given, Tensor) and given.ndim > 2 else given
    if not isinstance(parts, (list, tuple)) or not parts:
        found = "empty" if isinstance(parts, (list, tuple)) else f"a {type(given).__name__}"
        raise ArgumentError(who.name, "prompts", f"is {found}; allowed: token numbers of each state, (P, T) or (B, P, T)")
    for part in parts:
        check_text(who, "prompts", part)
    several = [part if part.ndim == 3 else part[None] for part in parts]
    images, lengths = {len(part) for part in several} - {1}, {part.shape[2] for part in several}
    if len(images) > 1 or len(lengths) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ArgumentError(who.name, "prompts", f"has shapes {shapes}; allowed: one T, one B or 1")
    return several
