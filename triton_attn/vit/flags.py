"""The flags of Settings, which are written once: a command takes all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer

from triton_attn.vit.settings import Settings


def with_settings(*without: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Gives a command that takes **given a flag for each field of Settings but for those named."""

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(
                entry.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    type(entry.default) | None,
                    typer.Option(help=f"{entry.metadata['help']} By default {entry.default}, or the dataset's.", show_default=False),
                ],
            )
            for entry in fields(Settings)
            if entry.name not in without
        ]

        # typer reads both; what it calls is the command itself
        def called(**given: Any) -> int:
            return command(**given)

        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return called

    return decorate
