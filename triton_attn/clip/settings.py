"""What a run depends on, from a file and from flags."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton_attn import ArgumentError, arguments
from triton_attn.clip.folders import LAYOUTS, SPLITS

NAME = "train-clip-adapter"
LARGEST = 2**16
STAGES = ("both", "text", "image")


@dataclass(frozen=True)
class Settings:
    """Two runs of equal settings on one machine are equal, whether they were interrupted or not.

    What has the default None follows the CLIP: levels are quarters of its vision blocks, 6, 12, 18 and 24 of a ViT-L; adapters stand
    in the first quarter of a tower's blocks, 6 and 3 of a ViT-L; `split` is test for mvtec and all for visa.
    """

    data: str = ""
    layout: str = "mvtec"
    split: str | None = None
    classes: tuple[str, ...] = ()
    called: dict[str, str] = field(default_factory=dict)  # what classes are called in sentences
    test_data: str | None = None
    clip: str = "tiny"
    image_size: int | None = None
    device: str | None = None
    workers: int = 0
    stages: str = "both"
    text_epochs: int = 5
    text_batch: int = 16
    text_lr: float = 1e-5
    text_norm_weight: float = 0.1
    level_reduce: str = "sum"
    context_dropout: float = 0.1
    image_epochs: int = 20
    image_batch: int = 2
    image_lr: float = 5e-4
    cross_attention: bool = True
    image_cross_attention: bool = False
    context_reduce: str | None = None
    normalize_context: bool = True
    text_adapt_weight: float = 0.1
    image_adapt_weight: float = 0.1
    text_adapt_until: int | None = None
    image_adapt_until: int | None = None
    levels: tuple[int, ...] | None = None
    relu: bool = True
    cross_attn_heads: int = 8
    cross_attn_dropout: float = 0.1
    cross_attn_weight: float = 0.1
    seed: int = 0

    name = NAME

    def __post_init__(self) -> None:
        arguments.choice(self, "layout", self.layout, tuple(LAYOUTS))
        arguments.choice(self, "stages", self.stages, STAGES)
        arguments.choice(self, "level_reduce", self.level_reduce, ("sum", "last"))
        if self.split is not None:
            arguments.choice(self, "split", self.split, SPLITS)
        if not self.data:
            raise ArgumentError(NAME, "data", "is not given; allowed: a folder of classes")
        for argument, least in (("text_epochs", 0), ("image_epochs", 0), ("text_batch", 1), ("image_batch", 1), ("workers", 0)):
            arguments.whole(self, argument, getattr(self, argument), least)
        for argument in ("text_lr", "image_lr", "text_norm_weight"):
            if arguments.finite(self, argument, getattr(self, argument)) < 0:
                raise ArgumentError(NAME, argument, f"is {getattr(self, argument)}; allowed: 0 and more")
        arguments.probability(self, "context_dropout", self.context_dropout)
        arguments.whole(self, "seed", self.seed, 0, 2**32 - 1)


FIELDS = {row.name: row for row in dataclasses.fields(Settings)}


def read(path: Path | None, flags: Mapping[str, Any]) -> Settings:
    """A YAML file's settings, and over them the flags that are not None.

    Raises:
        ArgumentError: a key is unknown or a value of the wrong kind; the message names it and the file.
        OSError: the file cannot be read.
        ModuleNotFoundError: a file is given and PyYAML is not installed.
    """
    given = {} if path is None else _mapping(path)
    hints = typing.get_type_hints(Settings)
    for key, value in given.items():
        if key not in FIELDS:
            raise ArgumentError(NAME, "config", f"{path} has the key {str(key)[:80]!r}; allowed: {', '.join(FIELDS)}")
        given[key] = _kind(path, key, value, hints[key])
    return Settings(**{**given, **{key: value for key, value in flags.items() if value is not None}})


def _mapping(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError("configuration files need PyYAML: pip install 'triton-attn[yaml]'") from None
    with path.open("rb") as opened:
        content = opened.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ArgumentError(NAME, "config", f"{path} has more than {LARGEST} bytes; allowed: {LARGEST}")
    try:
        found = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ArgumentError(NAME, "config", f"{path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise ArgumentError(NAME, "config", f"{path} holds a {type(found).__name__}; allowed: a mapping of settings")
    return found


def _kind(path: Path | None, key: str, value: Any, hint: Any) -> Any:
    """The value, if it is of a kind that the setting has; lists as tuples, whole numbers as numbers."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if origin is tuple and isinstance(value, list):
            of = typing.get_args(kind)[0]
            if all(type(part) is of for part in value):
                return tuple(value)
        elif origin is dict and isinstance(value, dict):
            if all(isinstance(part, str) for pair in value.items() for part in pair):
                return value
        elif type(value) is origin or (value is None and origin is types.NoneType):
            return value
        elif origin is float and type(value) is int:
            return float(value)
        elif origin is float and isinstance(value, str) and _is_number(value):
            return float(value)  # YAML reads 1e-5 as a string
    allowed = " or ".join(getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind) for kind in kinds)
    raise ArgumentError(NAME, "config", f"{path} has {key}: {str(value)[:80]!r}; allowed: {allowed}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
