"""What may stand in a node's place: the faults that kernels really have, as exchanges in a syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

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
# where the mask of an access stands by position
MASKED = {"load": 1, "atomic_load": 1, "store": 2, "atomic_store": 2}
MASKED |= {f"atomic_{name}": 2 for name in ("add", "and", "max", "min", "or", "xchg", "xor")}
MISTAKEN = {"max": "min", "min": "max", "sum": "max", "exp2": "exp", "exp": "exp2", "log2": "log", "log": "log2"}


def exchanges(node: Any, tree: ast.FunctionDef) -> Iterator[tuple[str, Any]]:
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
    if name in MASKED:
        yield from _exchanged_accesses(node, name, named)
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
    if name in ("range", "static_range") and len(node.args) == 2:
        (first, end), step = node.args, named["step"].value if "step" in named else ast.Constant(1)
        yield "swapped bounds", _with(node, args=[ast.BinOp(first, ast.Add(), step), end])
        yield "swapped bounds", _with(node, args=[first, ast.BinOp(end, ast.Sub(), step)])
    if name == "dot" and len(node.args) == 3:
        yield "forgotten accumulator", _with(node, args=node.args[:2])
    if name == "dot" and "acc" in named:
        yield "forgotten accumulator", _with(node, keywords=_without(node, "acc"))
    if name == "full" and len(node.args) > 1:
        yield "wrong start", _with(node, args=[node.args[0], ast.Constant(0.0), *node.args[2:]])


def _exchanged_accesses(node: ast.Call, name: str, named: Mapping[str | None, ast.keyword]) -> Iterator[tuple[str, Any]]:
    """Of an access that has a mask, by name or by position."""
    place = MASKED[name]
    end = place + (2 if name == "load" else 1)  # what is loaded in its place stands behind the mask
    if "mask" in named or len(node.args) > place:
        gone = [ast.Constant(None)] * (end - place) if len(node.args) > end else []  # what follows keeps its position
        args = [*node.args[:place], *gone, *node.args[end:]]
        yield "forgotten mask", _with(node, args=args, keywords=_without(node, "mask", "other"))
    if name == "load" and "other" in named:
        keywords = [ast.keyword("other", _filler(each.value)) if each.arg == "other" else each for each in node.keywords]
        yield "wrong filler", _with(node, keywords=keywords)
    elif name == "load" and len(node.args) > 2:
        yield "wrong filler", _with(node, args=[*node.args[:2], _filler(node.args[2]), *node.args[3:]])


def _filler(right: ast.expr) -> ast.Constant:
    return ast.Constant(0) if ast.unparse(right) not in ("0", "0.0") else ast.Constant(1)


def _without(node: ast.Call, *names: str) -> list[ast.keyword]:
    return [keyword for keyword in node.keywords if keyword.arg not in names]


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
