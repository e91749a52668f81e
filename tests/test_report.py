"""The report: rows to JSON and back, tables, the page, the pictures, and the processes that fill it."""

import base64
import dataclasses
import datetime
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from triton_attn import CATALOG, bench
from triton_attn.bench import Timing
from triton_attn.offline import Compiled
from triton_attn.report import Results, calls, candidates, folder, gather, markdown, parts, plots, rows, tables, terminal
from triton_attn.report.calls import Call
from triton_attn.report.candidates import Candidates
from triton_attn.report.earlier import Earlier
from triton_attn.tiles import Usage
from triton_attn.tuning.ranking import Ranked
from triton_attn.tuning.tune import Trial
from triton_attn.verify import Verdict

FIRST = next(iter(CATALOG))
USAGE = Usage(registers=90, spilled=0, shared=16384, warps=4, tensor_core=12, asynchronous=6)
VERDICT = Verdict(FIRST, "pointers", "dense", "float32", "interpreter", 0.273, "lse", 0.5)
COMPILED = Compiled(FIRST, "pointers", "forward", "sm_90", "16bit d64", "64x32 w4 s1", USAGE, 5, 1.2)
TIMING = Timing(FIRST, "dense", "b=1 h=8", "float32", "cpu", "forward", "portable", 2.0, "torch SDPA", 3.0, 1.5, 7, None)
CALL = Call(FIRST, "b=1 h=8", "float32", "cpu", "portable", "", {}, {"a kernel": ("query is on cpu",)})
TRIAL = Trial(f"{FIRST}/pointers/forward", "16bit d64", "64x32 w4 s1", "b=1", "bfloat16", "NVIDIA H200", "3.9.0", "0", 1.5, 0.01, 0.3)
RANKED = Ranked(
    f"{FIRST}/pointers/forward", "16bit d64", "b=1 n=4096", "sm_90", "64x32 w4 s1", 1, 3, 1.5, "products", 90, 0, 16384, 5, fault=""
)
MACHINE: dict[str, Any] = {"torch": "2.13", "triton": "3.9.0", "interpreter": False, "gpus": []}
GPU = {"name": "NVIDIA H200", "capability": [9, 0], "refusal": "", "multiprocessors": 132, "memory": 2**37}


def results(**changed: Any) -> Results:
    made = Results(CATALOG, MACHINE, ["sm_80", "sm_90"], [CALL], [VERDICT], [COMPILED], [TIMING], seconds=9.0)
    return dataclasses.replace(made, **changed)


def page(given: Results) -> str:
    return markdown.page(given, datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC))


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


def poison(row: Any) -> Any:
    return dataclasses.replace(
        row, **{field.name: HOSTILE for field in dataclasses.fields(row) if isinstance(getattr(row, field.name), str)}
    )


def hostile_results() -> Results:
    """Hostile text in every field that can hold text."""
    call = dataclasses.replace(poison(CALL), tiles={HOSTILE: HOSTILE}, reasons={HOSTILE: [HOSTILE]})
    return results(
        machine={**MACHINE, HOSTILE: HOSTILE, "gpus": [{**GPU, "name": HOSTILE, "refusal": HOSTILE}]},
        explained=[call],
        verdicts=[VERDICT, poison(VERDICT)],
        compiled=[COMPILED, poison(COMPILED)],
        timings=[TIMING, poison(TIMING)],
        notes=[HOSTILE],
        faults=[HOSTILE],
        trials=[poison(TRIAL)],
        earlier=Earlier(HOSTILE, [poison(TIMING)]),
        candidates=[Candidates((RANKED, poison(dataclasses.replace(RANKED, fault="x"))), HOSTILE, HOSTILE, HOSTILE)],
    )


def test_hostile_text_stays_text_on_the_page_and_in_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = hostile_results()
    shown = folder.write(given, tmp_path).read_text(encoding="utf-8")
    text = (tmp_path / folder.MARKDOWN).read_text(encoding="utf-8")
    assert "onerror" in text
    assert "<img" not in text
    assert not re.search(r"\]\((javascript|d\))", text)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "{{ 7 &#42; 7 }}" in text
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert re.findall(r"<(?:img|a|script)\b[^>]*>", rendered) == [
        f'<img src="{plots.CHECKS}" alt="Worst error of each check as share of its bound" />',
        f'<img src="{plots.TILES}" alt="Every right tile\'s time over the fastest one\'s" />',
        f'<img src="{plots.CANDIDATES}" alt="Every candidate\'s predicted time over the least" />',
        f'<img src="{plots.TIMINGS}" alt="The peer\'s time over ours" />',
    ]
    main = shown.partition("<main>")[2].partition("</main>")[0]
    assert not re.search(r"<(?:img|script|iframe|a)\b|javascript:(?!b)", main)
    assert shown.count("<script>") == 1
    assert not re.search(r"^# title", text, re.MULTILINE)
    assert text.count("</details>") == len(re.findall("^<details", text, re.MULTILINE))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    for picture in (plots.CHECKS, plots.TIMINGS, plots.TILES, plots.CANDIDATES):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring((tmp_path / picture).read_text()).iter()}
        assert not tags & {"img", "script", "image", "foreignObject"}
    terminal.show(tables.calls(given.calls))
    assert "\x1b" not in capsys.readouterr().out


def test_the_page_holds_every_row_and_the_folder_its_data(tmp_path: Path) -> None:
    path = folder.write(results(trials=[TRIAL]), tmp_path / "new" / "folder")
    held = ("27 %", f"{FIRST}/pointers/forward", "64x32 w4 s1", "16384", "1.50×", "torch SDPA", "query is on cpu", "1 of 1")
    text, shown = (path.with_name(name).read_text(encoding="utf-8") for name in (folder.MARKDOWN, folder.PAGE))
    assert all(part in text and part in shown for part in held)
    assert text.count("![") == 3
    assert all((path.parent / picture).is_file() for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text))
    data = json.loads((path.parent / folder.DATA).read_text())
    assert rows.from_record(Verdict, data["verify"][0]) == VERDICT
    assert (data["machine"], data["targets"], data["wrong"]) == (MACHINE, ["sm_80", "sm_90"], [])


def test_the_page_is_one_file_that_trusts_nothing(tmp_path: Path) -> None:
    shown = folder.write(results(), tmp_path).read_text(encoding="utf-8")
    assert "default-src 'none'" in shown
    assert shown.count("<svg") == 2
    assert shown.count('role="img" aria-label=') == 2
    regions = re.findall(r'role="region" aria-label="([^"]*)"', shown)
    assert len(regions) == shown.count("<table>")
    assert {"1. This machine", "Coverage", "Every check"} <= set(regions)
    for element in re.findall(r"<(?:img|link|iframe|object|embed)\b", shown):
        pytest.fail(f"the page asks for {element}")
    assert set(re.findall(r'(?:href|src)="([^#"][^"]*)"', shown)) == set()
    names = re.findall(r'\bid="([^"]*)"', shown)
    assert len(names) == len(set(names))
    used = re.findall(r'(?:xlink:href="#|url\(#)([^")]*)', shown)
    assert used
    assert set(used) <= set(names)
    (style,), (script,) = (re.findall(rf"<{tag}>(.*?)</{tag}>", shown, re.DOTALL) for tag in ("style", "script"))
    for part in (style, script):
        assert base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() in shown


def label_of(figure: Any) -> str:
    return str(figure.axes[0].get_legend().get_texts()[0].get_text())


def test_times_at_lengths_are_drawn_against_length_and_bars_show_the_longest(tmp_path: Path) -> None:
    timed = [dataclasses.replace(TIMING, case=f"length {n}", milliseconds=n / 100.0, ratio=n / 512) for n in (256, 1024)]
    folder.write(results(timings=timed), tmp_path)
    text = (tmp_path / folder.MARKDOWN).read_text()
    assert plots.LENGTHS in text
    assert [row.case for row in plots._longest(timed)] == ["length 1024"]
    assert label_of(plots.lengths(timed)) == "ours"
    assert label_of(plots.lengths([dataclasses.replace(row, limit=0.62) for row in timed])) == "ours, 62 % of the limit at 1024"
    assert bench.at_length(CATALOG[FIRST], CATALOG[FIRST].workloads["cpu"][0], 64).sizes["m"] == 64


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
    folder.write(results(explained=[], verdicts=[], compiled=[], timings=[]), tmp_path)
    text = (tmp_path / folder.MARKDOWN).read_text(encoding="utf-8")
    assert "Nothing was checked." in text
    assert "All right" not in text
    assert "![" not in text
    assert not (tmp_path / plots.CHECKS).exists()


@pytest.mark.parametrize("row", CATALOG.values(), ids=lambda row: row.name)
def test_what_a_call_runs_does_not_depend_on_what_memory_held(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        made = torch.zeros_like(tensor, **options)
        return made if made.dtype == torch.bool else made.fill_(-(2**31) if not made.is_floating_point() else torch.nan)

    monkeypatch.setattr(torch, "empty_like", held)
    told = calls.here(row, row.workloads["cpu"][0], torch.float32, torch.device("cpu"))
    assert told.path in ("kernel", "portable")


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in the place of the interpreter that runs the parts: its third argument is the part's name."""

    def pretend(script: str) -> None:
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        # a sample of the kept ones would be compiled, which the interpreter under these tests refuses
        monkeypatch.setattr(candidates, "KEPT", tmp_path)

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
