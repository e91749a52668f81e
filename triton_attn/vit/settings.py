"""What a run depends on: defaults, a dataset's recipe, a YAML file, flags; the later ones win."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from triton_attn import ArgumentError, arguments
from triton_attn.arguments import ArgumentTypeError
from triton_attn.models import VisionTransformer
from triton_attn.models.vision_transformer import TYPES
from triton_attn.vit.augmentation import AUGMENTATIONS
from triton_attn.vit.images import DATASETS, Images

PRECISIONS = ("float32", "bfloat16")
COMPILERS = ("none", "inductor", "aot_eager")
SWEPT = ("ripple_stages", "hydra_branches", "patch_size", "dim", "depth", "heads", "dim_head", "mlp_dim")
LARGEST = 2**16  # bytes of a configuration file
# the original's sizes for images that are larger than digits
_ORIGINAL: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 128,
    "lr": 1e-3,
    "dim": 384,
    "depth": 12,
    "heads": 6,
    "dim_head": 64,
    "mlp_dim": 1536,
    "dropout": 0.1,
    "ripple_stages": 3,
}
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar100": {**_ORIGINAL, "augment": "crop_flip"},
    "tiny_imagenet": {**_ORIGINAL, "patch_size": 8, "augment": "crop_flip"},
}
# of mechanisms that need some, where nobody gives any
_OPTIONS: dict[str, dict[str, Any]] = {
    "strided_attention": {"stride": 2, "include_self": True},
    "local_global_attention": {"window": 4, "global_tokens": 1},
    "sparse_attention": {"keep_ratio": 0.5},
}


def _said(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What a run depends on; two runs of equal settings on one machine are equal.

    Raises:
        ArgumentError: a value is wrong; the message names it and what is allowed.
    """

    attention_type: str = _said("ripple", "ripple, hydra, baseline, or a mechanism.")
    dataset: str = _said("digits", f"{', '.join(DATASETS)}.")
    epochs: int = _said(40, "How often every image is seen.")
    batch_size: int = _said(32, "Images of a step, of all processes together.")
    lr: float = _said(2e-3, "The highest learning rate.")
    weight_decay: float = _said(0.05, "Of AdamW.")
    warm_up: float = _said(0.1, "Share of the steps in which the learning rate rises.")
    clip: float = _said(1.0, "Largest norm of a gradient.")
    smoothing: float = _said(0.1, "Of the labels.")
    augment: str = _said("shift", f"{', '.join(AUGMENTATIONS)}; randaugment needs torchvision.")
    patch_size: int = _said(4, "Divides the side of an image.")
    dim: int = _said(64, "Width of tokens.")
    depth: int = _said(4, "Number of blocks.")
    heads: int = _said(4, "Heads of the attention.")
    dim_head: int = _said(16, "Width of a head.")
    mlp_dim: int = _said(128, "Width inside of the MLP.")
    dropout: float = _said(0.0, "Of attention, MLP and embedding.")
    ripple_stages: int = _said(1, "Pooling stages of ripple.")
    ripple_variant: str = _said("spatial", "spatial, or v1: the original's arithmetic.")
    hydra_branches: int = _said(4, "Branches of hydra.")
    precision: str = _said("float32", "float32, or bfloat16 under autocast.")
    compiler: str = _said("none", "Backend of torch.compile: none, inductor, aot_eager.")
    seed: int = _said(0, "Of parameters, order, augmentation and dropout.")

    name = "vit"

    def __post_init__(self) -> None:
        for entry in fields(self):
            given = getattr(self, entry.name)
            if not isinstance(entry.default, str):
                if isinstance(entry.default, int):
                    arguments.whole(self, entry.name, given, 0 if entry.name in ("seed", "ripple_stages") else 1)
                elif arguments.finite(self, entry.name, given) < 0:
                    raise ArgumentError(self.name, entry.name, f"is {given}; allowed: 0 and more")
        for argument, allowed in (
            ("attention_type", TYPES),
            ("dataset", tuple(DATASETS)),
            ("augment", AUGMENTATIONS),
            ("precision", PRECISIONS),
            ("compiler", COMPILERS),
            ("ripple_variant", ("spatial", "v1")),
        ):
            arguments.choice(self, argument, getattr(self, argument), allowed)
        for argument in ("warm_up", "smoothing", "dropout"):
            if not getattr(self, argument) < 1:
                raise ArgumentError(self.name, argument, f"is {getattr(self, argument)}; allowed: 0 to below 1")
        if not self.clip > 0:
            raise ArgumentError(self.name, "clip", f"is {self.clip}; allowed: above 0")


def settings(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Of flags that are not None, over a file, over the recipe of the dataset.

    Raises:
        ArgumentError: a key is unknown or a value wrong; the message names it and what is allowed.
        OSError: the file cannot be read.
    """
    flags = {key: value for key, value in flags.items() if value is not None}
    held = read(config) if config else {}
    recipe = RECIPES.get(str(flags.get("dataset", held.get("dataset", "digits"))), {})
    return Settings(**{**recipe, **held, **flags})


def read(path: Path) -> dict[str, Any]:
    """A YAML file of settings: data, never code.

    Raises:
        ArgumentError: it is no mapping of settings; the message names the file and the key.
        OSError: the file cannot be read.
        ModuleNotFoundError: PyYAML is not installed; the message says how to.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a configuration file is read by PyYAML: pip install 'triton-attn[yaml]'") from None
    with path.open("rb") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ArgumentError("vit", "config", f"{path} has more than {LARGEST} bytes; allowed: up to that many")
    try:
        held = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as broken:
        raise ArgumentError("vit", "config", f"{path} is no YAML: {' '.join(str(broken).split())[:200]}") from broken
    if not isinstance(held, dict):
        raise ArgumentTypeError("vit", "config", f"{path} holds a {type(held).__name__}; allowed: a mapping of settings")
    kinds = {entry.name: type(entry.default) for entry in fields(Settings)}
    for key, value in held.items():
        if key not in kinds:
            raise ArgumentError("vit", "config", f"{path} has {str(key)[:80]!r}; allowed: {', '.join(kinds)}")
        if kinds[key] is float:
            held[key] = _number(path, key, value)
    return held


def _number(path: Path, key: str, value: Any) -> float:
    # YAML 1.1 reads 1e-3 as a string
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ArgumentTypeError("vit", key, f"is {str(value)[:80]!r} in {path}; allowed: a number") from None


def build(given: Settings, images: Images) -> VisionTransformer:
    """The model of these settings, for these images."""
    return model(given, images.side, images.classes, images.channels)


def model(given: Settings, side: int, classes: int, channels: int) -> VisionTransformer:
    """The model of these settings for images of `side` x `side` pixels.

    Raises:
        ArgumentError: the sizes do not fit; the message names the argument and what is allowed.
    """
    options = dict(_OPTIONS.get(given.attention_type, {}))
    if given.attention_type == "ripple" and given.ripple_variant == "v1":
        options = {"variant": "v1"}
    if given.attention_type == "dilated_attention":
        tokens = (side // given.patch_size) ** 2 + 1
        options = {"segment_lengths": (max(1, tokens // 2), tokens), "dilation_rates": (1, 2)}
    return VisionTransformer(
        side,
        given.patch_size,
        classes,
        given.dim,
        given.depth,
        given.heads,
        given.mlp_dim,
        given.attention_type,
        given.dropout,
        given.dropout,
        given.dim_head,
        given.ripple_stages,
        given.hydra_branches,
        attention_options=options,
        channels=channels,
    )
