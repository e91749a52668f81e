"""AA-CLIP with cross-attention: a frozen CLIP, small trained adapters in both towers, and text that has seen the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, arguments, norm_matched_add
from triton_attn.models.clip_adapters import SimpleAdapter, SimpleProj
from triton_attn.models.clip_contexts import ContextRemembered, KeptProjection, check_context, check_text, checked_levels, checked_prompts
from triton_attn.models.clip_towers import NAME, towers_of
from triton_attn.nn import CrossAttentionModule, ImageCrossAttentionModule, image_context
from triton_attn.nn.cross_attention import ProjectedContext


class AdaptedCLIPWithCrossAttention(ContextRemembered):
    """A frozen CLIP with adapters after its first blocks; text attends to the image after its first block.

    An adapter: x <- w |x| A(x) / |A(x)| + (1 - w) x, token by token. Text: block 0, cross-attention to the image's context, adapter 0,
    block 1, adapter 1, ..., the last norm at the token that ends the text, a projection. Images: block 0, cross-attention to the text
    if asked for, adapter 0, ...; at each level the patches are projected to the joint space and normalised.

    Args:
        clip_model: open_clip's CLIP with a vision transformer, or transformers' CLIPModel. It is frozen in place: its parameters
            stop requiring gradients, it stays in evaluation mode, and nothing of it is written to.
        text_adapt_weight, image_adapt_weight: w of the adapters, 0 to 1.
        text_adapt_until, image_adapt_until: how many blocks of a tower have an adapter.
        levels: after which blocks dense features are taken, counted from 1; the first of them gives the context.
        relu: a leaky ReLU after the projections of the levels.
        cross_attn_heads, cross_attn_dropout: of both cross-attentions.
        text_cross_attn_weight, image_cross_attn_weight: of their sums.
        cross_attn_residual: "norm_matched", or "add" for the state of the original before it matched norms; see
            `nn.CrossAttentionModule`.
        context_reduce: None: one context for each image. "mean": where texts are not as many as images, all get the images' mean,
            as in the original; B P texts of (B, P, T).
        value_layers: how many of the last vision blocks attend to values by values for dense features; None: from the first level's
            block on, which of a ViT-L is 19.
        normalize_context: see `nn.image_context`.
        trim_text: leave out what is padding in every text of a call. No token of a causal tower sees what follows it: the result is
            the same, and of 77 tokens few are left. A tower that is not causal keeps them.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: AdaptedCLIPWithCrossAttention of an AA-CLIP fork (Apache-2.0), whose checkpoints load.
    """

    def __init__(
        self,
        clip_model: nn.Module,
        text_adapt_weight: float = 0.1,
        image_adapt_weight: float = 0.1,
        text_adapt_until: int = 3,
        image_adapt_until: int = 6,
        levels: Sequence[int] = (6, 12, 18, 24),
        relu: bool = True,
        cross_attn_heads: int = 8,
        cross_attn_dropout: float = 0.1,
        text_cross_attn_weight: float = 0.1,
        image_cross_attn_weight: float = 0.1,
        *,
        cross_attn_residual: str = "norm_matched",
        context_reduce: str | None = None,
        value_layers: int | None = None,
        normalize_context: bool = True,
        trim_text: bool = True,
    ) -> None:
        super().__init__()
        towers = towers_of(clip_model)
        self._check(towers.text_layers, towers.vision_layers, text_adapt_until, image_adapt_until, value_layers)
        self.levels = checked_levels(self, levels, towers.vision_layers)
        if towers.text_width != towers.joint_width:
            allowed = "equal widths, because text attends in the joint space"
            found = f"text of width {towers.text_width} and a joint space of {towers.joint_width}"
            raise ArgumentError(NAME, "clip_model", f"has {found}; allowed: {allowed}")
        self.t_w = arguments.probability(self, "text_adapt_weight", text_adapt_weight)
        self.i_w = arguments.probability(self, "image_adapt_weight", image_adapt_weight)
        self.text_adapt_until, self.image_adapt_until = text_adapt_until, image_adapt_until
        self.value_layers = towers.vision_layers - self.levels[0] + 1 if value_layers is None else value_layers
        self.normalize_context, self.context_reduce = arguments.flag(self, "normalize_context", normalize_context), context_reduce
        self.trim_text, relu = arguments.flag(self, "trim_text", trim_text), arguments.flag(self, "relu", relu)
        given = next(clip_model.parameters())
        factory: dict[str, Any] = {"device": given.device, "dtype": given.dtype}
        text, vision, joint = towers.text_width, towers.vision_width, towers.joint_width
        adapters = [SimpleAdapter(text, text, **factory) for _ in range(text_adapt_until)]
        self.text_adapter = nn.ModuleList([*adapters, SimpleProj(text, joint, **factory)])
        self.image_adapter = nn.ModuleDict(
            {
                "layer_adapters": nn.ModuleList(SimpleAdapter(vision, vision, **factory) for _ in range(image_adapt_until)),
                "seg_proj": nn.ModuleList(SimpleProj(vision, joint, relu, **factory) for _ in self.levels),
                "det_proj": SimpleProj(vision, joint, relu, **factory),
            }
        )
        crossed: dict[str, Any] = {"residual": cross_attn_residual, **factory}
        self.text_cross_attn = CrossAttentionModule(
            joint, cross_attn_heads, cross_attn_dropout, weight=text_cross_attn_weight, context_reduce=context_reduce, **crossed
        )
        self.image_cross_attn = ImageCrossAttentionModule(
            vision, text, cross_attn_heads, cross_attn_dropout, weight=image_cross_attn_weight, **crossed
        )
        self.clipmodel = clip_model.requires_grad_(False).eval()
        self.towers = towers
        self.current_image_context: Tensor | None = None
        self.current_text_context: Tensor | None = None
        self._kept = KeptProjection()

    @property
    def name(self) -> str:
        """For messages."""
        return NAME

    def _check(self, text: int, vision: int, text_until: int, image_until: int, value_layers: int | None) -> None:
        for argument, given, most in (("text_adapt_until", text_until, text), ("image_adapt_until", image_until, vision)):
            if arguments.whole(self, argument, given, 0) > most:
                raise ArgumentError(NAME, argument, f"is {given}; allowed: 0 to {most}, the tower's blocks")
        if value_layers is not None and arguments.whole(self, "value_layers", value_layers, 0) > vision:
            raise ArgumentError(NAME, "value_layers", f"is {value_layers}; allowed: 0 to {vision}, or None")

    def train(self, mode: bool = True) -> AdaptedCLIPWithCrossAttention:
        """As of every module, but the CLIP inside stays in evaluation mode."""
        super().train(mode)
        self.clipmodel.eval()
        return self

    # contexts

    def set_image_context(self, image_context: Tensor) -> None:
        """(B, M, joint width): what text attends to from now on, one for each image."""
        check_context(self, "image_context", image_context, "B, M", self.towers.joint_width)
        self.current_image_context = image_context

    def clear_image_context(self) -> None:
        """Text attends to no image any more."""
        self.current_image_context = None
        self._kept.forget()

    def set_text_context(self, text_context: Tensor) -> None:
        """(B, L, text width), or (1, L, text width): what images attend to. Normalised to unit length, token by token."""
        check_context(self, "text_context", text_context, "B, L", self.towers.text_width)
        self.current_text_context = nn.functional.normalize(text_context, dim=-1)

    def clear_text_context(self) -> None:
        """Images attend to no text any more."""
        self.current_text_context = None

    def _context(self) -> Tensor | ProjectedContext | None:
        """Keys and values once for all calls beside one context, where no gradient goes through them."""
        context = self.current_image_context
        if context is None or torch.is_grad_enabled() or self.context_reduce is not None or torch.compiler.is_compiling():
            return context
        return self._kept.of(self.text_cross_attn, context)

    # text

    def encode_text(self, text: Tensor, adapt_text: bool = True) -> Tensor:
        """Embeddings of texts, beside the image context if one is set.

        Args:
            text: (N, T) token numbers: with a context, one text for each of its images, or any number beside one image. Or (B, P, T), P
                texts for each image; (1, P, T): the same texts for each, whose first block runs once.
            adapt_text: False: the untouched CLIP's, without a context.

        Returns:
            (N, joint width) or (B, P, joint width), not normalised.

        Raises:
            ArgumentError: another number of texts than of images, without context_reduce="mean".
        """
        if not adapt_text:
            check_text(self, "text", text)
            found = self.towers.encode_text(text.flatten(0, -2))
            return torch.unflatten(found, 0, text.shape[:-1]) if text.ndim == 3 else found
        self.say_without_context(self.current_image_context)
        return self._encoded(text)

    def _encoded(self, text: Tensor) -> Tensor:
        check_text(self, "text", text)
        flat = text.flatten(0, -2)
        ends = self.towers.text_ends(flat)
        # a graph's shapes depend on no values
        if self.trim_text and self.towers.causal and len(ends) and not torch.compiler.is_compiling():
            text = text[..., : int(ends.max()) + 1]
        x, lead = self._after_first(text)
        for index in range(1, self.towers.text_layers):
            x = self._adapted(self.towers.text_block(index, x), "text", index)
        ends = ends.expand(lead[0], -1).flatten() if len(lead) == 2 and len(ends) != len(x) else ends
        ended = self.towers.ln_final(x[torch.arange(len(x), device=x.device), ends])
        return torch.unflatten(self.text_adapter[-1](ended), 0, lead)

    def encode_text_intermediate(self, text: Tensor) -> Tensor:
        """Text after block 0, cross-attention if a context is set, and adapter 0: (N, T, width) or (B, P, T, width)."""
        check_text(self, "text", text)
        self.say_without_context(self.current_image_context)
        x, lead = self._after_first(text)
        return torch.unflatten(x, 0, lead)

    def _after_first(self, text: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """(N, T, width), and the axes that N stands for."""
        x = self._first_block(text)
        context = self._context()
        if context is not None:
            x = self.text_cross_attn(x, context)
        lead = tuple((text if x.ndim == 3 else x).shape[: text.ndim - 1])
        return self._adapted(x.flatten(0, -3), "text", 0), lead

    def _first_block(self, text: Tensor) -> Tensor:
        x = self.towers.text_block(0, self.towers.embed_text(text.flatten(0, -2)))
        context = self.current_image_context
        if context is not None and self.context_reduce == "mean":
            return x  # the original knows no texts of an image: as many as images, or beside the mean
        x = torch.unflatten(x, 0, tuple(text.shape[:-1]))
        return x.expand(len(context), -1, -1, -1) if context is not None and text.ndim == 3 and len(text) == 1 else x

    def _adapted(self, x: Tensor, tower: str, index: int) -> Tensor:
        until, weight = (self.text_adapt_until, self.t_w) if tower == "text" else (self.image_adapt_until, self.i_w)
        if index >= until:
            return x
        adapters: Any = self.text_adapter if tower == "text" else self.image_adapter["layer_adapters"]
        matched: Tensor = norm_matched_add(x, adapters[index](x), scale=weight)
        adapted: Tensor = matched - weight * x
        return adapted

    def get_adapted_text_embedding(self, prompts: Sequence[Tensor], image_context: Tensor | None = None) -> Tensor:
        """The mean direction of each state's prompts, for stage 2 and inference: column 0 normal, column 1 abnormal.

        Args:
            prompts: token numbers of each state, (P, T), or (B, P, T) where each image has its own; P may differ between states.
            image_context: set for this call; None: the one that is set, if any.

        Returns:
            (B, joint width, states) beside a context or for (B, P, T); else, and with context_reduce="mean" for (P, T),
            (joint width, states). Columns have unit length.

        Warns:
            UserWarning: the text adapters were trained beside contexts, and there is none here. The original computes all
                embeddings of stage 2 and of its tests so.
        """
        if image_context is not None:
            before = self.current_image_context
            self.set_image_context(image_context)
            try:
                return self.get_adapted_text_embedding(prompts)
            finally:
                self.clear_image_context()
                self.current_image_context = before
        several = checked_prompts(self, prompts)
        self.say_without_context(self.current_image_context)
        context, averaged = self.current_image_context, self.context_reduce == "mean"
        alone = (context is None or averaged) and all(tokens.ndim == 2 for tokens in prompts)
        if context is not None and averaged:
            found = [self._encoded(tokens) for tokens in several]  # a state's texts are counted by themselves, as in the original
        else:
            # all states in one call: the context's keys and values are projected once
            together = self._encoded(torch.cat([tokens.expand(max(map(len, several)), -1, -1) for tokens in several], 1))
            found = list(torch.split(together, [tokens.shape[1] for tokens in several], 1))
        means = [nn.functional.normalize(nn.functional.normalize(state, dim=-1).mean(1), dim=-1) for state in found]
        embedding = torch.stack([mean.expand(max(map(len, means)), -1) for mean in means], -1)
        return embedding[0] if alone else embedding

    def patch_attention(self, text: Tensor, tokens: Any = slice(None), context_key_padding_mask: Tensor | None = None) -> Tensor:
        """Exact weights (B, heads, tokens, M) of chosen tokens of (B, T) texts over the patches of the context that is set.

        Args:
            text: token numbers.
            tokens, context_key_padding_mask: as for `nn.CrossAttentionModule.attention_weights`.
        """
        check_text(self, "text", text)
        if self.current_image_context is None:
            raise ArgumentError(NAME, "image_context", "is not set; allowed: set_image_context before")
        x = self._first_block(text)
        return self.text_cross_attn.attention_weights(x, self.current_image_context, tokens, context_key_padding_mask)

    # images

    @torch.no_grad()
    def dense_features(self, images: Tensor, levels: Sequence[int] | None = None) -> list[Tensor]:
        """norm(ln_post(patches) proj) + norm(class token) at each level, (B, M, joint width), of the untouched CLIP, without gradients.

        Patches come from a pass whose last `value_layers` blocks compute softmax(v v^T / sqrt(d)) v, the class token from the plain
        one. Both share the blocks before. The first level is the context of text: `compute_image_context`.
        """
        wanted = self.levels if levels is None else checked_levels(self, levels, self.towers.vision_layers)
        towers, first = self.towers, self.towers.vision_layers - self.value_layers
        x, found = towers.embed_image(images), {}
        for index in range(first):
            x = towers.image_block(index, x)
            found[index + 1] = x
        valued = x
        for index in range(first, towers.vision_layers):
            x = towers.image_block(index, x)
            if index < wanted[-1]:
                valued = found[index + 1] = towers.value_block(index, valued)
        cls: Any = towers.ln_post(x[:, 0])
        cls = cls if towers.proj is None else cls @ towers.proj
        return [image_context(found[at], cls, towers.ln_post, towers.proj, normalize=self.normalize_context) for at in wanted]

    def compute_image_context(self, images: Tensor) -> Tensor:
        """What `set_image_context` takes, (B, M, joint width), without gradients."""
        return self.dense_features(images, self.levels[:1])[0]

    def forward(self, x: Tensor, use_cross_attention: bool = False) -> tuple[list[Tensor], Tensor]:
        """Images (B, 3, height, width) -> [(B, M, joint width) for each level], (B, joint width).

        Args:
            x: the images.
            use_cross_attention: tokens attend to the text context after block 0; one must be set.
        """
        context = self.current_text_context
        if use_cross_attention and context is None:
            raise ArgumentError(NAME, "use_cross_attention", "is True without a text context; allowed: set_text_context before")
        y, tokens = self.towers.embed_image(x), []
        for index in range(max(self.levels)):
            y = self.towers.image_block(index, y)
            if index == 0 and use_cross_attention:
                y = self.image_cross_attn(y, context)
            y = self._adapted(y, "image", index)
            if index + 1 in self.levels:
                tokens.append(self.towers.ln_post(y[:, 1:]))
        projections: Any = self.image_adapter["seg_proj"]
        seg_tokens = [nn.functional.normalize(project(level), dim=-1) for project, level in zip(projections, tokens, strict=True)]
        det_token = nn.functional.normalize(self.image_adapter["det_proj"](tokens[-1]), dim=-1).mean(1)
        return seg_tokens, det_token

    def forward_original(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The untouched CLIP: its last patches in the joint space, [(B, M, joint width)], and its image embedding (B, joint width)."""
        y = self.towers.embed_image(x)
        for index in range(self.towers.vision_layers):
            y = self.towers.image_block(index, y)
        patches: Tensor = self.towers.ln_post(y[:, 1:])
        return [patches if self.towers.proj is None else patches @ self.towers.proj], self.towers.encode_image(x)
