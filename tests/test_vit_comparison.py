"""vit compare, sweep, visualize and convert: what was measured, and nothing else, comes out."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triton_attn import ArgumentError
from triton_attn.cli import main
from triton_attn.models import VisionTransformer
from triton_attn.vit import checkpoints, comparison, conversion, pictures, speed, training
from triton_attn.vit.attention_maps import class_attention
from triton_attn.vit.comparison import Variant
from triton_attn.vit.images import digits
from triton_attn.vit.settings import Settings

pytest.importorskip("sklearn")
SMALL = Settings(epochs=2, batch_size=480, dim=16, depth=1, heads=2, dim_head=8, mlp_dim=32, hydra_branches=2)
SHORT = ["--epochs", "2", "--batch-size", "480", "--dim", "16", "--depth", "1", "--heads", "2", "--dim-head", "8", "--mlp-dim", "32"]


def run(*given: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(["vit", *given])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest rounds, and no process for the memory, which has a test of its own."""
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "peak", lambda *given: None)


@pytest.mark.usefixtures("quick")
def test_a_comparison_holds_what_its_runs_held_and_goes_on(tmp_path: Path) -> None:
    variants = [Variant(kind, {"attention_type": kind}) for kind in ("ripple", "baseline")]
    rows = comparison.compare(SMALL, variants, tmp_path, seeds=2)
    for row in rows:
        single = [
            training.train(replace(SMALL, attention_type=row.name, seed=seed), tmp_path / "again" / f"{row.name}{seed}") for seed in (0, 1)
        ]
        assert row.accuracies == tuple(history[-1].accuracy for history in single)
        assert row.mean == pytest.approx(statistics.mean(row.accuracies))
        assert row.spread == pytest.approx(statistics.stdev(row.accuracies))
        assert row.step_ms > 0
        assert row.parameters == sum(x.numel() for x in checkpoints.load(tmp_path / f"{row.name}-seed0" / "last.pt")["model"].values())
    held = json.loads((tmp_path / comparison.RESULT).read_text())
    assert [tuple(row["accuracies"]) for row in held["rows"]] == [row.accuracies for row in rows]
    written = (tmp_path / "ripple-seed0" / "last.pt").stat().st_mtime_ns
    (tmp_path / "baseline-seed1" / "last.pt").unlink()
    again = comparison.compare(SMALL, variants, tmp_path, seeds=2)
    assert [row.accuracies for row in again] == [row.accuracies for row in rows]
    assert (tmp_path / "ripple-seed0" / "last.pt").stat().st_mtime_ns == written  # was done
    with pytest.raises(ArgumentError, match=r"other settings in .*ripple-seed0.*: lr"):
        comparison.compare(replace(SMALL, lr=1e-4), variants, tmp_path, seeds=2)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux")
def test_the_memory_of_a_step_grows_with_the_batch() -> None:
    size, where = (16, 10, 1), torch.device("cpu")
    small, large = (speed.peak(SMALL, size, batch, where) for batch in (64, 2048))
    assert small is not None
    assert large is not None
    # at the least the activations that the backward pass reads: a dozen of (2048, 17, 16) floats
    assert large > 12 * 2048 * 17 * 16 * 4
    assert large > 4 * small


def test_speeds_are_of_calls_in_turns() -> None:
    called: list[str] = []
    times = speed.in_turns({name: lambda name=name: called.append(name) for name in "ab"}, torch.device("cpu"), seconds=0.0)  # type: ignore[misc]
    assert called == list("abbaabba")
    assert [len(x) for x in times.values()] == [3, 3]


@pytest.mark.usefixtures("quick")
def test_compare_and_sweep_and_visualize_run_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared, swept, drawn = (tmp_path / name for name in ("compared", "swept", "drawn"))
    types = ["--attention-type", "hydra", "--attention-type", "baseline"]
    assert run("compare", "--output-dir", str(compared), *types, "--seeds", "1", *SHORT) == 0
    shown = capsys.readouterr().out
    assert "one seed" in shown
    assert "not measured" in shown
    assert "hydra" in shown
    values = ["--value", "1", "--value", "2"]
    assert run("sweep", "--over", "hydra-branches", *values, "--output-dir", str(swept), "--seeds", "1", "--json", *SHORT) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["hydra-branches 1", "hydra-branches 2"]
    assert rows[0]["parameters"] < rows[1]["parameters"]
    held = [checkpoints.load(swept / f"hydra_branches_{n}-seed0" / "last.pt")["settings"] for n in (1, 2)]
    assert [(one["attention_type"], one["hydra_branches"]) for one in held] == [("hydra", 1), ("hydra", 2)]
    sizes = ["--side", "16", "--side", "8", "--json"]
    assert run("speed", "--output-dir", str(compared), *types, *sizes, *SHORT) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    timed = json.loads((compared / comparison.SPEEDS).read_text())["rows"]
    assert printed == timed
    assert {(row["what"], row["tokens"], row["direction"]) for row in timed} == {
        (kind, tokens, direction) for kind in ("hydra", "baseline") for tokens in (17, 5) for direction in ("forward", "training")
    }
    assert run("visualize", "--output-dir", str(drawn), "--run", str(compared), "--maps", "2") == 0
    names = {path.name for path in drawn.iterdir()}
    assert names == {f"{name}{suffix}" for name in ("curves", "accuracy", "speed", "attention") for suffix in (".png", ".svg")}
    assert all((drawn / name).read_bytes()[:4] in (b"\x89PNG", b"<?xm") for name in names)
    assert run("sweep", "--over", "lr", "--value", "1", "--output-dir", str(swept)) == 2
    assert "over is 'lr'; allowed: ripple_stages" in " ".join(capsys.readouterr().err.split())


def test_pictures_show_the_logged_numbers(tmp_path: Path) -> None:
    log = [{"epoch": 0.0, "loss": 2.5, "accuracy": 0.25}, {"epoch": 1.0, "loss": 1.25, "accuracy": 0.75}]
    figure = pictures.curves({"ripple-seed0": log, "ripple-seed1": log, "hydra-seed0": log})
    loss, right = figure.axes
    assert [np.asarray(line.get_ydata()).tolist() for line in loss.lines] == [[2.5, 1.25]] * 3
    assert [np.asarray(line.get_ydata()).tolist() for line in right.lines] == [[25.0, 75.0]] * 3
    assert [line.get_color() for line in loss.lines[:2]] == [loss.lines[0].get_color()] * 2
    legend = loss.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["ripple", "hydra"]
    rows = [{"what": "ripple", "tokens": n, "direction": "forward", "ms": 2.0 * n, "batch": 2} for n in (64, 16)]
    (axes,) = pictures.speed_against_tokens(rows).axes
    assert axes.xaxis.get_major_formatter()(1024.0) == "1024"
    assert (np.asarray(axes.lines[0].get_xdata()).tolist(), np.asarray(axes.lines[0].get_ydata()).tolist()) == ([16, 64], [16.0, 64.0])


def test_logs_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing was logged in"):
        pictures.draw([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="is no folder"):
        pictures.draw([tmp_path / "none"], tmp_path / "out")
    (tmp_path / "log.jsonl").write_text('{"epoch": 0, "loss": 1, "accuracy": 0}\n{"epoch"\n')
    with pytest.raises(ArgumentError, match=r"log.jsonl, whose line 2 is no epoch"):
        pictures.draw([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("kind", ["baseline", "linear_attention", "ripple", "hydra"])
def test_attention_maps_are_shares_of_patches(kind: str) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 10, 24, 2, 3, 32, kind, 0.0, 0.0, 8, 1, 2, channels=1).eval()
    images = torch.randn(3, 1, 16, 16)
    before = model(images)
    maps = class_attention(model, images)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)  # and no hook is left
    assert model.cls_token.grad is None
    assert maps.shape == (3, 4, 4)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(3))
    if kind == "ripple":  # one weight for the four patches of a cell
        torch.testing.assert_close(maps, maps[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2))
    if kind == "baseline":
        x = model.dropout(torch.cat((model.cls_token.expand(3, -1, -1), model.to_patch_embedding(images)), 1) + model.pos_embedding)
        block: Any = model.transformer[1]
        q, k, _ = (block.attn.split(part) for part in block.attn.to_qkv(block.norm1(model.transformer[0](x))).chunk(3, -1))
        weights = (q[:, :, :1] @ k.transpose(-1, -2) / 8**0.5).softmax(-1)[:, :, 0, 1:]
        torch.testing.assert_close(maps.flatten(1), (weights / weights.sum(-1, keepdim=True)).mean(1), rtol=1e-4, atol=1e-6)


@dataclass
class Config:
    """As Linear-ViT pickles one into its checkpoints."""

    dim: int = 24
    made: str = ""


@pytest.mark.parametrize("kind", ["baseline", "ripple", "hydra"])
def test_a_checkpoint_of_the_original_is_converted_without_its_class(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    options = {"variant": "v1"} if kind == "ripple" else {}
    model = VisionTransformer(16, 4, 10, 24, 2, 3, 40, kind, 0.0, 0.0, 8, 2, 3, attention_options=options, channels=1).eval()
    old = {"epoch": 3, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "best_acc": 12.5, "config": Config()}
    torch.save(old, tmp_path / "old.pth")
    heads = ["--heads", "3"] if kind == "baseline" else []
    given = ["--checkpoint", str(tmp_path / "old.pth"), "--output", str(tmp_path / "new.pt"), "--dataset", "digits"]
    assert run("convert", *given, *heads) == 0
    assert f"{kind}, width 24, 2 blocks, 3 heads" in capsys.readouterr().out
    _, read, images = training.restored(tmp_path / "new.pt")
    with torch.no_grad():
        torch.testing.assert_close(read(images.ready(images.test[:5])), model(images.ready(images.test[:5])), rtol=0, atol=0)
    assert run("evaluate", "--checkpoint", str(tmp_path / "new.pt")) == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "new.pt").rename(tmp_path / "run" / "last.pt")
    with pytest.raises(ArgumentError, match="which was converted"):
        training.train(Settings(**checkpoints.load(tmp_path / "run" / "last.pt")["settings"]), tmp_path / "run", resume=True)


class Runs:
    """What a wicked checkpoint does when it is unpickled."""

    def __init__(self, call: Any, *given: Any) -> None:
        self.call, self.given = call, given

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.given


def test_nothing_that_a_checkpoint_names_is_run(tmp_path: Path) -> None:
    state = VisionTransformer(16, 4, 10, 24, 1, 3, 40, "baseline", channels=1).state_dict()
    old = {"model_state_dict": state, "config": Runs(shutil.copyfile, str(Path(__file__)), str(tmp_path / "made"))}
    torch.save(old, tmp_path / "old.pth")
    found = conversion.tensors(tmp_path / "old.pth")
    assert all(torch.equal(found[name], x) for name, x in state.items())
    torch.save({**old, "config": Runs(os.mkdir, str(tmp_path / "made"))}, tmp_path / "system.pth")  # of a module that torch never reads
    with pytest.raises(ArgumentError, match=r"system.pth cannot be read beside what it names, (posix|nt).mkdir"):
        conversion.tensors(tmp_path / "system.pth")
    assert not (tmp_path / "made").exists()


def test_what_is_no_checkpoint_of_the_original_is_named(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save({"weights": 1}, tmp_path / "none.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK")
    for name, said in (("other", "fits no model"), ("none", "has no tensors under"), ("broken", "cannot be read")):
        with pytest.raises(ArgumentError, match=rf"{name}.pth {said}"):
            conversion.convert(tmp_path / f"{name}.pth", tmp_path / "new.pt", "digits")
    assert not (tmp_path / "new.pt").exists()
    assert digits().classes == 10
