"""Where a CLIP and its tokenizer come from: transformers, open_clip, or random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triton_attn import ArgumentError
from triton_attn.clip.folders import Loader
from triton_attn.clip.prompts import Tokenizer

NAME = "train-clip-adapter"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's own training
TOKENS, BEGIN, END = 77, 256, 257
ALLOWED = "tiny, transformers:NAME-OR-FOLDER, open_clip:MODEL or open_clip:MODEL:PRETRAINED"


@dataclass(frozen=True)
class Source:
    """A CLIP, what turns sentences into its tokens, and how images reach it."""

    clip: nn.Module
    tokenizer: Tokenizer
    loader: Loader


def load(text: str, image_size: int | None = None) -> Source:
    """The CLIP that a text names.

    Args:
        text: "tiny": a small transformers CLIPModel with random weights, which depends on torch's generator, and its bytes as tokens.
            "transformers:X": CLIPModel.from_pretrained(X) and the tokenizer beside it. "open_clip:MODEL" with random weights,
            "open_clip:MODEL:PRETRAINED" with weights by open_clip's name or a file.
        image_size: the side that images are resized to; None: the CLIP's own.

    Raises:
        ArgumentError: it names nothing, or the library cannot load it.
        ModuleNotFoundError: the library is not installed.
    """
    kind, _, rest = text.partition(":")
    if text == "tiny":
        return _tiny(image_size or 64)
    if kind == "transformers" and rest:
        return _transformers(rest, image_size)
    if kind == "open_clip" and rest:
        return _open_clip(rest, image_size)
    raise ArgumentError(NAME, "clip", f"is {text!r}; allowed: {ALLOWED}")


def bytes_of(sentences: list[str]) -> Tensor:
    """(P, 77): a begin, at most 75 bytes, an end, padding of 0."""
    rows = torch.zeros(len(sentences), TOKENS, dtype=torch.int64)
    for row, sentence in zip(rows, sentences, strict=True):
        numbers = [BEGIN, *sentence.encode()[: TOKENS - 2], END]
        row[: len(numbers)] = torch.tensor(numbers)
    return rows


def _tiny(image_size: int) -> Source:
    transformers = _library("transformers", "hf")
    if image_size % 8 or not 16 <= image_size <= 512:
        raise ArgumentError(NAME, "image_size", f"is {image_size}; allowed: multiples of 8 from 16 to 512")
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={
            **text,
            "vocab_size": END + 1,
            "max_position_embeddings": TOKENS,
            "eos_token_id": END,
            "bos_token_id": BEGIN,
            "pad_token_id": 0,
        },
        vision_config={**vision, "image_size": image_size, "patch_size": 8},
        projection_dim=64,
        # transformers' own range leaves tokens hardly different from each other
        initializer_factor=4.0,
    )
    return Source(transformers.CLIPModel(config), bytes_of, Loader(image_size, MEAN, STD))


def _transformers(where: str, image_size: int | None) -> Source:
    transformers = _library("transformers", "hf")
    try:
        clip = transformers.CLIPModel.from_pretrained(where)
        words = transformers.AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ArgumentError(NAME, "clip", f"names {where!r}, which transformers cannot load ({error}); allowed: {ALLOWED}") from error
    most = clip.config.text_config.max_position_embeddings

    def tokenizer(sentences: list[str]) -> Tensor:
        found: Tensor = words(sentences, padding="max_length", max_length=most, truncation=True, return_tensors="pt")["input_ids"]
        return found

    return Source(clip, tokenizer, Loader(image_size or clip.config.vision_config.image_size, MEAN, STD))


def _open_clip(rest: str, image_size: int | None) -> Source:
    library = _library("open_clip", "open_clip_torch")
    name, _, pretrained = rest.partition(":")
    try:
        clip = library.create_model(name, pretrained=pretrained or None, force_image_size=image_size)
        words = library.get_tokenizer(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArgumentError(NAME, "clip", f"names {rest!r}, which open_clip cannot load ({error}); allowed: {ALLOWED}") from error
    side: Any = clip.visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    mean, std = (getattr(clip.visual, which, None) or given for which, given in (("image_mean", MEAN), ("image_std", STD)))
    return Source(clip, words, Loader(side, tuple(mean), tuple(std)))


def _library(name: str, extra: str) -> Any:
    try:
        if name == "transformers":
            import transformers

            return transformers
        import open_clip

        return open_clip
    except ModuleNotFoundError:
        how = f"pip install 'triton-attn[{extra}]'" if name == "transformers" else f"pip install {extra}"
        raise ModuleNotFoundError(f"this CLIP comes with {name}: {how}") from None
