"""Mamba's layer, with upstream's parameter names; and HierarchicalVLM's time-invariant one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments, causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update

VARIANTS = ("mamba", "lti")
DT_INITS = ("random", "constant")
Cache = tuple[Tensor, Tensor]


class MambaLayer(nn.Module):
    """A state space model whose step size, input and output vectors depend on the input, in O(N) time, and O(1) for one more token.

    [x, z] = W_in u;  x = silu(conv(x));  [delta, B, C] = W_x x;  y = scan(x, W_dt delta, A, B, C, D, z);  out = W_out dropout(y),
    A = -exp(A_log). A state dict of mamba_ssm's Mamba loads strictly. Causal by nature.

    Args:
        dim: width of tokens.
        state_size: N, from 1 to 256.
        expand_factor: inner width as a multiple of dim.
        dt_init: how W_dt starts: "random", uniform, or "constant"; for "lti" how dt does.
        dt_init_floor: the least step size at the start.
        dropout: share of inner values dropped in training; mamba_ssm has none.
        d_conv: width of the convolution, from 2 to 4.
        dt_rank: width of delta before W_dt; "auto" is dim / 16, rounded up.
        dt_min: the least of the range that step sizes are drawn from at the start.
        dt_max: its end.
        bias: whether W_in and W_out have biases.
        conv_bias: whether the convolution has one.
        variant: "mamba", or "lti": HierarchicalVLM's layer, whose state dicts load, with the sign of its decay mended:
            h_t = exp(-|dt| n) h_{t-1} + dt x_t B, y_t = <C, h_t> sigmoid(g_t), out = W_out dropout(gelu(y)); dt, B and C are constants.
            d_conv, dt_rank, dt_min, dt_max, bias and conv_bias do not concern it.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023; MambaLayer of HierarchicalVLM, whose
    arguments come first.
    """

    def __init__(
        self,
        dim: int = 768,
        state_size: int = 16,
        expand_factor: float = 2.0,
        dt_init: str = "random",
        dt_init_floor: float = 1e-4,
        dropout: float = 0.1,
        *,
        d_conv: int = 4,
        dt_rank: int | str = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bias: bool = False,
        conv_bias: bool = True,
        variant: str = "mamba",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.dim = arguments.whole(self, "dim", dim, 1)
        self.state_size = arguments.whole(self, "state_size", state_size, 1, 256)
        self.inner = int(dim * arguments.finite(self, "expand_factor", expand_factor))
        if self.inner < 1:
            raise ArgumentError(self.name, "expand_factor", f"is {expand_factor}; allowed: 1 / dim and more")
        arguments.choice(self, "dt_init", dt_init, DT_INITS)
        self.dropout = arguments.probability(self, "dropout", dropout)
        self.d_conv = arguments.whole(self, "d_conv", d_conv, 2, 4)
        self.dt_rank = math.ceil(dim / 16) if dt_rank == "auto" else arguments.whole(self, "dt_rank", dt_rank, 1)  # type: ignore[arg-type]
        for name, given in (("dt_init_floor", dt_init_floor), ("dt_min", dt_min), ("dt_max", dt_max)):
            if arguments.finite(self, name, given) <= 0:
                raise ArgumentError(self.name, name, f"is {given}; allowed: above 0")
        self.variant = arguments.choice(self, "variant", variant, VARIANTS)
        arguments.flag(self, "bias", bias)
        arguments.flag(self, "conv_bias", conv_bias)
        place = {"device": device, "dtype": dtype}
        if variant == "mamba":
            self._make_mamba(bias, conv_bias, place)
            self._start_mamba(dt_init, dt_init_floor, dt_min, dt_max)
        else:
            self._make_lti(place)
            self._start_lti(dt_init, dt_init_floor)

    A: Tensor
    A_log: Tensor
    D: nn.Parameter

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def _make_mamba(self, bias: bool, conv_bias: bool, place: dict[str, Any]) -> None:
        inner, size = self.inner, self.state_size
        self.in_proj = nn.Linear(self.dim, 2 * inner, bias=bias, **place)
        self.conv1d = nn.Conv1d(inner, inner, self.d_conv, groups=inner, padding=self.d_conv - 1, bias=conv_bias, **place)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * size, bias=False, **place)
        self.dt_proj = nn.Linear(self.dt_rank, inner, **place)
        self.A_log = nn.Parameter(torch.empty(inner, size, **place))
        self.D = nn.Parameter(torch.ones(inner, **place))
        self.out_proj = nn.Linear(inner, self.dim, bias=bias, **place)
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]  # as optimisers for Mamba look for it

    @torch.no_grad()
    def _start_mamba(self, dt_init: str, floor: float, low: float, high: float) -> None:
        self.A_log.copy_(torch.arange(1, self.state_size + 1, dtype=torch.float32).log().expand(self.inner, -1))
        most = self.dt_rank**-0.5
        if dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -most, most)
        else:
            nn.init.constant_(self.dt_proj.weight, most)
        steps = torch.empty(self.inner).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
        # softplus of the bias is the step
        self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def _make_lti(self, place: dict[str, Any]) -> None:
        inner, size = self.inner, self.state_size
        self.in_proj = nn.Linear(self.dim, 2 * inner, bias=False, **place)
        # what its checkpoints hold; decays are exp(-|dt| exp(A_log))
        self.register_buffer("A", torch.empty(1, 1, size, **place))
        self.register_buffer("A_log", torch.empty(1, 1, size, **place))
        self.B = nn.Parameter(torch.empty(1, 1, size, **place))
        self.C = nn.Parameter(torch.empty(1, 1, size, **place))
        self.dt = nn.Parameter(torch.empty(1, inner, size, **place))
        self.out_proj = nn.Linear(inner, self.dim, **place)

    @torch.no_grad()
    def _start_lti(self, dt_init: str, floor: float) -> None:
        rates = torch.arange(1, self.state_size + 1, dtype=torch.float32)
        self.A.copy_(-rates)
        self.A_log.copy_(rates.log())
        for vector in (self.B, self.C):
            nn.init.normal_(vector, std=0.01)
        if dt_init == "random":
            nn.init.uniform_(self.dt, floor, 0.1)
        else:
            nn.init.constant_(self.dt, 0.1)

    def extra_repr(self) -> str:
        parts = f"dim={self.dim}, state_size={self.state_size}, inner={self.inner}, dropout={self.dropout}, variant={self.variant!r}"
        return parts + (f", d_conv={self.d_conv}, dt_rank={self.dt_rank}" if self.variant == "mamba" else "")

    def forward(self, x: Tensor, mask: Tensor | None = None, *, cache: Cache | None = None) -> Tensor:
        """Every token at once.

        Args:
            x: (B, N, dim).
            mask: (B, N) boolean, True = ignore, as nn.MultiheadAttention's key_padding_mask. A padded token may hold NaN, changes no
                other and gives 0 (W_out's bias, if there is one). Before or after the tokens; between them the convolution sees a 0.
            cache: as `allocate_inference_cache` makes it: where the sequences begin, overwritten with where they end, so that `step` or
                another call can go on. Then padding has to stand before the tokens.

        Returns:
            (B, N, dim).

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
        """
        self._check(x, mask)
        if mask is not None:
            x = x.masked_fill(mask[..., None], 0.0)  # ahead of the products, whose gradient would be 0 * NaN
        inner, gate = self.in_proj(x).chunk(2, -1)
        conv_state, state = (None, None) if cache is None else self._checked(cache, x.shape[0])
        begun: dict[str, Any] = {"mask": None if mask is None else ~mask, "layout": "bld", "return_last_state": True}
        if state is not None:
            begun["initial_state"] = state.clone()  # autograd keeps it, and we write
        if self.variant == "mamba":
            if mask is not None:
                inner = inner.masked_fill(mask[..., None], 0.0)
            inner = self._convolved(inner, conv_state)
            delta, B, C = self._selected(inner)
            A, D, bias = self._rates(inner)
            y, last = selective_scan(inner, delta, A, B, C, D, gate, bias, True, **begun)
        else:
            y, last = selective_scan(inner, inner.new_ones(()).expand(inner.shape), *self._constants(inner), **begun)
            y = F.gelu(y * gate.sigmoid())
        if state is not None:
            state.copy_(last)
        return self._output(y)

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (B, 1, dim), after those that the cache remembers: its output, (B, 1, dim), and the cache, overwritten.

        Under torch.no_grad() memory stays constant; with gradients the cache has a history.
        """
        self._check(x, None)
        if x.shape[1] != 1:
            raise ArgumentError(self.name, "x", f"has {x.shape[1]} tokens; allowed: 1")
        self._checked((conv_state, ssm_state), x.shape[0])
        inner, gate = self.in_proj(x[:, 0]).chunk(2, -1)
        if self.variant == "mamba":
            inner = causal_conv1d_update(inner, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, "silu")
            delta, B, C = self._selected(inner)
            A, D, bias = self._rates(inner)
            y = selective_state_update(ssm_state, inner, delta, A, B, C, D, gate, bias, True)
        else:
            A, B, C = self._constants(inner)
            per_item = (len(inner), -1, -1)
            y = selective_state_update(ssm_state, inner, torch.ones_like(inner), A, B.expand(per_item), C.expand(per_item))
            y = F.gelu(y * gate.sigmoid())
        return self._output(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None) -> Cache:
        """(the last inputs of the convolution, the state) before the first token, zeros: (B, inner, d_conv), (B, inner, state_size).

        Both have constant size: max_seqlen, mamba_ssm's argument, does not matter. The state is float32 unless dtype says otherwise.
        """
        arguments.whole(self, "batch_size", batch_size, 0)
        weight = self.in_proj.weight
        remembered = self.d_conv if self.variant == "mamba" else 0
        conv_state = weight.new_zeros(batch_size, self.inner, remembered, dtype=dtype)
        held = dtype or torch.promote_types(weight.dtype, torch.float32)
        return conv_state, weight.new_zeros(batch_size, self.inner, self.state_size, dtype=held)

    def _convolved(self, inner: Tensor, conv_state: Tensor | None) -> Tensor:
        """(B, N, inner), after the steps in the state."""
        turned, weight = inner.transpose(1, 2), self.conv1d.weight[:, 0]
        if conv_state is None:
            out = causal_conv1d(turned, weight, self.conv1d.bias, "silu")
        else:
            out = causal_conv1d_update(turned, conv_state, weight, self.conv1d.bias, "silu")
        convolved: Tensor = out.transpose(1, 2)
        return convolved

    def _selected(self, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta without its bias, B and C, of each token."""
        delta, B, C = self.x_proj(inner).split((self.dt_rank, self.state_size, self.state_size), -1)
        return F.linear(delta, self.dt_proj.weight), B, C

    def _rates(self, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, D and the bias of delta, at least in float32."""
        wide = torch.promote_types(inner.dtype, torch.float32)
        return -self.A_log.to(wide).exp(), self.D.to(wide), self.dt_proj.bias.to(wide)

    def _constants(self, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and C of each channel with a step size of 1."""
        wide = torch.promote_types(inner.dtype, torch.float32)
        dt = self.dt[0].to(wide)
        A, B = -dt.abs() * self.A_log[0].to(wide).exp(), dt * self.B[0].to(wide)
        return A, B.to(inner.dtype), self.C[0].to(inner.dtype).expand(B.shape)

    def _output(self, y: Tensor) -> Tensor:
        out: Tensor = self.out_proj(F.dropout(y, self.dropout, self.training))
        return out

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise ArgumentError(self.name, "x", f"is a {type(x).__name__}; allowed: torch.Tensor")
        if x.is_nested or x.ndim != 3 or x.shape[2] != self.dim:
            found = "is nested" if x.is_nested else f"has shape {tuple(x.shape)}"
            raise ArgumentError(self.name, "x", f"{found}; allowed: (B, N, {self.dim})")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            found = f"{mask.dtype}, {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ArgumentError(self.name, "mask", f"is {found}; allowed: torch.bool (True = ignore), {tuple(x.shape[:2])}")

    def _checked(self, cache: Cache, batch: int) -> Cache:
        """The cache, if it is one."""
        if not isinstance(cache, (tuple, list)) or len(cache) != 2 or not all(isinstance(part, Tensor) for part in cache):
            raise ArgumentError(self.name, "cache", "is no pair of tensors; allowed: as allocate_inference_cache makes it")
        allowed = (batch, self.inner, self.d_conv if self.variant == "mamba" else 0), (batch, self.inner, self.state_size)
        for name, part, shape in zip(("conv_state", "ssm_state"), cache, allowed, strict=True):
            if part.shape != shape:
                raise ArgumentError(self.name, name, f"has shape {tuple(part.shape)}; allowed: {shape}")
        return cache[0], cache[1]
