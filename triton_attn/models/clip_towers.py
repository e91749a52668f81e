"""The parts of a CLIP, under one name for each, whether open_clip's CLIP or transformers' CLIPModel holds them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError, attention

NAME = "AdaptedCLIPWithCrossAttention"
ALLOWED = "open_clip's CLIP with a vision transformer, or transformers' CLIPModel"
# of open_clip's blocks: what would be lost where values stand for queries and keys; the option, the part, what it is without
OWN_WAYS = (
    ("scale_attn", "ln_attn", nn.Identity),
    ("scale_attn_inner", "attn.ln_inner", nn.Identity),
    ("scale_heads", "attn.head_scale", type(None)),
)


class Towers(Protocol):
    """What the adapted model asks of a CLIP. Tokens are (B, N, width), the class token first among an image's."""

    text_width: int
    vision_width: int
    joint_width: int
    text_layers: int
    vision_layers: int
    causal: bool  # no token of a text sees what follows it

    def embed_text(self, text: Tensor) -> Tensor:
        """(B, T) token numbers -> (B, T, text_width), before the first block."""

    def text_block(self, index: int, x: Tensor) -> Tensor:
        """One block, causal if the tower is."""

    def text_ends(self, text: Tensor) -> Tensor:
        """(B,) positions of the tokens that end the texts; what follows one is padding."""

    def encode_text(self, text: Tensor) -> Tensor:
        """The untouched model's embedding (B, joint_width)."""

    def embed_image(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, 1 + M, vision_width), before the first block."""

    def image_block(self, index: int, x: Tensor) -> Tensor:
        """One block."""

    def value_block(self, index: int, x: Tensor) -> Tensor:
        """The same block with softmax(v v^T / sqrt(d)) v in place of its attention."""

    def encode_image(self, images: Tensor) -> Tensor:
        """The untouched model's embedding (B, joint_width)."""

    @property
    def ln_final(self) -> nn.Module:
        """The text tower's last norm."""

    @property
    def ln_post(self) -> nn.Module:
        """The vision tower's last norm."""

    @property
    def proj(self) -> Tensor | None:
        """(vision_width, joint_width)."""


def towers_of(clip: Any) -> Towers:
    """Of the model's parts, not of its class, so that neither library has to be installed.

    Raises:
        ArgumentError: it is neither open_clip's CLIP nor transformers' CLIPModel, or one that pools or attends in a way of its own.
    """
    if isinstance(getattr(clip, "text_model", None), nn.Module) and isinstance(getattr(clip, "vision_model", None), nn.Module):
        kind = getattr(getattr(clip, "config", None), "model_type", None)
        if kind != "clip":  # others have the same parts, but embed, pool or project in another way
            raise ArgumentError(NAME, "clip_model", f"is a {type(clip).__name__} of type {kind!r}; allowed: {ALLOWED}")
        return _Transformers(clip)
    if hasattr(clip, "visual") and hasattr(clip, "token_embedding") and hasattr(clip, "transformer"):
        return _OpenCLIP(clip)
    raise ArgumentError(NAME, "clip_model", f"is a {type(clip).__name__}; allowed: {ALLOWED}")


def _part(block: Any, path: str) -> Any:
    for name in path.split("."):
        block = getattr(block, name, None)
    return block


def attend_to_values(value: Tensor, heads: int) -> Tensor:
    """softmax(v v^T / sqrt(d)) v, head by head, of (B, N, width): a token looks at those that are like it."""
    split = torch.unflatten(value, 2, (heads, -1)).transpose(1, 2)
    looked: Tensor = attention(split, split, split)
    return looked.transpose(1, 2).flatten(2)


class _OpenCLIP:
    """open_clip's CLIP: ViT and text transformer of residual attention blocks with nn.MultiheadAttention."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        visual = clip.visual
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
        if blocks is None or not hasattr(visual, "class_embedding") or not hasattr(blocks[0], "attn"):
            raise ArgumentError(NAME, "clip_model", f"has a {type(visual).__name__} for images; allowed: open_clip's VisionTransformer")
        if getattr(visual, "attn_pool", None) is not None or getattr(visual, "pool_type", "tok") != "tok":
            raise ArgumentError(NAME, "clip_model", "pools its patches; allowed: one whose image embedding is its class token")
        for option, path, without in OWN_WAYS:
            if any(not isinstance(_part(block, path), (without, type(None))) for block in blocks):
                raise ArgumentError(NAME, "clip_model", f"has blocks with {option}; allowed: open_clip's blocks without it")
        if getattr(clip, "text_pool_type", "argmax") not in ("argmax", "eos"):
            raise ArgumentError(NAME, "clip_model", f"pools text by {clip.text_pool_type!r}; allowed: 'argmax', 'eos'")
        self.text_width = clip.token_embedding.embedding_dim
        self.vision_width = visual.class_embedding.shape[0]
        self.joint_width = self.vision_width if visual.proj is None else visual.proj.shape[1]
        self.text_layers, self.vision_layers = len(clip.transformer.resblocks), len(blocks)
        self.causal = clip.attn_mask is not None  # None with no_causal_mask

    def embed_text(self, text: Tensor) -> Tensor:
        x: Tensor = self.clip.token_embedding(text)
        positions: Tensor = self.clip.positional_embedding[: text.shape[1]]
        return x + positions.to(x.dtype)

    def text_block(self, index: int, x: Tensor) -> Tensor:
        mask = self.clip.attn_mask
        mask = None if mask is None else mask[: x.shape[1], : x.shape[1]]
        return self._run(self.clip.transformer, index, x, mask)

    def text_ends(self, text: Tensor) -> Tensor:
        if getattr(self.clip, "text_pool_type", "argmax") == "eos":
            return text.eq(self.clip.text_eos_id).int().argmax(1)
        return text.argmax(1)

    def encode_text(self, text: Tensor) -> Tensor:
        embedding: Tensor = self.clip.encode_text(text)
        return embedding

    def embed_image(self, images: Tensor) -> Tensor:
        visual = self.clip.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        if patches.shape[1] + 1 != visual.positional_embedding.shape[0]:
            allowed = f"{visual.positional_embedding.shape[0] - 1} patches; open_clip.create_model(force_image_size=...) makes another size"
            raise ArgumentError(NAME, "images", f"have shape {tuple(images.shape)}, {patches.shape[1]} patches; allowed: {allowed}")
        first = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        x = torch.cat((first, patches), 1) + visual.positional_embedding.to(patches.dtype)
        embedded: Tensor = visual.ln_pre(visual.patch_dropout(x))
        return embedded

    def image_block(self, index: int, x: Tensor) -> Tensor:
        return self._run(self.clip.visual.transformer, index, x, None)

    def value_block(self, index: int, x: Tensor) -> Tensor:
        block = self.clip.visual.transformer.resblocks[index]
        mixer = block.attn
        weight, bias = mixer.in_proj_weight, mixer.in_proj_bias
        value = nn.functional.linear(block.ln_1(x), weight[2 * x.shape[2] :], None if bias is None else bias[2 * x.shape[2] :])
        x = x + block.ls_1(mixer.out_proj(attend_to_values(value, mixer.num_heads)))
        after: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
        return after

    def encode_image(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.clip.encode_image(images)
        return embedding

    @property
    def ln_final(self) -> nn.Module:
        norm: nn.Module = self.clip.ln_final
        return norm

    @property
    def ln_post(self) -> nn.Module:
        norm: nn.Module = self.clip.visual.ln_post
        return norm

    @property
    def proj(self) -> Tensor | None:
        proj: Tensor | None = self.clip.visual.proj
        return proj

    @staticmethod
    def _run(transformer: Any, index: int, x: Tensor, mask: Tensor | None) -> Tensor:
        # sequence first before open_clip 2.25, where there was no such attribute
        first = getattr(transformer, "batch_first", False)
        out: Tensor = transformer.resblocks[index](x if first else x.transpose(0, 1), attn_mask=mask)
        return out if first else out.transpose(0, 1)


class _Transformers:
    """transformers' CLIPModel. Positions of images of another size are interpolated by the library itself."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self.text, self.vision = clip.text_model, clip.vision_model
        self.text_width, self.vision_width = clip.text_projection.in_features, clip.visual_projection.in_features
        self.joint_width = clip.visual_projection.out_features
        self.text_layers, self.vision_layers, self.causal = len(self.text.encoder.layers), len(self.vision.encoder.layers), True

    def embed_text(self, text: Tensor) -> Tensor:
        embedded: Tensor = self.text.embeddings(input_ids=text)
        return embedded

    def text_block(self, index: int, x: Tensor) -> Tensor:
        # written out, because eager attention does not look at is_causal
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        return self._run(self.text.encoder.layers[index], x, mask[None, None])

    def text_ends(self, text: Tensor) -> Tensor:
        end = self.text.eos_token_id
        # configurations with 2 are older than the right number: there the end is the largest one
        return text.argmax(1) if end == 2 else text.eq(end).int().argmax(1)

    def encode_text(self, text: Tensor) -> Tensor:
        return _pooled(self.clip.get_text_features(input_ids=text))

    def embed_image(self, images: Tensor) -> Tensor:
        embedded = self.vision.embeddings(images, interpolate_pos_encoding=self._resized(images))
        normed: Tensor = self.vision.pre_layrnorm(embedded)
        return normed

    def image_block(self, index: int, x: Tensor) -> Tensor:
        return self._run(self.vision.encoder.layers[index], x, None)

    def value_block(self, index: int, x: Tensor) -> Tensor:
        block = self.vision.encoder.layers[index]
        mixer = block.self_attn
        x = x + mixer.out_proj(attend_to_values(mixer.v_proj(block.layer_norm1(x)), mixer.num_heads))
        after: Tensor = x + block.mlp(block.layer_norm2(x))
        return after

    def encode_image(self, images: Tensor) -> Tensor:
        return _pooled(self.clip.get_image_features(pixel_values=images, interpolate_pos_encoding=self._resized(images)))

    @property
    def ln_final(self) -> nn.Module:
        norm: nn.Module = self.text.final_layer_norm
        return norm

    @property
    def ln_post(self) -> nn.Module:
        norm: nn.Module = self.vision.post_layernorm
        return norm

    @property
    def proj(self) -> Tensor | None:
        weight: Tensor = self.clip.visual_projection.weight
        return weight.mT

    def _resized(self, images: Tensor) -> bool:
        patch, side = self.vision.embeddings.patch_size, self.vision.embeddings.image_size
        if images.shape[2] % patch or images.shape[3] % patch:
            raise ArgumentError(NAME, "images", f"have shape {tuple(images.shape)}; allowed: sides that are multiples of {patch}")
        return tuple(images.shape[2:]) != (side, side)

    @staticmethod
    def _run(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        out = layer(x, mask)
        first: Tensor = out[0] if isinstance(out, tuple) else out  # transformers 4 gave tuples
        return first


def _pooled(found: Any) -> Tensor:
    """transformers 4 gave the tensor, 5 gives it among others."""
    embedding: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return embedding
