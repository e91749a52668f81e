"""The package as a user gets it: what the wheel holds, what it leaves alone, what importing it costs."""

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
HUGGING_FACE = "kernels==0.17.2"


def execute(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def output(*command: str | Path, cwd: Path) -> str:
    done = execute(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by way of an sdist, from a copy that keeps the links and leaves out everything else."""
    source = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for room in ("kernels", "reference", "triton_attn"):
        shutil.copytree(ROOT / room, source / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    output(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    (built,) = source.glob("dist/*.whl")
    return built


class Environment(NamedTuple):
    home: Path
    python: Path
    without_hugging_face: str | None


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A fresh environment: Hugging Face's `kernels` first, then the wheel, and the big packages from where these tests run."""
    home = tmp_path_factory.mktemp("environment").resolve()
    output(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--python", python, "install", "--no-deps")
    fetched = execute(*install, HUGGING_FACE, cwd=home)
    output(*install, wheel, cwd=home)
    # Last, or pip would take these for the environment's own.
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return Environment(home, python, fetched.stderr.strip().rpartition("\n")[2] if fetched.returncode else None)


def test_the_wheel_installs_nothing_outside_triton_attn(wheel: Path) -> None:
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"triton_attn"}


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    package = {
        (Path(folder) / name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / "triton_attn", followlinks=True)
        for name in names
        if Path(folder).name != "__pycache__"
    }
    kinds = ("py.typed", "kernels/attention.py", "reference/attention.py", "portable/attention.py", "functional/attention.py")
    assert {f"triton_attn/{kind}" for kind in kinds} <= package
    assert package - held == set()


def test_the_wheel_asks_for_torch_triton_and_einops_and_caps_none_of_them(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    asked = [requirement for requirement in map(Requirement, lines) if "extra" not in str(requirement.marker)]
    assert {requirement.name for requirement in asked} == {"torch", "triton", "einops"}
    assert not [str(requirement) for requirement in asked for version in requirement.specifier if version.operator not in (">=", "!=")]


def test_the_installed_wheel_has_its_kernels_far_from_the_checkout(environment: Environment, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = "import triton_attn.kernels.attention as ours; print(ours.__file__)"
    assert Path(output(environment.python, "-c", code, cwd=tmp_path).strip()).is_relative_to(environment.home)


@pytest.mark.parametrize("from_checkout", [False, True])
def test_hugging_face_kernels_stays_itself_beside_ours(environment: Environment, tmp_path: Path, from_checkout: bool) -> None:
    pytest.importorskip("triton")
    if environment.without_hugging_face:
        pytest.skip(f"pip could not fetch {HUGGING_FACE}: {environment.without_hugging_face}")
    code = "import kernels, triton_attn.kernels.attention; assert kernels.get_kernel; print(kernels.__file__)"
    theirs = output(environment.python, "-c", code, cwd=ROOT if from_checkout else tmp_path).strip()
    assert Path(theirs).is_relative_to(environment.home)


def observe(code: str) -> Any:
    return json.loads(output(sys.executable, "-c", code, cwd=ROOT))


def test_importing_costs_less_than_half_a_second_on_top_of_torch() -> None:
    code = """
from time import perf_counter
import torch
start = perf_counter()
import triton_attn
print(perf_counter() - start)
"""
    # Noise only ever adds, and the first run may be compiling bytecode.
    assert any(observe(code) < 0.5 for _ in range(3))


@pytest.mark.parametrize("order", ["torch.utils.flop_counter, triton_attn", "triton_attn, torch.utils.flop_counter"])
def test_the_flop_counter_knows_the_operators_whoever_is_imported_first(order: str) -> None:
    code = f"""
import sys, json, {order}
names = [str(operator) for operator in torch.utils.flop_counter.flop_registry]
print(json.dumps([name for name in names if name.startswith("triton_attn")]))
"""
    assert {"triton_attn.attention", "triton_attn.attention_backward"} <= set(observe(code))


def test_importing_leaves_triton_for_the_first_kernel() -> None:
    assert observe("import json, sys, torch, triton_attn; print(json.dumps('triton' in sys.modules))") is False


def test_importing_starts_no_cuda_and_writes_connects_and_spawns_nothing() -> None:
    code = """
import json, os, sys
import torch
sys.dont_write_bytecode = True
seen = []
def watch(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.system", "subprocess.Popen", "socket.connect"):
        seen.append([event, *map(str, arguments)])
sys.addaudithook(watch)
import triton_attn
print(json.dumps({"cuda": torch.cuda.is_initialized(), "seen": seen}))
"""
    assert observe(code) == {"cuda": False, "seen": []}


def test_every_public_name_is_there_without_triton() -> None:
    code = """
import json, sys
from importlib.machinery import PathFinder
class WithoutTriton(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else super().find_spec(name, path, target)
sys.meta_path[:] = [WithoutTriton if finder is PathFinder else finder for finder in sys.meta_path]
import triton_attn
print(json.dumps({"triton": "triton" in sys.modules, "missing": [n for n in triton_attn.__all__ if not hasattr(triton_attn, n)]}))
"""
    assert observe(code) == {"triton": False, "missing": []}
