"""Seeded faults: plant one small fault after another in a kernel, and count which of them a check catches.

A check that lets a fault pass has a gap, or the fault changes nothing; such equivalents are listed with the argument why. The faults
are those that kernels really have: a boundary off by one, a forgotten mask, the wrong stride, a dropped rescale, swapped branches.
Mutation testing after DeMillo, Lipton and Sayward, "Hints on Test Data Selection", 1978. Works on any `@triton.jit` function that
the interpreter runs.
"""

from __future__ import annotations

import ast
import copy
import inspect
import random
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from triton_attn.testing.exchanges import exchanges
from triton_attn.testing.interpreter import strict_interpreter
from triton_attn.testing.outcomes import Outcome, Outcomes

Path = tuple[tuple[str, int | None], ...]  # fields and positions from a function's node down to the one to exchange
# what the language says to a fault that no compiler would take: it proves nothing
STILLBORN = (TypeError, AttributeError, NameError)
TIMES, AT_LEAST = 20.0, 10.0  # a faulty check may take so many times as long as the right one, and so many seconds


@dataclass(frozen=True)
class Fault:
    """One exchange in one function."""

    function: str  # "module.function"
    kind: str
    line: int
    before: str
    after: str
    path: Path
    choice: int  # which exchange of the node
    lines: frozenset[tuple[str, int]]  # (file, line) of the node

    @property
    def place(self) -> str:
        """Which exchange of which node, wherever the function stands in its file."""
        way = ".".join(field if position is None else f"{field}[{position}]" for field, position in self.path)
        return f"{self.function} {way} {self.choice}"

    @property
    def key(self) -> str:
        """What it does, wherever the line moves."""
        return f"{self.function.rpartition('.')[2]}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Bite:
    """What became of a fault: caught by which exception; or not, and why it changes nothing."""

    fault: Fault
    caught: str
    equivalent: str
    seconds: float

    @property
    def survived(self) -> bool:
        return not self.caught and not self.equivalent


@dataclass(frozen=True)
class Ran:
    """The `@triton.jit` functions that checks run, Triton's own library excepted, and (file, line) of every line that each ran."""

    functions: Mapping[str, Any]
    by_check: tuple[frozenset[tuple[str, int]], ...]
    seconds: tuple[float, ...]  # of each check

    @property
    def lines(self) -> frozenset[tuple[str, int]]:
        return frozenset().union(*self.by_check)


def ran(*checks: Callable[[], object]) -> Ran:
    """Run checks, right as they are, and see what each runs."""
    found, seconds = [], []
    functions: dict[str, Any] = {}
    for check in checks:
        start = time.perf_counter()
        more, lines = _ran(check)
        seconds.append(time.perf_counter() - start)
        functions |= more
        found.append(lines)
    return Ran(functions, tuple(found), tuple(seconds))


def _ran(check: Callable[[], object]) -> tuple[dict[str, Any], frozenset[tuple[str, int]]]:
    lines: set[tuple[str, int]] = set()
    inside: dict[CodeType, bool] = {}

    def follow(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if event == "call":
            if code not in inside:
                known = {(jitted.fn.__module__, jitted.fn.__name__) for jitted in record.functions.values()}
                inside[code] = (frame.f_globals.get("__name__"), code.co_name) in known and "/triton/" not in code.co_filename
            if not inside[code]:
                return None
        lines.add((code.co_filename, frame.f_lineno))
        return follow

    with strict_interpreter() as record:
        before = sys.gettrace()
        sys.settrace(follow)
        try:
            check()
        finally:
            sys.settrace(before)
    return {name: function for name, function in record.functions.items() if not name.startswith("triton.")}, frozenset(lines)


def faults(found_running: Ran) -> list[Fault]:
    """Every fault that can be planted in what ran. A branch that a constexpr leaves out is another variant's."""
    found, lines = [], found_running.lines
    for name, function in found_running.functions.items():
        tree, first = _parsed(function)
        file = function.fn.__code__.co_filename
        for path, node in _nodes(tree):
            spans = frozenset((file, first + line - 1) for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))
            if not spans & lines:
                continue
            for choice, (kind, exchanged) in enumerate(exchanges(node, tree)):
                after = "nothing" if isinstance(exchanged, ast.Pass) else _shown(exchanged)
                found.append(Fault(name, kind, first + node.lineno - 1, _shown(node), after, path, choice, spans))
    return found


@contextmanager
def planted(fault: Fault, functions: Mapping[str, Any]) -> Iterator[None]:
    """Run the faulty function in place of the right one, and of every other that the same `def` makes: a check may make its own."""
    from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction

    function = functions[fault.function]
    tree, _ = _parsed(function)
    node: Any = tree
    for field, position in fault.path:
        node = getattr(node, field) if position is None else getattr(node, field)[position]
    _, exchanged = list(exchanges(node, tree))[fault.choice]
    faulty = _replaced(tree, fault.path, exchanged)
    code, rewritten, transform = function.fn.__code__, InterpretedFunction.rewritten_fn, FunctionRewriter._transform_ast

    def transformed(rewriter: Any, source: str) -> Any:
        if rewriter.fn.__code__ is not code:
            return transform(rewriter, source)
        module = rewriter.ast_transformer.visit(ast.Module([copy.deepcopy(faulty)], []))
        return ast.increment_lineno(ast.fix_missing_locations(module), rewriter.def_file_lineno - 1)

    def taken_out() -> dict[Any, Any]:
        return {fn: rewritten.pop(fn) for fn in [*rewritten] if fn.__code__ is code}

    right = taken_out()
    FunctionRewriter._transform_ast = transformed
    try:
        yield
    finally:
        FunctionRewriter._transform_ast = transform
        taken_out()
        rewritten.update(right)


def bite(
    check: Callable[[], object] | Sequence[Callable[[], object]],
    *,
    equivalent: Mapping[str, str] | None = None,
    some: int | None = None,
    seed: int = 0,
    tick: Callable[[Fault, int, int], None] = lambda fault, done, total: None,
    outcomes: Outcomes | None = None,
) -> Iterator[Bite]:
    """Plant every fault, or `some` of them picked by `seed`, in what `check` runs, and see whether `check` raises.

    Several checks are tried, first the one that caught the fault before on the same line, then the quickest, those left out that do not
    run the line of the fault. `equivalent` gives for the `key` of a fault why it changes nothing that a call can show; it is planted all
    the same, and counts as caught if it is. A fault that only the language objects to, with a TypeError for instance, would not have
    compiled: it is left out. One whose check takes far longer than the right one is caught by that: a forgotten step makes a loop endless.
    `outcomes` knows those of an earlier run, keeps those of this one, and ends it in time.
    """
    checks = [check] if callable(check) else list(check)
    if not checks:
        raise ValueError("there is no check to plant faults for")
    book = outcomes or Outcomes(calls=[str(place) for place in range(len(checks))])
    running = ran(*checks)
    if not running.functions:
        raise ValueError("the checks launched no kernel; a check calls the function that launches it")
    book.begin(running.functions)
    every = faults(running)
    if some is not None:
        random.Random(seed).shuffle(every)
    planted_so_far, total = 0, len(every) if some is None else min(some, len(every))
    last: dict[int, int] = {}  # which check caught the fault before, by line
    for looked_at, fault in enumerate(every):
        if some is not None and planted_so_far == total:
            return
        tick(fault, planted_so_far if some is not None else looked_at, total)
        outcome = _outcome(fault, running, checks, book, last.get(fault.line))
        if outcome is None:
            book.left += 1
            if some is not None and planted_so_far + book.left == total:
                return
            continue
        if outcome.caught and outcome.calls[0] in book.calls:
            last[fault.line] = book.calls.index(outcome.calls[0])
        if not outcome.unmade:
            planted_so_far += 1
            yield Bite(fault, outcome.caught, "" if outcome.caught else (equivalent or {}).get(fault.key, ""), outcome.seconds)


@contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    """TimeoutError where a fault makes a loop endless; only the main thread can be called back, elsewhere it would wait."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _outcome(fault: Fault, running: Ran, checks: Sequence[Callable[[], object]], book: Outcomes, likely: int | None) -> Outcome | None:
    """The fault's end, by every check that runs its line and that it has not met; None where there is no time for that."""
    known = book.known(fault.place)
    if known is not None and known.caught:
        return known
    met, unmade, start = known.calls if known else (), known is not None and known.unmade, time.perf_counter()
    concerned = [i for i, lines in enumerate(running.by_check) if lines & fault.lines and book.calls[i] not in met]
    if known is not None and not concerned:
        return known
    if book.late:
        return None
    outcome = None
    for i in sorted(concerned, key=lambda i: (i != likely, running.seconds[i])):
        try:
            # strict, lest a fault writes where it should not, and before it is planted: strictness has functions rewritten in its way
            with strict_interpreter(), planted(fault, running.functions), _in_time(TIMES * running.seconds[i] + AT_LEAST):
                checks[i]()
        except STILLBORN:
            unmade = True
        except Exception as error:  # noqa: BLE001  any other exception is a catch
            said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            outcome = Outcome(said, (book.calls[i],), time.perf_counter() - start)
            break
    if outcome is None:
        spent = time.perf_counter() - start + (known.seconds if known else 0.0)
        outcome = Outcome("", (*met, *(book.calls[i] for i in concerned)), spent, unmade)
    book.keep(fault.place, outcome, fault.key)
    return outcome


def _parsed(function: Any) -> tuple[ast.FunctionDef, int]:
    """A jit function's node without decorators and docstring, and the line it starts on."""
    lines, first = inspect.getsourcelines(function.fn)
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))
    node = ast.parse(textwrap.dedent("".join(lines[start:]))).body[0]
    assert isinstance(node, ast.FunctionDef)
    if ast.get_docstring(node) is not None and len(node.body) > 1:
        node.body = node.body[1:]
    return node, first + start


def _shown(node: ast.AST) -> str:
    return f"if {ast.unparse(node.test)}" if isinstance(node, ast.If) else ast.unparse(node)


def _nodes(tree: ast.FunctionDef) -> Iterator[tuple[Path, Any]]:
    """Everything in the body that has a place in the source, with the way to it."""

    def below(node: ast.AST, path: Path) -> Iterator[tuple[Path, Any]]:
        if hasattr(node, "lineno"):
            yield path, node
        for field, value in ast.iter_fields(node):
            for position, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    yield from below(child, (*path, (field, position)))

    for position, statement in enumerate(tree.body):
        yield from below(statement, (("body", position),))


def _replaced(tree: ast.FunctionDef, path: Path, exchanged: ast.AST) -> ast.FunctionDef:
    copied = copy.deepcopy(tree)
    owner: Any = copied
    for field, position in path[:-1]:
        owner = getattr(owner, field) if position is None else getattr(owner, field)[position]
    field, position = path[-1]
    if position is None:
        setattr(owner, field, copy.deepcopy(exchanged))
    else:
        getattr(owner, field)[position] = copy.deepcopy(exchanged)
    return copied
