"""The operators' FLOP formulas, handed to torch's counter once somebody imports it: the counter imports triton, half of our own import.

A module of the standard import system stands in front of the others until then.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
_FORMULAS: list[tuple[Any, Callable[..., int]]] = []


def register(operator: Any, formula: Callable[..., int]) -> None:
    """Give torch's FLOP counter the formula of an operator, now or when the counter is imported."""
    _FORMULAS.append((operator, formula))
    counter = sys.modules.get(COUNTER)
    if counter is not None:
        _hand_over(counter)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _hand_over(counter: ModuleType) -> None:
    while _FORMULAS:
        operator, formula = _FORMULAS.pop(0)
        counter.register_flop_formula(operator)(formula)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _hand_over(module)
