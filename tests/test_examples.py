"""The examples do what they say, shortened."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import triton_attn
from triton_attn import nn

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mechanism_and_module_has_a_call_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    assert example("attention_examples").main([]) == 0
    shown = {re.split(r"[, ]", line)[0] for line in capsys.readouterr().out.splitlines()}
    assert triton_attn.CATALOG.keys() <= shown
    assert {f"nn.{name}" for name in nn.__all__ if isinstance(getattr(nn, name), type)} <= shown


def test_the_text_example_learns_and_writes_what_it_reads(capsys: pytest.CaptureFixture[str]) -> None:
    text = example("mamba_text")
    small = ["--minutes", "0.03", "--length", "64", "--batch", "2", "--test", "2", "--files", "12", "--generate", "5", "--threads", "1"]
    assert text.main(small) == 0  # not 0 where steps and the parallel form part
    shown = capsys.readouterr().out
    sizes = [int(size) for size in re.findall(r"^\| \w+ \| (\d+) \| [1-9]\d* \| [\d.]+ \|$", shown, re.MULTILINE)]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)  # beside each other only if of equal size


@pytest.mark.filterwarnings("ignore::DeprecationWarning:sklearn")
def test_the_video_example_learns_and_says_how_well(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    video = example("hierarchical_video")
    assert video.main(["--steps", "2", "--batch", "4", "--test", "8"]) == 0
    rows = re.findall(r"^\| (\w+) \| [\d.]+ % \| [\d.]+ \|$", capsys.readouterr().out, re.MULTILINE)
    assert rows == list(video.STACKS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:sklearn")
@pytest.mark.parametrize("stack", ["dense", "strided", "local_global", "streamed"])
def test_the_video_example_learns_well_above_chance(stack: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert example("hierarchical_video").main(["--steps", "800", "--test", "400", "--mechanisms", stack]) == 0
    (right,) = re.findall(rf"^\| {stack} \| ([\d.]+) % ", capsys.readouterr().out, re.MULTILINE)
    assert float(right) > 70  # chance is 25


def test_the_clips_pan_by_one_patch_a_frame_the_way_they_say() -> None:
    pytest.importorskip("sklearn")
    video = example("hierarchical_video")
    patches, ways = video.Clips().draw(64, train=True)
    across = video.SIDE // video.PATCH
    grid = patches.view(64, video.FRAMES, across, across, -1)
    for clip, way in zip(grid, ways.tolist(), strict=True):
        rows, columns = list(video.WAYS.values())[way]
        inner = [slice(max(0, step), across + min(0, step)) for step in (rows, columns)]
        moved = clip[1:].roll((rows, columns), (1, 2))[:, inner[0], inner[1]]
        torch.testing.assert_close(moved, clip[:-1][:, inner[0], inner[1]])


def test_memory_grows_with_the_tokens_and_less_where_fewer_keys_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert example("hierarchical_video").main(["--memory", "--tokens", "256", "512"]) == 0
    lines = re.findall(r"^\| (\w+) \| ([\d.]+) MiB \| ([\d.]+) MiB \|$", capsys.readouterr().out, re.MULTILINE)
    kept = {name: (float(small), float(large)) for name, small, large in lines}
    assert kept.keys() == {"dense", "strided", "local_global", "cross_memory"}
    assert kept["strided"] < kept["dense"]
    for small, large in kept.values():
        assert small < large < 2.1 * small


def test_the_blocks_example_prints_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("openclip_blocks").main(["--tokens", "9", "--rounds", "1", "--width", "16", "--heads", "2", "--backward"]) == 0
    rows = re.findall(r"^\| (\w+) \| [\d.]+ \| [\d.]+ \| not measured \| [\d,]+ \| N", capsys.readouterr().out, re.MULTILINE)
    assert rows == ["standard", "parallel", "linear", "deepnorm", "sparse", "subln"]


def test_the_blocks_example_counts_memory(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert example("openclip_blocks").main(["--memory", "0.002", "--towers", "tiny", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "tiny, 17 tokens, width 32, 2 blocks, float32, AdamW" in said
    rows = dict(re.findall(r"^\| (\w+) \| [\d.]+ MB \| (\d+) \|$", said, re.MULTILINE))
    assert list(rows) == ["standard", "parallel", "linear", "deepnorm", "sparse", "subln"]
    assert int(rows["parallel"]) > int(rows["standard"]) > int(rows["subln"]) > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:sklearn")
def test_the_digits_example_trains_every_type_and_says_how_well(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    types = ["hydra", "baseline"]
    assert example("digits_vit").main(["--types", *types, "--epochs", "4", "--seeds", "1"]) == 0
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) % \| 0.0 \| [\d.]+ \| [\d,]+ \|$", capsys.readouterr().out, re.MULTILINE)
    assert [kind for kind, _ in rows] == types
    assert min(float(right) for _, right in rows) > 20  # four epochs; chance is 10


def test_the_long_net_example_trains_both_and_writes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--minutes", "0.03", "--length", "64", "--batch", "2", "--test", "2", "--generate", "3"]
    assert example("longnet_text").main(arguments) == 0
    rows = re.findall(r"^\| (\w+) \| [\d,]+ \| \d+ \| \d+ \| ([\d.]+) \| ([\d.]+) \|$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["dilated", "dense"]
    assert all(float(after) < float(before) for _, before, after in rows)


def test_the_linear_text_example_trains_each_and_writes_what_it_reads(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "3", "--tokens", "32", "--batch", "2", "--lengths", "16", "64"]
    assert example("linear_text").main(arguments) == 0
    shown = capsys.readouterr().out
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| [\d.]+ \| \d+ \| \d+ \|$", shown, re.MULTILINE)
    assert [kind for kind, _ in rows] == ["linear", "performer", "dense"]
    assert len({size for _, size in rows}) == 1
    (apart,) = re.findall(r"differ by ([\d.e+-]+) at most", shown)
    assert float(apart) < 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning:sklearn")
def test_the_defects_example_finds_more_than_before_and_draws_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for needed in ("sklearn", "transformers", "matplotlib"):
        pytest.importorskip(needed)
    small = ["--each", "3", "--side", "32", "--text-epochs", "2", "--image-epochs", "10"]
    assert example("clip_defects").main([*small, "--output-dir", str(tmp_path)]) == 0
    rows = re.findall(r"^\| (with|without) \| (no|yes) \| ([\d.]+) \|", capsys.readouterr().out, re.MULTILINE)
    assert [row[:2] for row in rows] == [("with", "no"), ("with", "yes"), ("without", "no"), ("without", "yes")]
    before, after = ([float(score) for _, trained, score in rows if trained == kind] for kind in ("no", "yes"))
    assert min(after) > max(0.75, *before)
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("heat_map.png", "words.png"))
