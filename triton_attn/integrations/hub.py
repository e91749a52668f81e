"""The package in the layout of Hugging Face's `kernels`: a folder that `kernels.get_local_kernel` loads, and that one may publish.

    python -m triton_attn.integrations.hub build/hub
    kernels.get_local_kernel(Path("build/hub"), trust_remote_code=True).attention(query, key, value)

Such a kernel is loaded under a name of its own, maybe beside an installed triton_attn or another version: its imports are relative,
and its operators have a namespace of their own. What is an application (report, commands, training) stays out.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import sys
from pathlib import Path

from triton_attn import ArgumentError

PACKAGE = Path(__file__).resolve().parents[1]
NAME = "triton_attn"
BACKENDS = ("cuda", "cpu")
LEFT_OUT = ("cli.py", "__main__.py", "command_line.py", "report", "vit", "clip", "tuning/command.py", "integrations/hub.py")
NAMESPACE = 'NAMESPACE = "triton_attn"\n'


def build(folder: Path) -> list[Path]:
    """Write the layout into an empty or new folder; the variants' folders.

    Raises:
        ArgumentError: the folder holds something else.
    """
    if folder.exists() and any(path.name != "build" for path in folder.iterdir()):
        raise ArgumentError("hub", "folder", f"is {folder}, which holds other things; allowed: an empty or new one")
    from triton_attn import __version__

    sources = {path.relative_to(PACKAGE): path for path in sorted(_sources(PACKAGE))}
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources.values())).hexdigest()
    shutil.rmtree(folder / "build", ignore_errors=True)
    made = []
    for backend in BACKENDS:
        identifier = f"_{NAME}_{backend}_{digest[:8]}"
        variant = folder / "build" / f"torch-{backend}"
        for inner, path in sources.items():
            target = variant / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".py":
                target.write_bytes(path.read_bytes())
                continue
            text = relative(path.read_text(), depth=len(inner.parts))
            if inner == Path("operators.py"):
                assert text.count(NAMESPACE) == 1
                text = text.replace(NAMESPACE, f'NAMESPACE = "{identifier}"\n')
            target.write_text(text)
        for room in {inner.parent for inner in sources} - {Path()}:
            (variant / room / "__init__.py").touch()
        (variant / "_ops.py").write_text(_OPERATORS.format(identifier))
        metadata = {
            "name": NAME.replace("_", "-"),
            "id": identifier,
            "version": int(__version__.partition(".")[0]),
            "license": "MIT",
            "python-depends": ["einops"],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        made.append(variant)
    return made


_OPERATORS = '''"""This build's operators."""

import torch

ops = torch.ops.{0}


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator of this build."""
    return f"{0}::{{op_name}}"
'''


def relative(source: str, *, depth: int) -> str:
    """A module's source with its imports of this package made relative; `depth`: 1 for a module at the package's top."""
    root, lines = "." * depth, source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _ours(node.module or ""):
            line = lines[node.lineno - 1]
            rest = (node.module or "")[len(NAME) :].removeprefix(".")
            lines[node.lineno - 1] = line.replace(f"from {node.module} import", f"from {root}{rest} import", 1)
        elif isinstance(node, ast.Import) and any(_ours(alias.name) for alias in node.names):
            (alias,) = node.names
            if alias.name != NAME or alias.asname is not None:
                raise ArgumentError("hub", "source", f"has `{ast.unparse(node)}`; allowed: `import {NAME}`, or from it")
            line = lines[node.lineno - 1]
            # the package itself, whatever name it has been loaded by
            lines[node.lineno - 1] = line.replace(
                f"import {NAME}", f'import importlib\n\n{NAME} = importlib.import_module("{root}", __package__)', 1
            )
    return "".join(lines)


def _ours(module: str) -> bool:
    return module == NAME or module.startswith(f"{NAME}.")


def _sources(folder: Path) -> list[Path]:
    links = [path for path in folder.iterdir() if path.is_symlink()]  # kernels and reference, which a search does not follow
    found = (path for place in (folder, *links) for path in place.rglob("*") if path.suffix in (".py", ".json", ".typed"))
    return [path for path in found if not any(path.relative_to(folder).is_relative_to(left) for left in LEFT_OUT)]


if __name__ == "__main__":
    for variant in build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/hub")):
        print(variant)
