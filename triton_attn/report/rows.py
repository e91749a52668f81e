"""Result rows as JSON lines, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, TypeAlias, TypeVar

from triton_attn.bench import Timing
from triton_attn.offline import Compiled
from triton_attn.report.calls import Call
from triton_attn.teeth import Tooth
from triton_attn.tiles import Usage
from triton_attn.verify import Verdict

Row: TypeAlias = Verdict | Compiled | Timing | Call | Tooth
AnyRow = TypeVar("AnyRow", Verdict, Compiled, Timing, Call, Tooth)
_MAY_BE_ABSENT = ("usage", "limit")
PARTS: dict[str, type[Any]] = {"verify": Verdict, "compile": Compiled, "bench": Timing, "explain": Call}  # by command


def to_json(row: Row) -> str:
    """One line."""
    return json.dumps(to_record(row), allow_nan=False)


def to_record(row: Row) -> Any:
    """What JSON can hold. It has no infinity: a number that is not finite becomes null."""
    return _finite(asdict(row))


def from_json(kind: type[AnyRow], line: str) -> AnyRow:
    """The inverse; ValueError on anything else."""
    return from_record(kind, json.loads(line))


def from_record(kind: type[AnyRow], record: Any) -> AnyRow:
    """The same of what JSON gave."""
    try:
        if record.get("usage") is not None:
            record = {**record, "usage": Usage(**record["usage"])}
        infinite = {name: math.inf for name, value in record.items() if value is None and name not in _MAY_BE_ABSENT}
        return kind(**{**record, **infinite})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a row of {kind.__name__}: {error}") from error


def collect(rows: Iterable[AnyRow], as_json: bool, done: Callable[[list[AnyRow]], object] = lambda found: None) -> list[AnyRow]:
    """Take rows as they come; with `as_json` print each on stdout."""
    found: list[AnyRow] = []
    for row in rows:
        found.append(row)
        done(found)
        if as_json:
            print(to_json(row), flush=True)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
