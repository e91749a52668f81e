"""What a replacement inside of a model did, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType


@dataclass
class Replacement:
    """The report of a change to a model. `str` of it is a paragraph for people; as a context manager it undoes at the end.

    `replaced`: place in the model -> what stands there now. `skipped`: place -> why it was left. `copied`, `initialised`: names of
    parameters that were taken over, and that are new and untrained. `changes_function`: whether outputs are others than before.
    """

    replaced: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    copied: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()
    changes_function: bool = False
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the model back as it was; a second call changes nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{place} is now {what}" for place, what in self.replaced.items()]
        lines += [f"{place} was left: {why}" for place, why in self.skipped.items()]
        if self.copied or self.initialised:
            lines.append(f"{len(self.copied)} parameters copied, {len(self.initialised)} new")
        if self.changes_function:
            lines.append("the model computes another function now; it needs training")
        return "\n".join(lines)
