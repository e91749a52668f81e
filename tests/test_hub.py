"""The layout of Hugging Face's kernels: loads under any name, beside the installed package, and computes the same."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_attn import ArgumentError
from triton_attn.integrations import hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hub")
    assert [path.name for path in hub.build(made)] == ["torch-cuda", "torch-cpu"]
    return made


def test_every_import_of_the_package_is_relative(folder: Path) -> None:
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(hub._ours(name) for name in names), (path, ast.unparse(node))


@pytest.mark.parametrize(
    ("given", "depth", "made"),
    [
        ("from triton_attn import tiles\n", 1, "from . import tiles\n"),
        ("from triton_attn.nn import (\n    A,\n)\n", 2, "from ..nn import (\n    A,\n)\n"),
        ("def f():\n    from triton_attn.kernels.a import b\n", 3, "def f():\n    from ...kernels.a import b\n"),
        ("import triton_attn\n", 2, 'import importlib\n\ntriton_attn = importlib.import_module("..", __package__)\n'),
        ("import triton\nfrom triton import jit\n", 2, "import triton\nfrom triton import jit\n"),
    ],
)
def test_imports_become_relative(given: str, depth: int, made: str) -> None:
    assert hub.relative(given, depth=depth) == made


def test_what_cannot_become_relative_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"has `import triton_attn.nn`; allowed: `import triton_attn`, or from it"):
        hub.relative("import triton_attn.nn\n", depth=1)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("\\chapter{One}")
    with pytest.raises(ArgumentError, match="holds other things"):
        hub.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_metadata_says_what_the_layout_asks_for(folder: Path) -> None:
    for backend in hub.BACKENDS:
        said = json.loads((folder / "build" / f"torch-{backend}" / "metadata.json").read_text())
        assert said["backend"] == {"type": backend}
        assert said["python-depends"] == ["einops"]
        assert said["id"].startswith(f"_triton_attn_{backend}_")


BESIDE = """
import torch, triton_attn
x = torch.randn(1, 2, 9, 16, requires_grad=True)
assert loaded is not triton_attn and loaded.__name__ != "triton_attn"
with loaded.use_backend("triton"):
    out = loaded.attention(x, x, x, causal=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
torch.testing.assert_close(out, expected)
torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0])
torch.testing.assert_close(triton_attn.attention(x, x, x, causal=True), expected)
"""


def run(code: str, folder: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment, cwd=Path(__file__).parents[1], timeout=300)


def test_it_loads_under_another_name_beside_the_package(folder: Path) -> None:
    pytest.importorskip("triton")
    load = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("another_name", sys.argv[1] + "/build/torch-cpu/__init__.py")
loaded = sys.modules["another_name"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loaded)
import another_name._ops
assert hasattr(another_name._ops.ops, "attention")
"""
    run(load + BESIDE, folder)


def test_kernels_loads_it(folder: Path) -> None:
    try:  # by its distribution: a folder of this name lies here
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs Hugging Face's kernels: make test-models")
    run(
        "import sys; from pathlib import Path; import kernels; loaded = kernels.get_local_kernel(Path(sys.argv[1]), trust_remote_code=True)"
        + BESIDE,
        folder,
    )
