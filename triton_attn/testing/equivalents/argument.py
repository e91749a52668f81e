"""One argument."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """Why these faults change nothing; `rows`: in which mechanisms, none being all."""

    reason: str
    faults: tuple[str, ...]
    rows: tuple[str, ...] = ()
