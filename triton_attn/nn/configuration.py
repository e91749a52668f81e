"""Modules from a dictionary or a YAML file: data in, never code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from triton_attn import ArgumentError
from triton_attn.nn.cross_memory_attention import CrossMemoryAttention
from triton_attn.nn.hierarchical_attention_block import TYPES as HIERARCHICAL
from triton_attn.nn.hierarchical_attention_block import HierarchicalAttentionBlock
from triton_attn.nn.local_global_attention import LocalGlobalAttention
from triton_attn.nn.mamba_layer import MambaLayer
from triton_attn.nn.multihead_attention import MultiheadAttention
from triton_attn.nn.performer_attention import TYPES as LINEAR
from triton_attn.nn.performer_attention import LinearAttentionBlock, PerformerAttention
from triton_attn.nn.strided_attention import StridedAttention

NAME = "build"
LARGEST = 2**16
MODULES: dict[str, type[nn.Module]] = {
    module.__name__: module
    for module in (
        StridedAttention,
        LocalGlobalAttention,
        CrossMemoryAttention,
        HierarchicalAttentionBlock,
        MultiheadAttention,
        PerformerAttention,
        MambaLayer,
        LinearAttentionBlock,
    )
}
# blocks, which say themselves what each of their types takes
BLOCKS: dict[type[nn.Module], Mapping[str, tuple[Any, tuple[str, ...]]]] = {
    HierarchicalAttentionBlock: HIERARCHICAL,
    LinearAttentionBlock: LINEAR,
}
PLAIN = (str, int, float, type(None))  # a bool is an int


def build(config: Mapping[str, Any] | str | PathLike[str], *, device: Any = None, dtype: Any = None) -> nn.Module:
    """The module, or several by name, that a configuration describes.

    Args:
        config: a mapping, or the path of a YAML file that holds one, of at most 65536 bytes. With "type", the name of a class of
            triton_attn.nn, the other keys are arguments of its constructor: numbers, strings, true, false, null. Without "type",
            each key names a module and its value is such a mapping.
        device, dtype: of the parameters.

    Returns:
        The module, or an nn.ModuleDict of them.

    Raises:
        ArgumentError: the configuration is wrong; the message names the key and what is allowed.
        OSError: the file cannot be read.
        ImportError: a file is given and PyYAML is not installed.
    """
    content = config if isinstance(config, Mapping) else _read(config)
    place = {"device": device, "dtype": dtype}
    if "type" in content or not content:
        return _module("config", content, place)
    modules = nn.ModuleDict()
    for name, part in content.items():
        if not isinstance(name, str) or not isinstance(part, Mapping):
            allowed = "'type' and a constructor's arguments, or names and a mapping for each"
            raise ArgumentError(NAME, "config", f"has the key {str(name)[:80]!r} and no 'type'; allowed: {allowed}")
        if not name or "." in name or hasattr(modules, name):
            complaint = f"has a module named {name[:80]!r}; allowed: no dot, not empty, and no attribute of nn.ModuleDict"
            raise ArgumentError(NAME, "config", complaint)
        modules[name] = _module(name, part, place)
    return modules


def _module(where: str, part: Mapping[str, Any], place: dict[str, Any]) -> nn.Module:
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in MODULES:
        found = f"has type {kind[:80]!r}" if isinstance(kind, str) else "has no type"
        raise ArgumentError(NAME, where, f"{found}; allowed: {', '.join(MODULES)}")
    module = MODULES[kind]
    parameters = inspect.signature(module).parameters.values()
    allowed = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in place]
    allowed += dict.fromkeys(option for _, options in BLOCKS.get(module, {}).values() for option in options)
    unknown = [str(key)[:80] for key in part if key not in ("type", *allowed)]
    if unknown:
        raise ArgumentError(NAME, where, f"has unknown keys {', '.join(unknown)}; allowed: type, {', '.join(allowed)}")
    given = {key: value for key, value in part.items() if key != "type"}
    for key, value in given.items():
        if not isinstance(value, PLAIN):
            complaint = f"has a {type(value).__name__} for {key}; allowed: a number, a string, true, false, null"
            raise ArgumentError(NAME, where, complaint)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in given]
    if needed:
        raise ArgumentError(NAME, where, f"lacks {', '.join(needed)}, which {kind} needs")
    return module(**given, **place)


def _read(path: str | PathLike[str]) -> Mapping[str, Any]:
    if not isinstance(path, (str, PathLike)):
        raise ArgumentError(NAME, "config", f"is a {type(path).__name__}; allowed: a mapping, or the path of a YAML file")
    try:
        import yaml
    except ImportError as missing:
        raise ImportError(
            "triton_attn.nn.build reads files with PyYAML: pip install 'triton-attn[yaml]', or pass a dictionary"
        ) from missing
    with Path(path).open("rb") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ArgumentError(NAME, "config", f"is a file of more than {LARGEST} bytes; allowed: up to that many")
    try:
        content = yaml.safe_load(text)
    # what PyYAML makes of a number, a flag or a date that is none, it does not catch
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, ArithmeticError) as broken:
        raise ArgumentError(NAME, "config", f"is no YAML that can be read: {' '.join(str(broken).split())[:200]}") from broken
    if not isinstance(content, Mapping):
        raise ArgumentError(NAME, "config", f"is a file that holds a {type(content).__name__}; allowed: a mapping")
    return content
