"""The training step whose memory is counted: a LongNet, one of its parts, their optimiser. The same code trains for real."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from triton_attn import ArgumentError, attention, dilated_attention
from triton_attn.models import LongNet
from triton_attn.nn import MultiheadAttention, MultiheadDilatedAttention

NAME = "capacity"


class Size(NamedTuple):
    """Of a model: width, blocks, heads."""

    dim: int
    depth: int
    heads: int


# GPT-3's small, medium and XL, whose names these numbers of parameters are
MODELS = {"125M": Size(768, 12, 12), "350M": Size(1024, 24, 16), "1.3B": Size(2048, 24, 16), "tiny": Size(64, 2, 4)}
VOCABULARY = 50304
ATTENTIONS = ("dilated", "dense")
COMPONENTS = ("model", "multihead", "attention")
OPTIMIZERS = ("adamw", "adamw8bit", "none")
DTYPES = {"bf16": torch.bfloat16, "amp": torch.float32, "float32": torch.float32}
SEGMENTS, RATES = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)  # LongNet's


def needs_torchao(optimizer: str) -> None:
    """Raise ArgumentError where an optimiser is another package's, which is not installed."""
    if optimizer == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise ArgumentError(NAME, "optimizer", "is 'adamw8bit', which needs torchao: pip install 'triton-attn[capacity]'")


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    `params`: a name of MODELS. `component`: the whole model, one multihead module, or the attention call alone. `dtype`: "bf16" for
    everything in bfloat16, "amp" for float32 parameters under autocast to bfloat16, "float32". `checkpointing`, `chunk`: LongNet's, which
    its parts do not have.
    """

    params: str = "125M"
    attention: str = "dilated"
    component: str = "model"
    dtype: str = "bf16"
    optimizer: str = "adamw"
    checkpointing: bool = False
    chunk: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        allowed = {
            "params": MODELS,
            "attention": ATTENTIONS,
            "component": COMPONENTS,
            "dtype": DTYPES,
            "optimizer": OPTIMIZERS,
        }
        for name, known in allowed.items():
            if getattr(self, name) not in known:
                raise ArgumentError(NAME, name, f"is {getattr(self, name)!r}; allowed: {', '.join(known)}")
        needs_torchao(self.optimizer)
        for name in ("chunk", "batch"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ArgumentError(NAME, name, f"is {given}; allowed: 1 and more")
        for name in ("checkpointing", "chunk"):
            if getattr(self, name) and self.component != "model":
                raise ArgumentError(NAME, name, f"is {getattr(self, name)} with component {self.component!r}; allowed: with 'model' alone")


class Step(NamedTuple):
    """A model, its optimiser and one step of training; `made` are the tensors that live before it."""

    modules: tuple[nn.Module, ...]
    optimizer: Any
    run: Callable[[], None]
    made: tuple[Tensor, ...]


def step_of(setup: Setup, length: int) -> Step:
    """Everything a step on (batch, length) tokens needs, on the default device; under FakeTensorMode nothing of it takes memory."""
    size = MODELS[setup.params]
    autocast = torch.autocast("cpu", torch.bfloat16) if setup.dtype == "amp" else nullcontext()
    if setup.component == "attention":
        dtype, shape = DTYPES[setup.dtype], (setup.batch, size.heads, length, size.dim // size.heads)
        given = tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))

        def attend() -> None:
            with autocast:
                out: Tensor = call(*given, causal=True, **pattern)
            torch.autograd.backward(out, torch.ones_like(out))

        call = attention if setup.attention == "dense" else dilated_attention
        pattern: dict[str, Any] = {} if setup.attention == "dense" else {"segment_lengths": SEGMENTS, "dilation_rates": RATES}
        return Step((), None, attend, given)
    module, forward, made = (_multihead if setup.component == "multihead" else _model)(setup, size, length)
    optimizer = optimizer_of(setup.optimizer, module)

    def train() -> None:
        with autocast:
            loss = forward()
        torch.autograd.backward(loss)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return Step((module,), optimizer, train, made)


def _model(setup: Setup, size: Size, length: int) -> tuple[nn.Module, Callable[[], Tensor], tuple[Tensor, ...]]:
    dense = setup.attention == "dense"
    model = LongNet(
        VOCABULARY if setup.params != "tiny" else 512,
        *size,
        None if dense else SEGMENTS,
        None if dense else RATES,
        position="rotary",
        checkpointing=setup.checkpointing,
        chunk=setup.chunk,
        dtype=DTYPES[setup.dtype],
    )
    tokens = torch.zeros(setup.batch, length + 1, dtype=torch.int64)
    return model, lambda: model.loss(tokens), (tokens,)


def _multihead(setup: Setup, size: Size, length: int) -> tuple[nn.Module, Callable[[], Tensor], tuple[Tensor, ...]]:
    x = torch.randn(setup.batch, length, size.dim, dtype=DTYPES[setup.dtype], requires_grad=True)
    if setup.attention == "dense":
        plain = MultiheadAttention(size.dim, size.heads, batch_first=True, dtype=x.dtype)
        later = torch.ones(1, 1, dtype=torch.bool).expand(length, length)  # only named: with the hint nobody reads it
        return plain, lambda: plain(x, x, x, need_weights=False, attn_mask=later, is_causal=True)[0].sum(), (x,)
    dilated = MultiheadDilatedAttention(size.dim, size.heads, SEGMENTS, RATES, dtype=x.dtype)
    return dilated, lambda: dilated(x, x, x, is_causal=True)[0].sum(), (x,)


def optimizer_of(name: str, module: nn.Module) -> Any:
    """One of OPTIMIZERS; None for "none"."""
    if name == "none":
        return None
    if name == "adamw":
        return torch.optim.AdamW(module.parameters(), fused=True)  # in place; others hold copies of what they update
    return EightBit(module)


class EightBit:
    """torchao's AdamW8bit: its state, made by itself. Its update, a compiled kernel that works in place, is not run."""

    def __init__(self, module: nn.Module) -> None:
        from torchao.optim import AdamW8bit, subclass_8bit

        with unset_fake_temporarily():  # torchao computes its tables of quantised values from real numbers, once
            subclass_8bit.get_qmap_signed()
            subclass_8bit.get_qmap_unsigned()
        self.inner, self.state = AdamW8bit(module.parameters()), list[Tensor]()
        self.param_groups = self.inner.param_groups

    def step(self) -> None:
        """The states come into being at the first step."""
        if not self.state:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            self.state = [self.inner._new_buffer(parameter, signed) for parameter in parameters for signed in (True, False)]

    def zero_grad(self) -> None:
        """Gradients are given back."""
        self.inner.zero_grad()
