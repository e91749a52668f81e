"""AA-CLIP's cross-attention: text that looks at an image, and an image that looks at text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments, attention, norm_matched_add
from triton_attn.arguments import ArgumentTypeError
from triton_attn.nn.attention_weights import attention_weights

RESIDUALS = ("norm_matched", "scaled", "add", None)
WEIGHTED = RESIDUALS[:2]


class ProjectedContext(NamedTuple):
    """Keys and values (B, H, M, head_dim) of a context, for as many calls as it serves."""

    key: Tensor
    value: Tensor


class CrossAttention(nn.Module):
    """cross = W_o softmax(q k^T / sqrt(head_dim)) v, q of one sequence, k and v of another; then joined to the first by a residual.

    What `CrossAttentionModule` and `ImageCrossAttentionModule` share.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        num_heads: int,
        dropout: float,
        residual: str | None,
        weight: float,
        learnable_weight: bool,
        context_reduce: str | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        if residual not in RESIDUALS:
            raise ArgumentError(self.name, "residual", f"is {residual!r}; allowed: {', '.join(map(repr, RESIDUALS))}")
        if context_reduce not in (None, "mean"):
            raise ArgumentError(self.name, "context_reduce", f"is {context_reduce!r}; allowed: None, 'mean'")
        inner = context_dim
        for argument, given in (*zip(self._widths, (query_dim, context_dim), strict=True), ("num_heads", num_heads)):
            arguments.whole(self, argument, given, 1)
        if inner % num_heads:
            raise ArgumentError(self.name, "num_heads", f"is {num_heads}; allowed: a divisor of {inner}")
        self.query_dim, self.context_dim, self.num_heads, self.head_dim = query_dim, context_dim, num_heads, inner // num_heads
        self.dropout = arguments.probability(self, "dropout", dropout)
        self.residual, self.context_reduce = residual, context_reduce
        self.q_proj = nn.Linear(query_dim, inner, **factory)
        self.k_proj = nn.Linear(context_dim, inner, **factory)
        self.v_proj = nn.Linear(context_dim, inner, **factory)
        self.out_proj = nn.Linear(inner, query_dim, **factory)
        number = arguments.finite(self, "weight", weight)
        learned = arguments.flag(self, "learnable_weight", learnable_weight)
        if learned and residual not in WEIGHTED:  # a parameter that no gradient ever reaches
            allowed = f"False, or residual {' or '.join(map(repr, WEIGHTED))}"
            raise ArgumentError(
                self.name, "learnable_weight", f"is True with residual={residual!r}, which has no weight; allowed: {allowed}"
            )
        self.weight: Any = nn.Parameter(torch.tensor(number, **factory)) if learned else number
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def name(self) -> str:
        """The class's, for messages."""
        return type(self).__name__

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}, residual={self.residual!r}"

    def project_context(self, context: Tensor) -> ProjectedContext:
        """Keys and values of (B, M, context_dim), to hand to `forward` in place of the context: they do not depend on the queries."""
        if not isinstance(context, Tensor) or context.ndim != 3 or context.shape[2] != self.context_dim:
            found = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ArgumentError(self.name, self._context, f"has shape {found}; allowed: (B, M, {self.context_dim})")
        self._like_weights(self._context, context, self.k_proj)
        return ProjectedContext(self._heads(self.k_proj(context)), self._heads(self.v_proj(context)))

    # what arguments are called
    _features, _context = "text_features", "image_context"
    _widths = ("dim", "dim")

    def forward(
        self,
        text_features: Tensor,
        image_context: Tensor | ProjectedContext,
        text_key_padding_mask: Tensor | None = None,
        context_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Project, attend, project back, add.

        Args:
            text_features: (B, T, dim); or (B, P, T, dim), P prompts for each image, which cost one call; or (P, T, dim) beside one
                image. (For an ImageCrossAttentionModule these are the image's tokens, and what follows is text.)
            image_context: (B, M, context_dim), or what `project_context` made of it.
            text_key_padding_mask: (B, T), or (B, P, T), boolean, True = padding: such tokens come out as they went in (as zeros
                without a residual).
            context_key_padding_mask: (B, M) boolean, True = ignore. Beside a context that is masked as a whole, or has M = 0, text
                comes out as it went in (as zeros without a residual).

        Returns:
            Of text_features' shape: the residual's sum; with residual=None cross alone.

        Raises:
            ArgumentError: an argument is wrong. As many images as batches of text, or one: with context_reduce="mean" any number,
                whose mean stands for each, as in the original.
        """
        x, context, mask = self._matched(text_features, image_context, context_key_padding_mask)
        if text_key_padding_mask is not None:
            self._check_mask("text_key_padding_mask", text_key_padding_mask, tuple(text_features.shape[:-1]))
        query = self._heads(self.q_proj(x))
        heads = attention(query, context.key, context.value, key_padding_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        cross = self.out_proj(heads.transpose(1, 2).flatten(2)).view(text_features.shape)
        if text_key_padding_mask is not None:
            cross = cross.masked_fill(text_key_padding_mask[..., None], 0.0)
        if mask is not None or context.key.shape[2] == 0:
            # out_proj's bias comes out of nothing, too
            nothing = cross.new_ones(1, dtype=torch.bool) if mask is None else mask.all(1)
            cross = cross.masked_fill(nothing.view(-1, *[1] * (cross.ndim - 1)), 0.0)
        if self.residual == "norm_matched":
            learned = isinstance(self.weight, Tensor)
            given: dict[str, Any] = {"weight": self.weight} if learned else {"scale": self.weight}
            matched: Tensor = norm_matched_add(text_features, cross, **given)
            return matched
        if self.residual == "scaled":
            cross = self.weight * cross
        joined: Tensor = cross if self.residual is None else text_features + cross
        return joined

    def attention_weights(
        self,
        text_features: Tensor,
        image_context: Tensor | ProjectedContext,
        tokens: Any = slice(None),
        context_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Exact weights (B, H, tokens, M) of chosen tokens, without dropout: what they look at.

        Args:
            text_features, image_context, context_key_padding_mask: as for `forward`.
            tokens: an index, whose axis stays with size 1, or a slice, into the tokens of (B, T, dim), or of prompts folded one behind
                the other.
        """
        x, context, mask = self._matched(text_features, image_context, context_key_padding_mask)
        if isinstance(tokens, int):
            arguments.whole(self, "tokens", tokens, -x.shape[1], x.shape[1] - 1)
            tokens = [tokens]
        elif not isinstance(tokens, (slice, list, Tensor)):
            raise ArgumentTypeError(self.name, "tokens", f"is a {type(tokens).__name__}; allowed: an index or a slice")
        return attention_weights(self._heads(self.q_proj(x[:, tokens])), context.key, key_padding_mask=mask, average=False)

    def _check_mask(self, argument: str, given: Any, shape: tuple[int, ...]) -> None:
        if not isinstance(given, Tensor):
            raise ArgumentTypeError(self.name, argument, f"is {given!r:.40}, a {type(given).__name__}; allowed: bool, {shape}, or None")
        if tuple(given.shape) != shape or given.dtype != torch.bool:
            raise ArgumentError(self.name, argument, f"is {given.dtype} of shape {tuple(given.shape)}; allowed: bool, {shape}")

    def _like_weights(self, argument: str, given: Tensor, layer: nn.Module) -> None:
        """Of the layer's dtype, where it is a plain one and autocast casts nothing."""
        if type(layer) is not nn.Linear or arguments.autocast_dtype(given.device.type) is not None:
            return
        if given.dtype != layer.weight.dtype:
            raise ArgumentTypeError(self.name, argument, f"has dtype {given.dtype}; allowed: {layer.weight.dtype}, as the weights")

    def _matched(
        self, features: Tensor, context: Tensor | ProjectedContext, mask: Tensor | None
    ) -> tuple[Tensor, ProjectedContext, Tensor | None]:
        """(images, tokens, dim), the prompts of an image one behind the other; its keys and values."""
        if not isinstance(features, Tensor) or features.ndim not in (3, 4) or features.shape[-1] != self.query_dim:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ArgumentError(
                self.name, self._features, f"has shape {found}; allowed: (B, T, {self.query_dim}) or (B, P, T, {self.query_dim})"
            )
        self._like_weights(self._features, features, self.q_proj)
        if not isinstance(context, ProjectedContext):
            if (
                self.context_reduce == "mean"
                and isinstance(context, Tensor)
                and context.ndim == 3
                and context.shape[0] != features.shape[0]
            ):
                context = context.mean(0, keepdim=True)
            context = self.project_context(context)
        images, batch = context.key.shape[0], features.shape[0]
        if images not in (1, batch):
            allowed = f"{batch} or 1, or context_reduce='mean'"
            raise ArgumentError(self.name, self._context, f"has {images} images for {batch} batches of text; allowed: {allowed}")
        folded = features.reshape(images if images == 1 else batch, -1, self.query_dim)
        if mask is not None:
            self._check_mask("context_key_padding_mask", mask, (images, context.key.shape[2]))
        return folded, context, mask

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)


class CrossAttentionModule(CrossAttention):
    """Text features that attend to an image's: vision-aware text.

    Args:
        dim: width of both.
        num_heads: a divisor of dim.
        dropout: share of attention weights dropped in training.
        residual: "norm_matched": x + weight |x| cross / |cross|; "scaled": x + weight cross; "add": x + cross; None: cross alone, which
            is what the original returns.
        weight: of the first two.
        learnable_weight: make it a parameter; of those two.
        context_reduce: None; "mean": another number of images than texts is averaged, as the original does silently.
        device, dtype: of the parameters.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: CrossAttentionModule of an AA-CLIP fork, whose state dicts load.
    """

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 8,
        dropout: float = 0.1,
        *,
        residual: str | None = "norm_matched",
        weight: float = 0.1,
        learnable_weight: bool = False,
        context_reduce: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, dim, num_heads, dropout, residual, weight, learnable_weight, context_reduce, factory)


class ImageCrossAttentionModule(CrossAttention):
    """Image tokens that attend to text; heads have text_dim / num_heads.

    Args:
        image_dim: width of the image's tokens.
        text_dim: width of the text's.
        num_heads, dropout, residual, weight, learnable_weight, context_reduce, device, dtype: as in `CrossAttentionModule`.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: ImageCrossAttentionModule of an AA-CLIP fork, whose state dicts load.
    """

    _features, _context = "image_features", "text_context"
    _widths = ("image_dim", "text_dim")

    def __init__(
        self,
        image_dim: int = 1024,
        text_dim: int = 768,
        num_heads: int = 8,
        dropout: float = 0.1,
        *,
        residual: str | None = "norm_matched",
        weight: float = 0.1,
        learnable_weight: bool = False,
        context_reduce: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(image_dim, text_dim, num_heads, dropout, residual, weight, learnable_weight, context_reduce, factory)


def image_context(layer6_tokens: Tensor, cls_token: Tensor, ln_post: nn.Module, proj: Tensor | None, *, normalize: bool = True) -> Tensor:
    """What text attends to: the patches of an early layer, in the joint space, each with the image's last class token added.

    norm(ln_post(patches) proj) + norm(cls), with norm to unit length.

    Args:
        layer6_tokens: (B, 1 + M, width), class token first, which is left out.
        cls_token: (B, dim), the untouched model's image embedding.
        ln_post: the vision tower's last norm.
        proj: (width, dim), its projection; None if it has none.
        normalize: False adds them as they are, as the original's document has it and its code has not.

    Returns:
        (B, M, dim). Under torch.no_grad it needs no memory for gradients, which a frozen CLIP has no use for.
    """
    patches = ln_post(layer6_tokens[:, 1:])
    patches = patches if proj is None else patches @ proj
    if normalize:
        patches, cls_token = (nn.functional.normalize(x, dim=-1) for x in (patches, cls_token))
    joined: Tensor = patches + cls_token[:, None]
    return joined
