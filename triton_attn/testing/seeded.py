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
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from triton_attn.testing.interpreter import strict_interpreter

Path = tuple[tuple[str, int | None], ...]  # fields and positions from a function's node down to the one to exchange
BOUNDARIES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
}
# what the language says to a fault that no compiler would take: it proves nothing
STILLBORN = (TypeError, AttributeError, NameError)
MISTAKEN = {"max": "min", "min": "max", "sum": "max", "exp2": "exp", "exp": "exp2", "log2": "log", "log": "log2"}


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
                inside[code] = (
                    f"{frame.f_globals.get('__name__')}.{code.co_name}" in record.functions and "/triton/" not in code.co_filename
                )
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
            for choice, (kind, exchanged) in enumerate(_exchanges(node, tree)):
                after = "nothing" if isinstance(exchanged, ast.Pass) else _shown(exchanged)
                found.append(Fault(name, kind, first + node.lineno - 1, _shown(node), after, path, choice, spans))
    return found


@contextmanager
def planted(fault: Fault, functions: Mapping[str, Any]) -> Iterator[None]:
    """Run the faulty function in place of the right one."""
    from triton.runtime.interpreter import InterpretedFunction

    function = functions[fault.function]
    tree, _ = _parsed(function)
    node: Any = tree
    for field, position in fault.path:
        node = getattr(node, field) if position is None else getattr(node, field)[position]
    _, exchanged = list(_exchanges(node, tree))[fault.choice]
    faulty = _replaced(tree, fault.path, exchanged)
    rewriter = function.rewriter
    function.rewrite()  # learns the file and the first line
    module = rewriter.ast_transformer.visit(ast.Module([faulty], []))
    ast.increment_lineno(ast.fix_missing_locations(module), rewriter.def_file_lineno - 1)
    right = InterpretedFunction.rewritten_fn[function.fn]
    InterpretedFunction.rewritten_fn[function.fn] = rewriter._compile_and_exec(module)
    try:
        yield
    finally:
        InterpretedFunction.rewritten_fn[function.fn] = right


def bite(
    check: Callable[[], object] | Sequence[Callable[[], object]],
    *,
    equivalent: Mapping[str, str] | None = None,
    some: int | None = None,
    seed: int = 0,
    tick: Callable[[Fault, int, int], None] = lambda fault, done, total: None,
) -> Iterator[Bite]:
    """Plant every fault, or `some` of them picked by `seed`, in what `check` runs, and see whether `check` raises.

    Several checks are tried, the quickest first, those left out that do not run the line of the fault. `equivalent` gives for the `key` of
    a fault why it changes nothing that a call can show; it is planted all the same, and counts as caught if it is. A fault that only
    the language objects to, with a TypeError for instance, would not have compiled: it is left out.
    """
    checks = [check] if callable(check) else list(check)
    running = ran(*checks)
    every = faults(running)
    if some is not None:
        random.Random(seed).shuffle(every)
    planted_so_far, total = 0, len(every) if some is None else min(some, len(every))
    for fault in every:
        if planted_so_far == total:
            return
        tick(fault, planted_so_far, total)
        start, caught = time.perf_counter(), _caught(fault, running, checks)
        if caught is not None:
            planted_so_far += 1
            yield Bite(fault, caught, "" if caught else (equivalent or {}).get(fault.key, ""), time.perf_counter() - start)


def _caught(fault: Fault, running: Ran, checks: Sequence[Callable[[], object]]) -> str | None:
    """What the first check said that noticed; "" where none did, None where the fault would not compile."""
    stillborn = False
    concerned = [i for i, lines in enumerate(running.by_check) if lines & fault.lines]
    for i in sorted(concerned, key=running.seconds.__getitem__):
        try:
            # strict, lest a fault writes where it should not
            with planted(fault, running.functions), strict_interpreter():
                checks[i]()
        except STILLBORN:
            stillborn = True
        except Exception as error:  # noqa: BLE001  any other exception is a catch
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None if stillborn else ""


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


def _exchanges(node: Any, tree: ast.FunctionDef) -> Iterator[tuple[str, Any]]:
    """(kind, what stands in the node's place)."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in BOUNDARIES:
        yield "wrong boundary", _with(node, ops=[BOUNDARIES[type(node.ops[0])]()])
    elif isinstance(node, ast.BinOp):
        if type(node.op) in ARITHMETIC:
            yield "wrong arithmetic", _with(node, op=ARITHMETIC[type(node.op)]())
        elif isinstance(node.op, ast.Mult):
            yield "forgotten factor", node.left
        elif isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            yield "forgotten mask", node.left
            yield "forgotten mask", node.right
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield "wrong sign", node.operand
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
        other = node.slice.value - 1 if node.slice.value else 1
        yield "wrong stride", _with(node, slice=ast.Constant(other))
    elif isinstance(node, ast.If):
        yield "inverted flag", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Call):
        yield from _exchanged_calls(node)
    elif (
        isinstance(node, ast.AugAssign)
        or (isinstance(node, ast.Assign) and _assigned_before(node, tree))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    ):
        yield "forgotten statement", ast.Pass()


def _exchanged_calls(node: ast.Call) -> Iterator[tuple[str, Any]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    named = {keyword.arg: keyword for keyword in node.keywords}
    if name in ("load", "store") and "mask" in named:
        yield "forgotten mask", _with(node, keywords=[keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")])
    if name == "load" and "other" in named:
        other = ast.Constant(0) if ast.unparse(named["other"].value) not in ("0", "0.0") else ast.Constant(1)
        yield "wrong filler", _with(node, keywords=[named["mask"], ast.keyword("other", other)])
    if name == "where" and len(node.args) == 3:
        yield "swapped branches", _with(node, args=[node.args[0], node.args[2], node.args[1]])
        yield "forgotten where", node.args[1]
    if name in ("maximum", "minimum") and len(node.args) == 2:
        yield f"dropped {name}", node.args[0]
        yield f"dropped {name}", node.args[1]
    if name in MISTAKEN and isinstance(node.func, ast.Attribute):
        yield "wrong function", _with(node, func=_with(node.func, attr=MISTAKEN[name]))
    if name == "to" and isinstance(node.func, ast.Attribute) and len(node.args) == 1:
        yield "wrong dtype", node.func.value
    if name == "float" and node.args:
        yield "wrong filler", ast.Constant(0.0)
    if name in ("range", "static_range") and len(node.args) == 3:
        first, end, step = node.args
        yield "swapped bounds", _with(node, args=[step, end, step])
        yield "swapped bounds", _with(node, args=[first, ast.BinOp(end, ast.Sub(), step), step])
    if name == "dot" and len(node.args) == 3:
        yield "forgotten accumulator", _with(node, args=node.args[:2])
    if name == "full" and len(node.args) > 1:
        yield "wrong start", _with(node, args=[node.args[0], ast.Constant(0.0), *node.args[2:]])


def _assigned_before(node: ast.Assign, tree: ast.FunctionDef) -> bool:
    """Whether leaving it out leaves a name that exists."""
    names = {x.id for target in node.targets for x in ast.walk(target) if isinstance(x, ast.Name)}
    known = {argument.arg for argument in tree.args.args}
    for other in ast.walk(tree):
        if isinstance(other, ast.Assign) and (other.lineno, other.col_offset) < (node.lineno, node.col_offset):
            known |= {x.id for target in other.targets for x in ast.walk(target) if isinstance(x, ast.Name)}
    return names <= known


def _with(node: Any, **fields: Any) -> Any:
    """A copy of a node with some fields exchanged."""
    return ast.copy_location(type(node)(**{**dict(ast.iter_fields(node)), **fields}), node)
