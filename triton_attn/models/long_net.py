"""LongNet: a decoder language model on dilated attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triton_attn import ArgumentError, arguments, attention, dilated_attention
from triton_attn.nn import magneto_gain
from triton_attn.nn.dilated_attention import how, pattern

POSITIONS = ("xpos", "rotary")


class LongNet(nn.Module):
    """Decoder of pre-norm blocks with sub-layer norms: x += W_o LN(attention(LN x)); x += W_2 LN(GELU(W_1 LN x)); logits by the embedding.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of tokens.
        depth: number of blocks.
        heads: a divisor of dim, with heads of an even width.
        segment_lengths, dilation_rates: of the branches; None for both: dense attention.
        mlp_ratio: width inside of the MLP over dim.
        dropout: of attention weights and of what blocks add.
        position: "rotary", or "xpos": rotary with queries and keys scaled by their distance. The scales of "xpos" grow with the length and
            leave float16 at 13 tokens for each of xpos_scale_base, other dtypes at 140: longer inputs are refused.
        xpos_scale_base: tokens over which "xpos" decays by its factor, above 0.
        mode, offset_rule, overlap: as in `triton_attn.dilated_attention`.
        checkpointing: keep what enters a block, and compute its inside again in the backward pass.
        chunk: tokens that go through an MLP at a time; a sixteenth of them goes through the wider logits of `loss`. The inside of either is
            computed again in the backward pass. None: all at once.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", 2023; Sun et al., "A Length-Extrapolatable
    Transformer", 2022, for xpos; Wang et al., "Foundation Transformers", 2022, for sub-layer norms and initial values.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        segment_lengths: Sequence[int] | None = (2048, 4096, 8192, 16384, 32768),
        dilation_rates: Sequence[int] | None = (1, 2, 4, 6, 12),
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        position: str = "xpos",
        xpos_scale_base: float = 512.0,
        mode: str = "longnet",
        offset_rule: str = "block",
        overlap: str = "count",
        checkpointing: bool = False,
        chunk: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.checkpointing = arguments.flag(self, "checkpointing", checkpointing)
        self.chunk = None if chunk is None else arguments.whole(self, "chunk", chunk, 1)
        for argument, given in (("num_tokens", num_tokens), ("dim", dim), ("depth", depth), ("heads", heads)):
            arguments.whole(self, argument, given, 1)
        if dim % (2 * heads):
            raise ArgumentError(self.name, "heads", f"is {heads}; allowed: a divisor of dim / 2, {dim / 2:g}")
        if (segment_lengths is None) != (dilation_rates is None):
            raise ArgumentError(self.name, "dilation_rates", "and segment_lengths are not both given; allowed: both, or None for both")
        options: dict[str, Any] = {}
        if segment_lengths is not None and dilation_rates is not None:
            lengths, rates = pattern(self, segment_lengths, dilation_rates)
            options = {"segment_lengths": lengths, "dilation_rates": rates, "mode": mode, "offset_rule": offset_rule, "overlap": overlap}
        how(self, mode, offset_rule, overlap)
        arguments.choice(self, "position", position, POSITIONS)
        if arguments.finite(self, "xpos_scale_base", xpos_scale_base) <= 0:
            raise ArgumentError(self.name, "xpos_scale_base", f"is {xpos_scale_base}; allowed: above 0")
        hidden = round(arguments.finite(self, "mlp_ratio", mlp_ratio) * dim)
        if hidden < 1:
            raise ArgumentError(self.name, "mlp_ratio", f"is {mlp_ratio}; allowed: 1 / dim and more")
        factory = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(num_tokens, dim, **factory)
        self.positions = Rotary(dim // heads, xpos_scale_base if position == "xpos" else None)
        arguments.probability(self, "dropout", dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, dropout, options, self.chunk, factory) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, **factory)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        for block in self.blocks:
            block.reset_parameters(magneto_gain(depth))  # type: ignore[operator]

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N) whole numbers, N of 0 and more -> (B, N, num_tokens), logits of what follows each."""
        return F.linear(self.norm(self._states(tokens)), self.embedding.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """The mean cross entropy, in nats, of each of (B, N + 1) tokens after those before it; with `chunk` the logits are never whole."""
        tokens = self._whole(tokens)
        if tokens.shape[1] < 2:
            raise ArgumentError(self.name, "tokens", f"has shape {tuple(tokens.shape)}; allowed: (B, N + 1), N of 1 and more")
        states, targets = self._states(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        if self.chunk is None:
            return self._entropy(states, targets) / targets.numel()
        rows = max(1, self.chunk // 16)
        parts = zip(torch.split(states, rows), torch.split(targets, rows), strict=True)
        sums = [checkpoint(self._entropy, *part, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum() / targets.numel()

    def _entropy(self, states: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.norm(states), self.embedding.weight)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.long(), reduction="sum")

    def _whole(self, tokens: Tensor) -> Tensor:
        """Tokens in a dtype that an embedding takes."""
        if not isinstance(tokens, Tensor):
            raise arguments.ArgumentTypeError(self.name, "tokens", f"is a {type(tokens).__name__}; allowed: torch.Tensor")
        if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
            raise arguments.ArgumentTypeError(self.name, "tokens", f"is {tokens.dtype}; allowed: whole numbers")
        if tokens.ndim != 2:
            raise ArgumentError(self.name, "tokens", f"has shape {tuple(tokens.shape)}; allowed: (B, N)")
        return tokens if tokens.dtype == torch.int32 else tokens.long()

    def _states(self, tokens: Tensor) -> Tensor:
        tokens = self._whole(tokens)
        x: Tensor = self.embedding(tokens)
        turns = self.positions(tokens.shape[1], x.device, arguments.working_dtype(x, arguments.autocast_dtype(x.device.type)))
        for block in self.blocks:
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, turns, use_reentrant=False) if again else block(x, turns)
        return x

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, length: int, *, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Append `length` tokens to (B, N), each drawn from softmax(logits / temperature), or the likeliest at temperature 0.

        Every token is computed from the whole sequence before it: segments have no cache of fixed size.

        Args:
            tokens: (B, N), N of 1 and more.
            length: how many to append.
            temperature: 0 and more.
            top_k: draw from so many of the likeliest alone.
            generator: what draws.

        Returns:
            (B, N + length), int32 where tokens are, else int64. Dropout is off meanwhile.

        Raises:
            ArgumentError: an argument is wrong; the message names it and what is allowed.
        """
        tokens = self._whole(tokens)
        if tokens.shape[1] < 1:
            raise ArgumentError(self.name, "tokens", f"has shape {tuple(tokens.shape)}; allowed: (B, N), N of 1 and more")
        arguments.whole(self, "length", length, 0)
        if arguments.finite(self, "temperature", temperature) < 0:
            raise ArgumentError(self.name, "temperature", f"is {temperature}; allowed: 0 and more")
        least = None if top_k is None else min(arguments.whole(self, "top_k", top_k, 1), self.embedding.num_embeddings)
        learning = [module for module in self.modules() if module.training]
        self.eval()
        try:
            for _ in range(length):
                logits = self(tokens)[:, -1].float()
                if least is not None:
                    logits = logits.masked_fill(logits < logits.topk(least).values[:, -1:], -torch.inf)
                if temperature == 0:
                    drawn = logits.argmax(-1, keepdim=True)
                else:
                    drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                tokens = torch.cat((tokens, drawn.to(tokens.dtype)), 1)
        finally:
            for module in learning:
                module.training = True
        return tokens


class Rotary(nn.Module):
    """Cosines and sines of each position and frequency 10000^(-2 i / width), and xpos's factors; in float32, whatever the model's dtype."""

    def __init__(self, width: int, scale_base: float | None) -> None:
        super().__init__()
        self.scale_base, self.width = scale_base, width

    def forward(self, length: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
        """(cos, sin, factor), each (N, width / 2); a query is multiplied by factor, a key divided by it, and then they are of the dtype."""
        place = torch.arange(length, device=device, dtype=torch.float32)[:, None]
        even = torch.arange(0, self.width, 2, device=device, dtype=torch.float32)
        angle = place * 10000.0 ** (-even / self.width)
        if self.scale_base is None:
            return angle.cos(), angle.sin(), None
        # at the ends the first factor is 3.5 ** (length / 2 / base): float32 holds 2 ** 127, float16 2 ** 12 with a query in it
        largest = 12 if dtype == torch.float16 else 127
        most = int(2 * self.scale_base * largest * math.log(2) / math.log(3.5))
        if length > most:
            instead = f"position='rotary' or an xpos_scale_base from {math.ceil(length / most * self.scale_base)}"
            held = "xpos in float16" if dtype == torch.float16 else "xpos"
            raise ArgumentError("LongNet", "tokens", f"has {length} of them; allowed with {held}: up to {most}, or {instead}")
        decay = (even + 0.4 * self.width) / (1.4 * self.width)
        return angle.cos(), angle.sin(), decay ** ((place - length // 2) / self.scale_base)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, N, D): each pair of neighbours rotated, in float32."""
    even, odd = x[..., ::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each with a norm before and one inside."""

    def __init__(
        self, dim: int, heads: int, hidden: int, dropout: float, options: dict[str, Any], chunk: int | None, factory: dict[str, Any]
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.options, self.chunk = heads, dropout, options, chunk
        self.attn_norm = nn.LayerNorm(dim, **factory)
        self.qkv_proj = nn.Linear(dim, 3 * dim, **factory)
        self.inner_norm = nn.LayerNorm(dim, **factory)
        self.out_proj = nn.Linear(dim, dim, **factory)
        self.mlp_norm = nn.LayerNorm(dim, **factory)
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.hidden_norm = nn.LayerNorm(hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def reset_parameters(self, gain: float) -> None:
        """Normal after Xavier; values, output and MLP with a gain."""
        query, key, value = self.qkv_proj.weight.chunk(3)
        for weight, factor in ((query, 1.0), (key, 1.0), (value, gain), *((x.weight, gain) for x in (self.out_proj, self.fc1, self.fc2))):
            nn.init.xavier_normal_(weight, gain=factor)
        for layer in (self.qkv_proj, self.out_proj, self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        b, n, dim = x.shape
        query, key, value = self.qkv_proj(self.attn_norm(x)).view(b, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        cos, sin, factor = turns
        query = turned(query, cos, sin) if factor is None else turned(query, cos * factor, sin * factor)
        key = turned(key, cos, sin) if factor is None else turned(key, cos / factor, sin / factor)
        dropout = self.dropout if self.training else 0.0
        call = dilated_attention if self.options else attention
        out = call(query, key, value, causal=True, dropout_p=dropout, **self.options)
        x = x + F.dropout(self.out_proj(self.inner_norm(out.transpose(1, 2).reshape(b, n, dim))), self.dropout, self.training)
        if self.chunk is None or self.chunk >= n:
            return self._with_mlp(x)
        if not torch.is_grad_enabled():
            return torch.cat([self._with_mlp(part) for part in torch.split(x, self.chunk, 1)], 1)
        return torch.cat([checkpoint(self._with_mlp, part, use_reentrant=False) for part in torch.split(x, self.chunk, 1)], 1)

    def _with_mlp(self, x: Tensor) -> Tensor:
        hidden = self.hidden_norm(F.gelu(self.fc1(self.mlp_norm(x))))
        return x + F.dropout(self.fc2(hidden), self.dropout, self.training)
