"""The house is kept: who may import whom, and what no file may hold."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "triton_attn"
MOST_LINES, MOST_LINES_OF_CASES = 350, 450  # tests are tables of cases

RESTRICTED = "triton_attn/vit/pickled_arrays.py"
BELOW = "mechanism device arguments tiles dispatch operators"
WORKERS = (
    "verify bench offline teeth tuning.tune tuning.ledger tuning.without_gpu tuning.roofline tuning.ranking tuning.autotune tuning.__init__"
)

# room: what it may import of ours, and of others beside the standard library; the first row that fits counts
MAY_IMPORT: dict[str, tuple[str, str]] = {
    "mechanism": ("", ""),
    "device": ("", "torch triton platformdirs"),
    "arguments": ("mechanism", "torch"),
    "tile_keys": ("", ""),
    "tiles": ("device tile_keys", ""),
    "dispatch": ("mechanism device arguments tiles", "torch"),
    "flops": ("", "torch"),
    "operators": ("mechanism device arguments tiles dispatch flops", "torch"),
    "refusals": ("arguments dispatch", ""),
    "reference.*": ("reference._*", "torch einops"),
    "portable.*": ("portable._* reference._*", "torch einops"),
    "kernels.*": ("kernels._* tiles device reference._dropout", "torch triton"),
    "functional.__init__": ("functional.*", ""),
    "functional.scaled_dot_product_attention": (f"{BELOW} functional.attention", "torch"),
    "functional.hydra_*": (f"{BELOW} functional._* functional.*_attention reference.* portable.* kernels.*", "torch"),
    "functional.performer_*": (f"{BELOW} functional._* functional.linear_attention reference.* portable.* kernels.*", "torch"),
    "functional.ripple_*": (f"{BELOW} functional._* functional.linear_attention functional.pool_tokens", "torch"),
    "functional.sparse_attention": (f"{BELOW} functional._* functional.*_attention functional.attention", "torch"),
    "functional.*_update": (f"{BELOW} functional.causal_conv1d functional.selective_scan", "torch"),
    "functional.*": (f"{BELOW} functional._* reference.* portable.* kernels.*", "torch"),
    "catalog": ("mechanism operators functional.*", ""),
    "testing.*": ("mechanism device tiles testing.*", "torch triton numpy hypothesis pytest"),
    WORKERS: (f"{BELOW} catalog testing.* {WORKERS}", "torch triton"),
    "report.command": (f"{BELOW} catalog {WORKERS} report.* command_line __init__", "torch typer"),
    "report.*": (f"{BELOW} catalog testing.* {WORKERS} report.*", "torch rich jinja2 markupsafe matplotlib markdown_it"),
    "command_line": ("mechanism device report.* __init__", "torch typer"),
    "tuning.command": (f"{BELOW} catalog {WORKERS} report.* command_line", "torch typer"),
    "capacity.command": (f"{BELOW} __init__ arguments capacity.* report.* command_line", "typer"),
    "capacity.*": (f"{BELOW} __init__ arguments catalog models.* nn.* capacity.*", "torch triton torchao matplotlib"),
    "cli": (
        f"{BELOW} catalog testing.* {WORKERS} report.* report.command tuning.command capacity.command "
        "vit.commands clip.commands integrations.block_command command_line __init__",
        "torch typer rich platformdirs",
    ),
    "__main__": ("cli", ""),
    "__init__": ("arguments catalog dispatch tiles functional.* tuning.autotune integrations.patching", ""),
    "nn.configuration": ("__init__ nn.*", "torch yaml"),
    "nn.*": ("__init__ arguments dispatch refusals nn.*", "torch"),
    "models.*": ("__init__ arguments nn.* models.*", "torch"),
    "vit.*": ("__init__ arguments models.* vit.*", "torch torchvision typer rich sklearn numpy PIL yaml matplotlib"),
    "clip.*": ("__init__ arguments models.* clip.*", "torch typer rich yaml numpy PIL matplotlib sklearn transformers open_clip"),
    "integrations.block_command": ("__init__ command_line report.* integrations.block_benchmark", "typer"),
    "integrations.*": ("__init__ arguments refusals nn.* integrations.*", "torch transformers open_clip timm"),
}

# imported inside strict_interpreter() alone, when triton is there
INTERPRETER = tuple(
    f"triton_attn.testing.interpreter.{name}" for name in ("builder", "handles", "language", "libdevice", "programs", "reductions")
)


def fits(name: str, patterns: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns.split())


def module_of(path: str) -> str:
    """kernels/attention.py -> kernels.attention; triton_attn/report/__init__.py -> report.__init__"""
    return path.removeprefix("triton_attn/").removesuffix(".py").replace("/", ".")


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names: modules where they are ours, packages where they are not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = ROOT.joinpath(*base.split("."), alias.name)
                yield f"{base}.{alias.name}" if inner.is_dir() or inner.with_suffix(".py").is_file() else base


def ours(name: str) -> str:
    """triton_attn.report -> report.__init__"""
    path = ROOT.joinpath(*name.split("."))
    return f"{name}.__init__".removeprefix("triton_attn.") if path.is_dir() else name.removeprefix("triton_attn.")


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the file is imported: no bodies of functions, nothing for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


# a rule: (path, tree) -> complaints


def imports_go_one_way(path: str, tree: ast.AST) -> Iterator[str]:
    known = next((MAY_IMPORT[rooms] for rooms in MAY_IMPORT if fits(module_of(path), rooms)), None)
    if known is None:
        yield "a room that the table of import directions does not know"
        return
    of_ours, of_others = known
    for name in imported(tree):
        if name.split(".")[0] == "triton_attn":
            if not fits(ours(name), of_ours):
                yield f"imports {name}"
        elif name.split(".")[0] not in {*sys.stdlib_module_names, *of_others.split()}:
            yield f"imports {name}"


def triton_waits_for_a_kernel(path: str, tree: ast.AST) -> Iterator[str]:
    if path.startswith("kernels/") or path.removesuffix(".py").replace("/", ".") in INTERPRETER:
        return
    late = ("triton.", "triton_attn.kernels.", *(f"{name}." for name in INTERPRETER))
    for node in at_import(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            wrapped = ast.Module([node], [])
            yield from (f"imports {name}" for name in imported(wrapped) if f"{name}.".startswith(late))


def nothing_is_imported_by_a_string(path: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node).split(".")[-1] in ("import_module", "__import__"):
            yield ast.unparse(node)


def only_device_reads_the_environment(path: str, tree: ast.AST) -> Iterator[str]:
    if path == "triton_attn/device.py":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"imports os.{alias.name}" for alias in node.names if "env" in alias.name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.environb", "os.getenv", "os.putenv"):
            yield ast.unparse(node)


def files_say_what_they_hold(path: str, tree: ast.AST) -> Iterator[str]:
    for word in re.split(r"[\W_]+", path.removesuffix(".py")):
        if re.fullmatch(r"utils?|helpers?|misc|common|v\d+|new|old|og|wip", word):
            yield f"is called {word!r}"


def only_what_is_listed_is_unpickled(tree: ast.AST) -> Iterator[str]:
    """CIFAR is published as pickles: one file reads them, by unpicklers that look names up in a table of their own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            if "find_class" not in (part.name for part in node.body if isinstance(part, ast.FunctionDef)):
                yield f"{node.name} looks up any name"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            yield f"calls {ast.unparse(node.func)}"
        elif isinstance(node, ast.ImportFrom) and node.module == "pickle":
            yield "imports from pickle"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("super().find_class", "getattr", "eval", "exec"):
            yield f"calls {ast.unparse(node.func)}"


def nothing_is_unpickled_or_evaluated(path: str, tree: ast.AST) -> Iterator[str]:
    if path == RESTRICTED:
        yield from only_what_is_listed_is_unpickled(tree)
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (
                f"imports {name}" for name in names if re.match(r"(c?pickle|_pickle|dill|cloudpickle|joblib|marshal|shelve)\b", name)
            )
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            yield f"calls {node.func.id}"
        elif isinstance(node, ast.keyword) and ast.unparse(node) in ("shell=True", "weights_only=False"):
            yield ast.unparse(node)


def launches_stand_under_the_guard(path: str, tree: ast.AST) -> Iterator[str]:
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any(ast.unparse(item.context_expr).startswith("device.guard(") for item in node.items)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        launch = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and ast.unparse(node.func.value).endswith("_kernel")
        if launch and node not in guarded:
            yield f"launches {ast.unparse(node).split('[')[0]}"


def nothing_is_timed_when_a_call_is_made(path: str, tree: ast.AST) -> Iterator[str]:
    if path == "triton_attn/testing/interpreter/language.py":
        return  # puts tuning out of action
    if path.startswith("triton_attn/tuning/"):
        return  # runs where somebody asked for it; tests/test_tuning.py sees to that
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node).split(".")[-1] in ("autotune", "Autotuner", "do_bench"):
            yield ast.unparse(node)


def no_kernel_copies_for_a_layout(path: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("contiguous", "clone", "reshape"):
            yield ast.unparse(node)


def comparisons_are_asserted(path: str, tree: ast.AST) -> Iterator[str]:
    for statement in ast.walk(tree):
        if not isinstance(statement, ast.Expr):
            continue
        value = statement.value
        while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in ("all", "any", "item"):
            value = value.func.value
        called = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else ""
        if isinstance(value, ast.Compare) or called in ("allclose", "equal", "isclose", "array_equal", "eq", "is_close"):
            yield ast.unparse(statement)


Rule = Callable[[str, ast.AST], Iterator[str]]
HOUSE, TESTS = ("triton_attn", "kernels", "reference"), ("tests",)
SHOWN = (*HOUSE, "benchmarks", "examples", "docs")  # tests may run the code of the docs
EVERYWHERE = (*SHOWN, *TESTS)
# a rule, where it holds, and what it must complain of: (path, source)
RULES: list[tuple[Rule, tuple[str, ...], list[tuple[str, str]]]] = [
    (
        imports_go_one_way,
        HOUSE,
        [
            ("triton_attn/mechanism.py", "import torch"),
            ("triton_attn/mechanism.py", "from triton_attn import device"),
            ("triton_attn/dispatch.py", "def f():\n    from triton_attn.functional.attention import ROW"),
            ("triton_attn/functional/attention.py", "from triton_attn.catalog import CATALOG"),
            ("triton_attn/functional/attention.py", "from triton_attn import CATALOG"),
            ("triton_attn/functional/attention.py", "from . import hydra"),
            ("triton_attn/catalog.py", "import triton_attn.verify"),
            ("triton_attn/verify.py", "from triton_attn.report import tables"),
            ("triton_attn/report/tables.py", "from triton_attn import cli"),
            ("triton_attn/report/tables.py", "import tests.test_rooms"),
            ("triton_attn/bench.py", "from benchmarks import peers"),
            ("triton_attn/testing/laws.py", "from triton_attn import verify"),
            ("triton_attn/nn/attention.py", "from triton_attn import operators"),
            ("triton_attn/portable/attention.py", "from triton_attn.reference.attention import visible"),
            ("triton_attn/drawer.py", ""),
            ("kernels/hydra.py", "from triton_attn.kernels import attention"),
            ("kernels/hydra.py", "from triton_attn.reference.attention import bound"),
            ("kernels/hydra.py", "from triton_attn import dispatch"),
            ("reference/hydra.py", "from triton_attn.reference.attention import attention"),
            ("reference/hydra.py", "import triton"),
            ("reference/hydra.py", "import numpy as np"),
        ],
    ),
    (
        triton_waits_for_a_kernel,
        HOUSE,
        [
            ("triton_attn/offline.py", "try:\n    import triton.language as tl\nexcept ImportError:\n    pass"),
            ("triton_attn/offline.py", "class A:\n    from triton import knobs"),
            ("triton_attn/functional/attention.py", "from triton_attn.kernels import attention"),
            ("triton_attn/testing/interpreter/memory.py", "import triton"),
            ("triton_attn/testing/interpreter/strict.py", "from triton_attn.testing.interpreter import language"),
            ("triton_attn/testing/interpreter/faults.py", "from triton_attn.testing.interpreter.builder import StrictBuilder"),
        ],
    ),
    (
        nothing_is_imported_by_a_string,
        HOUSE,
        [("triton_attn/catalog.py", "import importlib\nimportlib.import_module('x')"), ("triton_attn/catalog.py", "__import__('x')")],
    ),
    (
        only_device_reads_the_environment,
        HOUSE,
        [
            ("triton_attn/tiles.py", "import os\nos.environ['X']"),
            ("kernels/attention.py", "import os\nos.getenv('X')"),
            ("reference/attention.py", "from os import environ as e"),
        ],
    ),
    (
        files_say_what_they_hold,
        EVERYWHERE,
        [
            (path, "")
            for path in ("triton_attn/utils.py", "tests/helpers/x.py", "kernels/_common.py", "kernels/attention_v2.py", "docs/misc.py")
        ],
    ),
    (
        nothing_is_unpickled_or_evaluated,
        SHOWN,
        [
            ("benchmarks/x.py", "import pickle"),
            ("benchmarks/x.py", "from pickle import loads"),
            ("benchmarks/x.py", "eval('1')"),
            ("benchmarks/x.py", "exec('1')"),
            ("benchmarks/x.py", "import subprocess\nsubprocess.run('ls', shell=True)"),
            ("benchmarks/x.py", "import torch\ntorch.load('x', weights_only=False)"),
            (RESTRICTED, "import pickle\npickle.loads(b'')"),
            (RESTRICTED, "from pickle import load"),
            (RESTRICTED, "import pickle\nclass A(pickle.Unpickler): pass"),
            (
                RESTRICTED,
                "import pickle\nclass A(pickle.Unpickler):\n    def find_class(self, m, n):\n        return super().find_class(m, n)",
            ),
        ],
    ),
    (
        launches_stand_under_the_guard,
        HOUSE,
        [("kernels/x.py", "def f(q):\n    with device.guard(q):\n        forward_kernel[grid](q)\n    loop.backward_kernel[grid](q)")],
    ),
    (
        nothing_is_timed_when_a_call_is_made,
        HOUSE,
        [
            ("kernels/attention.py", "@triton.autotune(configs, key=[])\ndef f(): pass"),
            ("triton_attn/dispatch.py", "from triton import testing\ntesting.do_bench(f)"),
        ],
    ),
    (
        no_kernel_copies_for_a_layout,
        ("kernels",),
        [("kernels/attention.py", "query = query.contiguous()"), ("kernels/attention.py", "x = key.reshape(-1)")],
    ),
    (
        comparisons_are_asserted,
        TESTS,
        [
            ("tests/x.py", "torch.allclose(a, b)"),
            ("tests/x.py", "def test() -> None:\n    a.equal(b)"),
            ("tests/x.py", "torch.isclose(a, b).all()"),
            ("tests/x.py", "with use_backend('auto'):\n    a == b"),
            ("tests/x.py", "(a < b).all()"),
        ],
    ),
]
FILES = {room: sorted(path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts) for room in EVERYWHERE}
NAMES = [rule.__name__ for rule, _, _ in RULES]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files_of(rooms: tuple[str, ...]) -> Iterator[Path]:
    """Every file once: the linked rooms count as themselves."""
    for room in rooms:
        yield from (path for path in FILES[room] if not relative(path).startswith(("triton_attn/kernels", "triton_attn/reference")))


def test_the_rooms_are_where_the_rules_look() -> None:
    seen = {relative(path) for path in files_of(EVERYWHERE)}
    assert seen >= {"kernels/attention.py", "reference/attention.py", "triton_attn/portable/attention.py", "tests/test_rooms.py"}


@pytest.mark.parametrize(("rule", "rooms", "bad"), RULES, ids=NAMES)
def test_every_file_keeps_the_rule(rule: Rule, rooms: tuple[str, ...], bad: list[tuple[str, str]]) -> None:
    complaints = [f"{relative(path)}: {said}" for path in files_of(rooms) for said in rule(relative(path), ast.parse(path.read_text()))]
    assert complaints == []


@pytest.mark.parametrize(("rule", "rooms", "bad"), RULES, ids=NAMES)
def test_the_rule_complains_of_every_file_that_breaks_it(rule: Rule, rooms: tuple[str, ...], bad: list[tuple[str, str]]) -> None:
    assert [case for case in bad if len(list(rule(case[0], ast.parse(case[1])))) != 1] == []


def test_files_stay_short_enough_to_read() -> None:
    most = {room: MOST_LINES_OF_CASES if room == "tests" else MOST_LINES for room in EVERYWHERE}
    lengths = {relative(path): len(path.read_text().splitlines()) for path in files_of(EVERYWHERE)}
    assert {path: length for path, length in lengths.items() if length > most[path.split("/")[0]]} == {}
