"""The command line and the report: what they print, what they refuse, what they write."""

import dataclasses
import datetime
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from triton_attn import CATALOG, device
from triton_attn.bench import Timing
from triton_attn.cli import main
from triton_attn.offline import Compiled
from triton_attn.report import Results, gather, markdown, parts, plots, rows, tables, terminal
from triton_attn.report.calls import Call
from triton_attn.tiles import Usage
from triton_attn.verify import Verdict

ROOT = Path(__file__).resolve().parents[1]
NAMES = list(CATALOG)
FIRST = NAMES[0]
USAGE = Usage(registers=90, spilled=0, shared=16384, warps=4, tensor_core=12, asynchronous=6)
VERDICT = Verdict(FIRST, "pointers", "dense", "float32", "interpreter", 0.273, "lse", 0.5)
COMPILED = Compiled(FIRST, "pointers", "forward", "sm_90", "16bit d64", "64x32 w4 s1", USAGE, 5, 1.2)
TIMING = Timing(FIRST, "dense", "b=1 h=8", "float32", "cpu", "forward", "portable", 2.0, "torch SDPA", 3.0, 1.5, 7, None)
CALL = Call(FIRST, "b=1 h=8", "float32", "cpu", "portable", "", {}, {"a kernel": ("query is on cpu",)})
MACHINE: dict[str, Any] = {"torch": "2.13", "triton": "3.9.0", "interpreter": False, "gpus": []}
GPU = {"name": "NVIDIA H200", "capability": [9, 0], "refusal": "", "multiprocessors": 132, "memory": 2**37}

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


def results(**changed: Any) -> Results:
    made = Results(CATALOG, MACHINE, ["sm_80", "sm_90"], [CALL], [VERDICT], [COMPILED], [TIMING], seconds=9.0)
    return dataclasses.replace(made, **changed)


def page(given: Results) -> str:
    return markdown.page(given, datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC))


def test_list_names_every_mechanism_and_kernel(command: Command) -> None:
    ended = command("list")
    assert ended.code == 0
    for row in CATALOG.values():
        assert row.name in ended.out
        assert all(kernel.name in ended.out for kernel in row.kernels)


def test_list_as_json_is_a_line_per_mechanism(command: Command) -> None:
    listed = command("list", "--json").rows
    assert [row["name"] for row in listed] == NAMES
    assert all("sm_90" in capabilities for row in listed for capabilities in row["kernels"].values())


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
        (["explain", "attention", "--size", "d=512"], "query has width 512; allowed: 1 to 256"),
        (["explain", "attention", "--size", "g=3"], "3 heads"),
        (["explain", FIRST, "--dtype", "int8"], "dtype is 'int8'; allowed: float16"),
        (["bench", "--device", "abacus"], "device is 'abacus'; allowed on this machine: cpu"),
        (["bench", "--device", "cuda:99"], "device is 'cuda:99'"),
        (["verify", "--seconds", "-1"], "seconds is -1.0"),
        (["verify", "--seconds", "nan"], "seconds is nan"),
        (["report", "--seconds-per-mechanism", "soon"], "--seconds-per-mechanism"),
        (["report", "--folder", "/dev/null/below"], "cannot be written: Not a directory"),
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
        assert {launch.name for launch in CATALOG[FIRST].kernels[-1].launches} == set(told["tiles"])
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


def test_every_mechanism_gets_its_share_of_the_time() -> None:
    shares: list[float] = []

    def run(name: str, share: float) -> Iterator[str]:
        shares.append(share)
        yield name

    log = parts.Log()
    assert list(parts._shared([(name, name) for name in "abcd"], 100.0, run, log)) == list("abcd")
    assert shares == pytest.approx([25.0, 33.3, 50.0, 100.0], rel=0.01)
    assert log.left_out == []


@given(st.builds(Verdict, share=st.floats(min_value=0, allow_nan=False), seconds=st.floats(0, 1e9)))
def test_a_row_survives_json(verdict: Verdict) -> None:
    line = rows.to_json(verdict)
    json.loads(line, parse_constant=pytest.fail)
    assert rows.from_json(Verdict, line) == verdict


@pytest.mark.parametrize("row", [VERDICT, COMPILED, TIMING, dataclasses.replace(COMPILED, usage=None)])
def test_every_kind_of_row_survives_json(row: Any) -> None:
    assert rows.from_json(type(row), rows.to_json(row)) == row


@pytest.mark.parametrize("line", ["", "warning: something", "[]", "3", "null", '{"mechanism": "attention"}', '{"usage": {"no": 1}}'])
def test_what_is_no_row_is_a_value_error(line: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        rows.from_json(Compiled, line)


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
def test_no_text_breaks_out_of_its_cell(cells: list[tuple[str, str]]) -> None:
    lines = str(markdown.table(tables.Table(("one", "two>"), cells))).split("\n")
    assert len(lines) == 2 + len(cells)
    assert {line.count("|") for line in lines} == {3}
    assert not re.search(r"[<>`\[\]\\\x1b]", "".join(lines))


HOSTILE = '</details><img src=x onerror=alert(1)>|`[a](javascript:b)![c](d)`|\n# title\r\x1b[31m\u202e$\\frac{$ {{ 7 * 7 }} "'


def test_hostile_text_stays_text_on_the_page_and_in_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def poison(row: Any) -> Any:
        return dataclasses.replace(
            row, **{field.name: HOSTILE for field in dataclasses.fields(row) if isinstance(getattr(row, field.name), str)}
        )

    call = dataclasses.replace(poison(CALL), tiles={HOSTILE: HOSTILE}, reasons={HOSTILE: [HOSTILE]})
    given = results(
        machine={**MACHINE, HOSTILE: HOSTILE, "gpus": [{**GPU, "name": HOSTILE, "refusal": HOSTILE}]},
        calls=[call],
        verdicts=[VERDICT, poison(VERDICT)],
        compiled=[COMPILED, poison(COMPILED)],
        timings=[TIMING, poison(TIMING)],
        notes=[HOSTILE],
        faults=[HOSTILE],
    )
    text = markdown.write(given, tmp_path).read_text(encoding="utf-8")
    assert "onerror" in text
    assert "<img" not in text
    assert not re.search(r"\]\((javascript|d\))", text)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "{{ 7 &#42; 7 }}" in text
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert re.findall(r"<(?:img|a|script)\b[^>]*>", rendered) == [
        f'<img src="{plots.CHECKS}" alt="Worst error of each check as share of its bound" />',
        f'<img src="{plots.TIMINGS}" alt="The peer\'s time over ours" />',
    ]
    assert not re.search(r"^# title", text, re.MULTILINE)
    assert text.count("</details>") == 1
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    for picture in (plots.CHECKS, plots.TIMINGS):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring((tmp_path / picture).read_text()).iter()}
        assert not tags & {"img", "script", "image", "foreignObject"}
    terminal.show(tables.calls([call]))
    assert "\x1b" not in capsys.readouterr().out


def test_the_page_holds_every_row_and_the_folder_its_data(tmp_path: Path) -> None:
    path = markdown.write(results(), tmp_path / "new" / "folder")
    text = path.read_text(encoding="utf-8")
    for held in ("27 %", f"{FIRST}/pointers/forward", "64x32 w4 s1", "16384", "1.50×", "torch SDPA", "query is on cpu", "1 of 1"):
        assert held in text
    assert text.count("![") == 2
    assert all((path.parent / picture).is_file() for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text))
    assert rows.from_json(Verdict, (path.parent / "verify.jsonl").read_text()) == VERDICT
    assert json.loads((path.parent / "machine.json").read_text()) == MACHINE


def test_the_page_says_that_nothing_ran_on_a_gpu_where_there_is_none() -> None:
    assert "Not run on a GPU" in page(results())
    assert "run on a GPU" not in page(results(machine={**MACHINE, "gpus": [GPU]}))


def test_the_page_says_what_is_wrong_and_what_was_left_out() -> None:
    right = page(results())
    assert "All right" in right
    assert "What is wrong" not in right
    bad = page(results(verdicts=[dataclasses.replace(VERDICT, share=3.0, fault="out is 3.00 times its bound")], notes=["bench: no time"]))
    assert "1 thing is wrong" in bad
    assert "out is 3.00 times its bound" in bad
    assert "bench: no time" in bad


def test_a_page_of_nothing_promises_nothing(tmp_path: Path) -> None:
    (tmp_path / plots.CHECKS).write_text("of an earlier run")
    text = markdown.write(results(calls=[], verdicts=[], compiled=[], timings=[]), tmp_path).read_text(encoding="utf-8")
    assert "Nothing was checked." in text
    assert "All right" not in text
    assert "![" not in text
    assert not (tmp_path / plots.CHECKS).exists()


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in the place of the interpreter that runs the parts: its third argument is the part's name."""

    def pretend(script: str) -> None:
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    return pretend


def gathered(seconds: float = 1.0, **machine: Any) -> Results:
    return gather.gather(CATALOG, {**MACHINE, **machine}, targets=["sm_90"], device="cpu", seconds=seconds)


def test_a_part_that_dies_is_a_fault_and_keeps_its_rows(python: Callable[[str], None]) -> None:
    python(f"[ $3 = verify ] || exit 0; echo '{rows.to_json(VERDICT)}'; echo garbage; echo 'Boom: it broke' >&2; exit 3")
    found = gathered()
    assert found.verdicts == [VERDICT]
    assert found.faults[0].startswith("verify printed what is no result")
    assert found.faults[1] == "verify ended with exit code 3: Boom: it broke"


def test_a_part_that_hangs_is_stopped_with_what_it_started(python: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_PATIENCE", 0.2)
    python("[ $3 = verify ] || exit 0; sleep 60; sleep 60")
    found = gathered(0.1)
    assert found.faults == ["verify did not end in time and was stopped"]
    assert found.seconds < 30


def test_what_a_part_leaves_out_is_a_note_and_what_fails_in_it_a_fault(python: Callable[[str], None]) -> None:
    python("[ $3 = bench ] || exit 0; echo 'a warning' >&2; echo 'triton-attn: x had 1 s' >&2; echo 'triton-attn: failed: y' >&2; exit 1")
    found = gathered()
    assert found.notes == ["bench: x had 1 s"]
    assert found.faults == ["bench failed: y"]


@pytest.mark.parametrize(
    ("machine", "reason"), [({"triton": None}, "triton is not installed"), ({"interpreter": True}, "TRITON_INTERPRET=1 is set")]
)
def test_where_nothing_can_be_compiled_the_report_says_so(python: Callable[[str], None], machine: dict[str, Any], reason: str) -> None:
    python("[ $3 = compile ] && exit 3; exit 0")
    found = gathered(**machine)
    assert (found.faults, found.notes) == ([], [f"compile: {reason}"])
    assert ("Triton is not installed" in page(found)) == (machine == {"triton": None})


@pytest.mark.slow
@needs_triton
def test_report_runs_the_lot_and_writes_it_down(tmp_path: Path) -> None:
    ended = execute("report", FIRST, "--folder", str(tmp_path), "--seconds-per-mechanism", "1", "--device", "cpu", "--json")
    assert ended.code == 0, ended.out + ended.err
    (summary,) = ended.rows
    assert summary["page"] == str(tmp_path / "report.md")
    assert summary["wrong"] == []
    text = Path(summary["page"]).read_text(encoding="utf-8")
    kinds: list[tuple[Any, str]] = [(Verdict, "verify"), (Compiled, "compile"), (Timing, "bench"), (Call, "explain")]
    for kind, file in kinds:
        found = [rows.from_json(kind, line) for line in (tmp_path / f"{file}.jsonl").read_text().splitlines()]
        assert found
        assert {row.mechanism for row in found} == {FIRST}
    assert "## 5. Timings" in text
