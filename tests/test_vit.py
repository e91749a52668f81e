"""triton-attn vit: what was interrupted ends as what was not, and what goes wrong is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_attn import ArgumentError
from triton_attn.cli import main
from triton_attn.vit import training
from triton_attn.vit.images import digits, shifted
from triton_attn.vit.training import Settings

pytest.importorskip("sklearn")
SMALL = Settings(epochs=2, batch_size=480, dim=16, depth=1, heads=2, dim_head=8, dropout=0.1, hydra_branches=2)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["ripple", "hydra", "baseline"])
def test_interrupted_in_an_epoch_and_resumed_is_uninterrupted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, attention_type=kind)
    whole = training.train(settings, tmp_path / "whole")
    calls: list[int] = []

    def dies(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:  # the second epoch's second batch
            raise Killed
        return shifted(*given)

    with monkeypatch.context() as patched:
        patched.setattr(training, "shifted", dies)
        with pytest.raises(Killed):
            training.train(settings, tmp_path / "parts")
    torch.manual_seed(123)
    assert training.train(settings, tmp_path / "parts", resume=True) == whole
    ends = [training.load(tmp_path / name / training.LAST) for name in ("whole", "parts")]
    assert all(torch.equal(a, ends[1]["model"][name]) for name, a in ends[0]["model"].items())
    assert training.evaluate(tmp_path / "parts" / training.BEST) == max(row.accuracy for row in whole)


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    training.train(replace(SMALL, epochs=1), tmp_path)
    with pytest.raises(ArgumentError, match=r"other settings in .*: epochs, lr;"):
        training.train(replace(SMALL, lr=0.5), tmp_path, resume=True)
    with pytest.raises(FileExistsError, match="--resume"):
        training.train(SMALL, tmp_path)


def test_a_loss_that_is_no_number_stops_and_keeps_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, epochs=1)
    monkeypatch.setattr(training, "shifted", lambda images, generator: shifted(images, generator) * torch.nan)
    with pytest.raises(training.TrainingStopped, match=r"loss is nan in epoch 0, batch 0, .*no epoch was finished"):
        training.train(settings, tmp_path)
    assert not (tmp_path / training.LAST).exists()


def test_a_write_that_fails_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / training.LAST
    training.save({"a": 1}, path)

    def full(held: Any, where: Path) -> None:
        where.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        training.save({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"config": SMALL}, tmp_path / "pickled.pt")
    torch.save({"model": {}}, tmp_path / "part.pt")
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    for name, said in (("pickled", "cannot be read"), ("broken", "cannot be read"), ("part", "lacks history, optimizer")):
        with pytest.raises(ArgumentError, match=said):
            training.load(tmp_path / f"{name}.pt")


def test_shifts_move_each_image_by_one_pixel_at_the_most() -> None:
    images = digits().test[:20]
    moved = shifted(images, torch.Generator().manual_seed(0))
    for before, after in zip(images[:, 0], moved[:, 0], strict=True):
        wide = torch.nn.functional.pad(before, (1, 1, 1, 1), value=-1.0)
        assert any(torch.equal(after, wide[i : i + 8, j : j + 8]) for i in range(3) for j in range(3))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["train", "--dataset", "faces"], "dataset is 'faces'; allowed: 'digits'"),
        (["train", "--attention-type", "whirl"], "attention_type is 'whirl'"),
        (["train", "--epochs", "0"], "epochs is 0"),
        (["train", "--resume"], "is no file"),
    ],
)
def test_commands_name_what_is_wrong(given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["vit", *given, "--output-dir", str(tmp_path)])
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_commands_train_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (
        ["train", "--output-dir", str(tmp_path), "--epochs", "1", "--dim", "16", "--depth", "1"],
        ["evaluate", "--checkpoint", str(tmp_path / "last.pt")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["vit", *given])
        assert ended.value.code == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1: loss ")
    assert first.endswith(second)
