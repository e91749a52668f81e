"""What a mechanism cannot give, it refuses by name: the one policy of all functions and modules."""

from __future__ import annotations

from typing import NoReturn

from triton_attn import dispatch
from triton_attn.arguments import ArgumentError
from triton_attn.dispatch import Unsupported

POLICIES = ("raise", "reference", "none")


def policy(mechanism: str, on_unsupported: str) -> str:
    """The checked knob: "raise" refuses, "reference" computes the thing by its definition at its cost, "none" leaves it out."""
    if on_unsupported not in POLICIES:
        raise ArgumentError(mechanism, "on_unsupported", f"is {on_unsupported!r}; allowed: {', '.join(map(repr, POLICIES))}")
    return on_unsupported


def refuse(mechanism: str, asked: str, instead: str) -> NoReturn:
    """Raise Unsupported with who refuses, what was asked for, and who can give it."""
    raise Unsupported(f"{mechanism} cannot give {asked}; {instead}")


def settle(mechanism: str, asked: str, instead: str, on_unsupported: str) -> bool:
    """What the knob says about a thing that the fast call cannot give: True, the definition gives it; False, nobody does."""
    if on_unsupported == "raise":
        refuse(mechanism, asked, instead)
    if on_unsupported == "reference" and dispatch.explaining():
        reasons = {"a kernel": (f"none can give {asked}; {instead}",)}
        raise dispatch._Explained(dispatch.Explanation(mechanism, "reference", reasons=reasons))
    return on_unsupported == "reference"
