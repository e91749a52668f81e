"""HierarchicalVLM's PerformerAttention, and its block of linear-time attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments, linear_attention, orthogonal_projection, performer_attention
from triton_attn.arguments import ArgumentTypeError
from triton_attn.nn._projections import Projections, check_mask
from triton_attn.nn.mamba_layer import MambaLayer

State = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor]  # as `triton_attn.performer_attention` returns it
MOST_SEED = 2**32 - 1  # torch's generator on the CPU looks at no more bits of one
APART = 0x9E3779B1  # 2**32 over the golden ratio: draws of seeds that are neighbours lie far apart
REMEMBERED = 64  # calls whose features are at hand should they be computed again


class PerformerAttention(Projections):
    """Self-attention by random features in O(N): see `triton_attn.performer_attention`.

    Args:
        dim: width of tokens.
        num_heads: a divisor of dim.
        num_random_features: 1 and more.
        kernel_type: "elu", "relu" or "softmax" (FAVOR+).
        dropout: of the heads' outputs in training: there are no weights to drop.
        causal: no token sees a later one.
        redraw_interval: forward calls in training after which features are drawn anew; None: never. They depend on seed and the number
            of the draw alone. In a compiled call nothing is counted; `redraw` still changes the features.
        seed: of the features, 0 to 2**32 - 1; None: drawn from torch's generator, so that each layer of a model has features of its own.
            Ranks that redraw must agree in it: give one, another for each layer, or seed torch alike on all ranks before.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Under torch.utils.checkpoint the call in the backward pass neither counts nor redraws, and has the features of the call that it
    repeats, if that is among the last 64: it is known by a number that each counted call draws from torch's generator, whose state
    checkpointing restores. With preserve_rng_state=False it has the newest features.

    A state dict has the original's keys. Seed, draws and calls are in its metadata, which torch.save keeps: training that is resumed
    goes on where it stopped. Formats of tensors alone lose them; the attributes `seed` and `draws` may then be set by hand.

    Source: PerformerAttention of HierarchicalVLM, whose state dicts load, with orthogonal features and masks that hide.
    """

    random_matrix: Tensor
    draws: int

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 12,
        num_random_features: int = 256,
        kernel_type: str = "elu",
        dropout: float = 0.0,
        *,
        causal: bool = False,
        redraw_interval: int | None = None,
        seed: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, num_heads, dropout, device, dtype)
        self.features = arguments.whole(self, "num_random_features", num_random_features, 1)
        self.kernel_type = arguments.choice(self, "kernel_type", kernel_type, ("elu", "relu", "softmax"))
        self.causal = arguments.flag(self, "causal", causal)
        self.redraw_interval = redraw_interval if redraw_interval is None else arguments.whole(self, "redraw_interval", redraw_interval, 1)
        self.seed = (_drawn(MOST_SEED + 1) or 0) if seed is None else arguments.whole(self, "seed", seed, 0, MOST_SEED)
        # (head_dim, features), as the original has it
        self.register_buffer("random_matrix", torch.empty(self.head_dim, num_random_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The features that its seed begins with, such as after `to_empty`; projections have a `reset_parameters` of their own."""
        self._calls = 0
        self._seen: dict[int | None, Tensor] = {}  # by what each call drew
        self.redraw(0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_random_features={self.features}, kernel_type={self.kernel_type!r}, causal={self.causal}"

    @torch.no_grad()
    @torch.inference_mode(False)
    def redraw(self, draw: int | None = None) -> None:
        """Draw features anew: those of the next draw, or of a given one. The tensor is a new one: calls before may need theirs yet."""
        self.draws = self.draws + 1 if draw is None else arguments.whole(self, "draw", draw, 0, MOST_SEED)
        if self.random_matrix.is_meta:
            return
        generator = torch.Generator().manual_seed((self.seed * APART + self.draws) & MOST_SEED)
        rows = orthogonal_projection(self.features, self.head_dim, generator=generator, device="cpu", dtype=torch.float32)
        self.random_matrix = torch.empty_like(self.random_matrix).copy_(rows.mT)

    def _counted(self, interval: int) -> Tensor:
        """The features of a call in training, after the redraw that is due."""
        call = _drawn(2**62)
        if torch._C._current_graph_task_id() != -1:  # in a backward pass: an earlier call is computed again
            return self._seen.get(call, self.random_matrix)
        if self._calls and self._calls % interval == 0:
            self.redraw()
        self._calls += 1
        if call is not None:
            self._seen[call] = self.random_matrix
            if len(self._seen) > REMEMBERED:
                del self._seen[next(iter(self._seen))]
        return self.random_matrix

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        if prefix[:-1] in metadata:
            metadata[prefix[:-1]]["redraws"] = (self.seed, self.draws, self._calls)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if "redraws" in local_metadata:
            self.seed, self.draws, self._calls = local_metadata["redraws"]

    def forward(self, x: Tensor, mask: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """Project, attend, project back.

        Args:
            x: (B, N, dim).
            mask, key_padding_mask: one of the two, (B, N) boolean, True = ignore.

        Returns:
            (B, N, dim).

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
        """
        self.check_tokens("x", x)
        padding = _one_mask(self, x, mask, key_padding_mask)
        features = self.random_matrix
        if self.training and self.redraw_interval and not torch.compiler.is_compiling():
            features = self._counted(self.redraw_interval)
        query, key, value = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out = performer_attention(query, key, value, features.mT, kernel=self.kernel_type, causal=self.causal, key_padding_mask=padding)
        return self.output(nn.functional.dropout(out, self.dropout, self.training))

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next token of a sequence, or the next few, in memory that does not grow with those before.

        Args:
            x: (B, N, dim), N being 1 for a token at a time, more to begin with a prompt.
            state: what this method returned for the tokens before; None at the first. It is left as it was, and holds for the
                features that it was made with: `redraw` ends it.

        Returns:
            (B, N, dim), what `forward` gives for these tokens behind those before them, and the state after them.

        Raises:
            ArgumentError: the module is not causal, or an argument is wrong; the message names it and what is allowed.
        """
        self.check_tokens("x", x)
        _require_causal(self)
        query, key, value = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out, state = performer_attention(
            query, key, value, self.random_matrix.mT, kernel=self.kernel_type, causal=True, initial_state=state, return_state=True
        )
        assert state is not None
        return self.output(nn.functional.dropout(out, self.dropout, self.training)), state


class LinearSelfAttention(Projections):
    """Self-attention with phi(x) = elu(x) + 1 in O(N): see `triton_attn.linear_attention`.

    Args:
        dim, num_heads, dropout, causal, device, dtype: as in `PerformerAttention`.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020.
    """

    def __init__(
        self, dim: int = 768, num_heads: int = 12, dropout: float = 0.0, *, causal: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(dim, num_heads, dropout, device, dtype)
        self.causal = arguments.flag(self, "causal", causal)

    def forward(self, x: Tensor, mask: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """As `PerformerAttention.forward`."""
        self.check_tokens("x", x)
        padding = _one_mask(self, x, mask, key_padding_mask)
        query, key, value = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out = linear_attention(query, key, value, causal=self.causal, key_padding_mask=padding)
        return self.output(nn.functional.dropout(out, self.dropout, self.training))

    def step(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `PerformerAttention.step`."""
        self.check_tokens("x", x)
        _require_causal(self)
        query, key, value = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out, state = linear_attention(query, key, value, causal=True, initial_state=state, return_state=True)
        assert state is not None
        return self.output(nn.functional.dropout(out, self.dropout, self.training)), state


def _mamba(dim: int, num_heads: int, **options: Any) -> nn.Module:
    """It has no heads."""
    return MambaLayer(dim, **options)


TYPES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "performer": (PerformerAttention, ("num_random_features", "kernel_type", "causal", "redraw_interval", "seed")),
    "linear": (LinearSelfAttention, ("causal",)),
    "mamba": (_mamba, ("state_size", "expand_factor", "dt_init", "dt_init_floor", "d_conv", "dt_rank", "variant")),
}


class LinearAttentionBlock(nn.Module):
    """A pre-norm block in linear time: x += attention(norm1 x), x += ffn(norm2 x).

    Args:
        dim: width of tokens; the feed-forward network is four times as wide.
        num_heads: a divisor of dim; of no meaning for "mamba".
        attention_type: "performer", "linear" or "mamba".
        dropout: of the attention's output and in the feed-forward network.
        device, dtype: of the parameters.
        options: what the attention's class takes beside.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: LinearAttentionBlock of HierarchicalVLM.
    """

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 12,
        attention_type: str = "performer",
        dropout: float = 0.1,
        *,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        make, allowed = TYPES[arguments.choice(self, "attention_type", attention_type, tuple(TYPES))]
        for option in options:
            if option not in allowed:
                complaint = f"is no option of attention_type={attention_type!r}; allowed: {', '.join(allowed)}"
                raise ArgumentError(self.name, option, complaint)
        self.attention_type, self.dim = attention_type, dim
        place = {"device": device, "dtype": dtype}
        self.attention = make(dim=dim, num_heads=num_heads, dropout=dropout, **options, **place)
        self.ffn = nn.Sequential(
            nn.Linear(dim, 4 * dim, **place), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim, **place), nn.Dropout(dropout)
        )
        self.norm1 = nn.LayerNorm(dim, **place)
        self.norm2 = nn.LayerNorm(dim, **place)

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim); mask (B, N) boolean, True = ignore."""
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(self.name, "x", f"is a {type(x).__name__}; allowed: torch.Tensor")
        if x.is_nested or x.ndim != 3 or x.shape[2] != self.dim:
            found = "is a nested tensor" if x.is_nested else f"has shape {tuple(x.shape)}"
            raise ArgumentError(self.name, "x", f"{found}; allowed: (B, N, {self.dim})")
        check_mask(self, "mask", mask, tuple(x.shape[:2]))
        x = x + self.attention(self.norm1(x), mask)
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


def _drawn(below: int) -> int | None:
    """A number from torch's generator on the CPU; None where a tensor has no number of its own."""
    if torch._C._are_functorch_transforms_active():
        return None
    drawn = torch.randint(below, (), device="cpu")
    return int(drawn) if type(drawn) is Tensor else None


def _require_causal(module: PerformerAttention | LinearSelfAttention) -> None:
    if not module.causal:
        raise ArgumentError(module.name, "causal", "is False; allowed for step: True, as earlier tokens cannot be gone back to")


def _one_mask(module: Projections, x: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    if mask is not None and key_padding_mask is not None:
        raise ArgumentError(module.name, "mask", "is given beside key_padding_mask; allowed: one of the two")
    padding, name = (key_padding_mask, "key_padding_mask") if mask is None else (mask, "mask")
    module.check_mask(name, padding, tuple(x.shape[:2]))
    return padding
