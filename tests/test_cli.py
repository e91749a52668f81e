"""The command line: what each command prints, what it refuses, and how it ends."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from triton_attn import CATALOG, device
from triton_attn.bench import Timing
from triton_attn.cli import main
from triton_attn.offline import Compiled
from triton_attn.report import parts, rows
from triton_attn.tiles import Usage
from triton_attn.verify import Verdict

ROOT = Path(__file__).resolve().parents[1]
NAMES = list(CATALOG)
FIRST = NAMES[0]
USAGE = Usage(registers=90, spilled=0, shared=16384, warps=4, tensor_core=12, asynchronous=6)
VERDICT = Verdict(FIRST, "pointers", "dense", "float32", "interpreter", 0.273, "lse", 0.5)
COMPILED = Compiled(FIRST, "pointers", "forward", "sm_90", "16bit d64", "64x32 w4 s1", USAGE, 5, 1.2)
TIMING = Timing(FIRST, "dense", "b=1 h=8", "float32", "cpu", "forward", "portable", 2.0, "torch SDPA", 3.0, 1.5, 7, None)

needs_triton = pytest.mark.skipif(not device.triton_version(), reason="triton is not installed")


@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Command = Callable[..., Ended]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process."""

    def run(*arguments: str) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        return Ended(int(ended.value.code or 0), said.out, said.err)

    return run


def execute(*arguments: str) -> Ended:
    """The command line in a process of its own, where triton's interpreter is off until a command asks for it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "triton_attn", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def test_list_names_every_mechanism_and_kernel(command: Command) -> None:
    ended = command("list")
    assert ended.code == 0
    for row in CATALOG.values():
        assert row.name in ended.out
        assert all(kernel.name in ended.out for kernel in row.kernels)


def test_list_as_json_is_a_line_per_mechanism(command: Command) -> None:
    listed = command("list", "--json").rows
    assert [row["name"] for row in listed] == NAMES
    assert all("sm_90" in capabilities for capabilities in listed[0]["kernels"].values())


def test_list_as_markdown_is_a_row_per_mechanism(command: Command) -> None:
    lines = command("list", "--markdown").out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == NAMES
    assert len({line.count("|") for line in lines}) == 1


def test_listing_imports_neither_matplotlib_nor_jinja2() -> None:
    code = "import atexit, sys; atexit.register(lambda: print(sorted({'matplotlib', 'jinja2'} & set(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nfrom triton_attn.cli import main\nmain(['list'])"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["explain", "nonsense"], f"allowed: {', '.join(NAMES)}"),
        (["verify", "nonsense"], "mechanism is 'nonsense'"),
        (["compile", FIRST, "nonsense"], "mechanism is 'nonsense'"),
        (["report", "nonsense"], "mechanism is 'nonsense'"),
        (["compile", "--target", "sm_12"], "allowed: sm_80"),
        (["compile", "--target", "sm_80,"], "target is ''"),
        (["explain", "--target", "$(id)"], "target is '$(id)'"),
        (["explain", FIRST, "--size", "b"], "size is 'b'"),
        (["explain", FIRST, "--size", "b=-1"], "size is 'b=-1'"),
        (["explain", FIRST, "--size", "z=4"], "size is 'z=4'"),
        (["explain", FIRST, "--size", "b=²"], "size is 'b=²'"),
        (["explain", FIRST, "--size", "b=" + 5000 * "9"], "a whole number by axis"),
        (["explain", FIRST, "--size", "b=999999999999"], "no memory for b=999999999999"),
        (["explain", "attention", "--size", "d=0"], "query has width 0; allowed: 1 or more"),
        (["explain", "attention", "--size", "g=3"], "3 heads"),
        (["explain", FIRST, "--dtype", "int8"], "dtype is 'int8'; allowed: float16"),
        (["bench", "--device", "abacus"], "device is 'abacus'; allowed on this machine: cpu"),
        (["bench", "--device", "cuda:99"], "device is 'cuda:99'"),
        (["verify", "--seconds", "-1"], "seconds is -1.0"),
        (["verify", "--seconds", "nan"], "seconds is nan"),
        (["report", "--seconds-per-mechanism", "soon"], "--seconds-per-mechanism"),
        (["report", "--folder", "/dev/null/below"], "/dev/null/below: Not a directory"),
        (["nonsense"], "nonsense"),
        (["list", "--nonsense"], "--nonsense"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_two(command: Command, arguments: list[str], named: str) -> None:
    ended = command(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    assert named in ended.err


def test_a_file_where_the_folder_should_be_is_refused_and_left_alone(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = command("report", "--folder", str(tmp_path / "file"))
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert (tmp_path / "file").read_text() == "mine"


@needs_triton
def test_explain_tells_what_runs_here_and_on_each_target(command: Command) -> None:
    here, *targets = command("explain", FIRST, "--size", "b=3", "--device", "cpu", "--target", "sm_80,sm_90", "--json").rows
    assert (here["path"], here["where"], here["sizes"].split()[0]) == ("portable", "cpu", "b=3")
    assert here["reasons"]
    assert [told["where"] for told in targets] == ["sm_80", "sm_90"]
    for told in targets:
        assert told["path"] == "kernel"
        assert {launch.name for launch in CATALOG[FIRST].kernels[-1].launches if not launch.shared} == set(told["tiles"])
        assert all(("tile " in tile and "table" in tile) or "tile space" in tile for tile in told["tiles"].values())


@needs_triton
def test_explain_tells_why_no_kernel_serves_float64(command: Command) -> None:
    (_, told) = command("explain", FIRST, "--dtype", "float64", "--target", "sm_90", "--json").rows
    assert told["path"] == "portable"
    assert "float32" in next(iter(told["reasons"].values()))[0]


@needs_triton
def test_verify_interprets_kernels_where_there_is_no_gpu() -> None:
    ended = execute("verify", FIRST, "--device", "cpu", "--seconds", "0.01", "--json")
    assert ended.code == 0, ended.err
    (verdict,) = (rows.from_json(Verdict, line) for line in ended.out.splitlines())
    assert (verdict.where, verdict.fault) == ("interpreter", "")
    assert 0 < verdict.share <= 1
    assert ended.err == f"triton-attn: {FIRST} had 0.0 s: what did not fit was left out\n"


@pytest.mark.slow
@needs_triton
def test_teeth_plants_some_faults_and_says_what_caught_them() -> None:
    ended = execute("teeth", FIRST, "--some", "1", "--seed", "3", "--json")
    assert ended.code == 0, ended.err
    assert {row["mechanism"] for row in ended.rows} == {FIRST}
    assert len(ended.rows) == len(CATALOG[FIRST].kernels)
    assert all(row["change"] and (row["caught"] or row["equivalent"]) for row in ended.rows)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the process in which `verify` interprets."""
    monkeypatch.setattr(device, "interpreting", lambda: True)


@pytest.mark.usefixtures("interpreted")
def test_verify_ends_in_one_and_says_what_is_wrong(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(VERDICT, share=math.inf, fault="out[0] is [bold]nan[/], the truth \x1b[31m1.0")
    monkeypatch.setattr(parts, "verify", lambda *args, **kwargs: iter([VERDICT, wrong]))
    ended = command("verify", FIRST, "--device", "cpu")
    assert ended.code == 1
    assert "out[0] is [bold]nan[/], the truth  [31m1.0" in ended.out
    assert "not finite" in ended.out
    assert "2 checks, the worst at not finite of its bound: 1 wrong" in ended.out


@pytest.mark.usefixtures("interpreted")
def test_an_implementation_that_raises_is_a_wrong_verdict(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*args: Any, tick: Callable[[str], None], **kwargs: Any) -> Iterator[Verdict]:
        yield VERDICT
        tick("pointers dense float16")
        raise RuntimeError("illegal memory access\nand a long story")

    monkeypatch.setattr(parts, "verify", raising)
    ended = command("verify", FIRST, "--device", "cpu", "--json")
    assert ended.code == 1
    first, second = ended.rows
    assert first["fault"] == ""
    assert second["fault"] == "RuntimeError: illegal memory access"
    assert second["case"] == "pointers dense float16"


@needs_triton
def test_compile_reports_what_a_kernel_uses_of_a_gpu_that_is_not_here() -> None:
    ended = execute("compile", FIRST, "--target", "sm_90", "--seconds", "0.01", "--json")
    assert ended.code == 0, ended.err
    (compiled,) = (rows.from_json(Compiled, line) for line in ended.out.splitlines())
    assert (compiled.target, compiled.fault) == ("sm_90", "")
    assert compiled.usage is not None
    assert compiled.usage.registers > 0
    assert compiled.blocks > 0


@needs_triton
def test_compile_ends_in_one_when_a_kernel_spills(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = dataclasses.replace(COMPILED, usage=dataclasses.replace(USAGE, spilled=8), fault="spills 8 bytes")
    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(parts, "compile_rows", lambda *args, **kwargs: iter([COMPILED, spilling]))
    ended = command("compile", FIRST, "--target", "sm_90")
    assert ended.code == 1
    assert f"{FIRST}/pointers/forward sm_90 16bit d64 64x32 w4 s1: spills 8 bytes" in ended.out
    assert "2 kernels compiled: 1 wrong" in ended.out


@needs_triton
@pytest.mark.usefixtures("interpreted")
def test_compile_under_the_interpreter_is_refused(command: Command) -> None:
    ended = command("compile")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert "TRITON_INTERPRET=1" in ended.err


def test_bench_prints_a_row_per_timing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "bench", lambda *args, **kwargs: iter([TIMING]))
    assert all(text in command("bench", FIRST, "--device", "cpu").out for text in ("torch SDPA", "1.50", "2 ms"))
    assert command("bench", FIRST, "--device", "cpu", "--json").rows == [dataclasses.asdict(TIMING)]


def test_bench_goes_on_after_a_mechanism_that_cannot_be_timed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*args: Any, **kwargs: Any) -> Iterator[Timing]:
        yield TIMING
        raise MemoryError

    monkeypatch.setattr(parts, "bench", raising)
    ended = command("bench", FIRST, "--device", "cpu", "--json")
    assert ended.code == 1
    assert len(ended.rows) == 1
    assert ended.err == f"triton-attn: failed: {FIRST}: MemoryError\n"


@pytest.mark.slow
@needs_triton
def test_report_runs_the_lot_and_writes_it_down(tmp_path: Path) -> None:
    ended = execute("report", FIRST, "--folder", str(tmp_path), "--seconds-per-mechanism", "1", "--device", "cpu", "--json")
    assert ended.code == 0, ended.out + ended.err
    (summary,) = ended.rows
    assert summary["page"] == str(tmp_path / "report.html")
    assert summary["wrong"] == []
    text = Path(summary["page"]).read_text(encoding="utf-8")
    data = json.loads((tmp_path / "report.json").read_text())
    for name, kind in rows.PARTS.items():
        found = [rows.from_record(kind, record) for record in data[name]]
        assert found
        assert {row.mechanism for row in found} == {FIRST}
    assert "5. Timings</h2>" in text


def test_bench_blocks_times_every_block_in_both_directions(command: Command) -> None:
    sizes = ("--d-model", "16", "--n-head", "2", "--seq-len", "5", "--batch-size", "2", "--warmup", "1", "--iterations", "2")
    found = command("bench", "blocks", *sizes, "--device", "cpu", "--json")
    assert (found.code, found.err) == (0, "")
    assert [row["direction"] for row in found.rows] == ["forward"] * 6 + ["forward + backward"] * 6
    assert [row["block"] for row in found.rows] == ["standard", "parallel", "linear", "deepnorm", "sparse", "subln"] * 2
    for row in found.rows:
        assert row["avg_time_ms"] > 0
        assert row["output_shape"] == [2, 5, 16]
        assert row["memory_mb"] is None
        assert (row["speedup"] == 1) == (row["block"] == "standard")
    shown = command("bench", "blocks", *sizes, "--device", "cpu").out
    assert all(text in shown for text in ("2 x 5 tokens, width 16", "deepnorm", "speed-up over standard", "not measured on a CPU"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--n-head", "5"], "n_head is 5; allowed: a divisor of d_model, 768"),
        (["--device", "abacus"], "device is 'abacus'"),
        (["--seq-len", "0"], "--seq-len"),
    ],
)
def test_bench_blocks_refuses_by_name(command: Command, given: list[str], said: str) -> None:
    ended = command("bench", "blocks", *given)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err


def test_bench_says_what_it_can_time(command: Command) -> None:
    shown = command("bench", "--help").out
    assert "blocks" in shown
    assert "mechanisms" in shown
