"""Training against what happens to it: kill -9, a full disk, a loss that is no number; and two processes in one's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_attn import ArgumentError
from triton_attn.vit import augmentation, checkpoints, training
from triton_attn.vit.images import Images
from triton_attn.vit.settings import Settings

pytest.importorskip("sklearn")
SMALL = Settings(epochs=3, batch_size=24, dim=16, depth=1, heads=2, dim_head=8, mlp_dim=32, dropout=0.1)


def command(given: Settings, folder: Path, *more: str) -> list[str]:
    flags = [text for name, value in asdict(given).items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["triton_attn", "vit", "train", "--output-dir", str(folder), *flags, *more]


def alone(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-m", *arguments], env=environment, text=True, stdout=subprocess.PIPE, **options)


def equal(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same parameters and the same log, times apart."""
    one, other = (checkpoints.load(path / checkpoints.LAST) for path in (a, b))
    same = all(torch.equal(x, other["model"][name]) for name, x in one["model"].items())
    histories = [[(row["epoch"], row["loss"], row["accuracy"]) for row in held["history"]] for held in (one, other)]
    return same and histories[0] == histories[1]


def test_killed_in_the_middle_of_an_epoch_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    with alone(command(SMALL, tmp_path / "killed")) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("epoch 1: ")
        time.sleep(0.05)  # an epoch takes a multiple of that: 60 steps
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = len(checkpoints.load(tmp_path / "killed" / checkpoints.LAST)["history"])
    assert 1 <= done < SMALL.epochs
    torch.manual_seed(99)
    training.train(SMALL, tmp_path / "killed", resume=True)
    training.train(SMALL, tmp_path / "whole")
    assert equal(tmp_path / "killed", tmp_path / "whole")


def test_a_partial_file_of_a_killed_process_is_in_nobody_s_way(tmp_path: Path) -> None:
    given = replace(SMALL, epochs=1, batch_size=480)
    tmp_path.joinpath("last.pt.partial").write_bytes(b"half a checkpoint")
    training.train(given, tmp_path)
    assert len(training.train(given, tmp_path, resume=True)) == 1
    assert not tmp_path.joinpath("last.pt.partial").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
@pytest.mark.parametrize("file", [checkpoints.LAST, checkpoints.BEST, checkpoints.LOG])
def test_a_full_disk_leaves_the_checkpoint_and_says_so(file: str, tmp_path: Path) -> None:
    given = replace(SMALL, epochs=2, batch_size=16, lr=5e-3, dropout=0.0)
    whole = training.train(given, tmp_path / "whole")
    folder = tmp_path / "full"

    def fill(epoch: training.Epoch) -> None:
        if epoch.epoch == 0:
            (folder / f"{file}.partial").symlink_to("/dev/full")

    assert whole[1].accuracy > whole[0].accuracy  # or best.pt is not written again
    with pytest.raises(OSError, match=r"cannot be written: .*is as it was") as raised:
        training.train(given, folder, report=fill)
    assert raised.value.filename == str(folder / file)
    before = checkpoints.load(folder / checkpoints.LAST)
    assert len(before["history"]) == (2 if file == checkpoints.LOG else 1)
    assert training.train(given, folder, resume=True) == whole
    assert equal(folder, tmp_path / "whole")


def test_a_loss_that_is_no_number_stops_and_keeps_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(SMALL, epochs=2, batch_size=480, dropout=0.0)
    whole = training.train(given, tmp_path / "whole")
    calls: list[int] = []
    ready = Images.ready

    def poisoned(images: Any, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        return ready(images, *arguments) * (
            torch.nan if len(calls) == 7 else 1
        )  # three batches, two of the test, and the second of the next

    with monkeypatch.context() as patched:
        patched.setattr(Images, "ready", poisoned)
        with pytest.raises(
            training.TrainingStopped, match=r"loss is nan in epoch 1, batch 1, with lr 0.002; .*last.pt holds the epoch before"
        ):
            training.train(given, tmp_path / "stopped")
    assert training.train(given, tmp_path / "stopped", resume=True) == whole
    assert equal(tmp_path / "stopped", tmp_path / "whole")
    monkeypatch.setattr(augmentation, "augmented", lambda images, *rest: images.float() * torch.nan)
    with pytest.raises(training.TrainingStopped, match=r"loss is nan in epoch 0, batch 0, .*no epoch was finished"):
        training.train(given, tmp_path / "never")
    assert not (tmp_path / "never" / checkpoints.LAST).exists()


def test_a_gradient_that_is_no_number_never_reaches_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(SMALL, epochs=2, batch_size=480)
    clip = torch.nn.utils.clip_grad_norm_
    calls: list[int] = []

    def spoilt(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return clip(*arguments) + (torch.inf if len(calls) == 6 else 0)  # the last batch of the second epoch

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.utils, "clip_grad_norm_", spoilt)
        with pytest.raises(training.TrainingStopped, match=r"gradient's norm is inf in epoch 1, batch 2"):
            training.train(given, tmp_path / "stopped")
    training.train(given, tmp_path / "stopped", resume=True)
    training.train(given, tmp_path / "whole")
    assert equal(tmp_path / "stopped", tmp_path / "whole")


def test_a_learning_rate_that_is_too_high_ends_with_a_message_not_with_a_trace(tmp_path: Path) -> None:
    given = replace(SMALL, epochs=2, batch_size=480, lr=1e30, warm_up=0.0)
    process = alone(command(given, tmp_path), stderr=subprocess.PIPE)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "triton-attn: the loss is nan in epoch 0" in said
    assert "Traceback" not in said


def test_two_processes_train_as_one_would(tmp_path: Path) -> None:
    given = replace(SMALL, epochs=2, batch_size=95, dropout=0.0, attention_type="baseline")  # odd parts, and a short last batch
    together = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    process = alone([*together, *command(given, tmp_path / "two")], stderr=subprocess.PIPE)
    shown, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert [line.split(":")[0] for line in shown.splitlines()] == ["epoch 1", "epoch 2"]  # one of them speaks
    whole = training.train(given, tmp_path / "one")
    held = checkpoints.load(tmp_path / "two" / checkpoints.LAST)
    assert len(held["random"]) == 2
    assert [row["loss"] for row in held["history"]] == pytest.approx([row.loss for row in whole], rel=1e-3)
    assert [row["accuracy"] for row in held["history"]] == pytest.approx([row.accuracy for row in whole], abs=0.02)
    with pytest.raises(ArgumentError, match=r"finds 2 processes in .*and there are 1"):
        training.train(given, tmp_path / "two", resume=True)


DIES = """
import os, sys
from triton_attn.cli import main
from triton_attn.vit import training

keep = training.Run.keep
training.Run.keep = lambda run: os._exit(1) if len(run.history) == 2 else keep(run)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_that_died_go_on_as_if_they_had_not(tmp_path: Path) -> None:
    given = replace(SMALL, epochs=2, batch_size=96)  # with dropout, which each process draws for itself
    together = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    _, *asked = command(given, tmp_path / "parts")
    for arguments, ends in (
        ([*together, str(script), *asked], 1),
        ([*together, "-m", *command(given, tmp_path / "parts", "--resume")], 0),
        ([*together, "-m", *command(given, tmp_path / "whole")], 0),
    ):
        process = alone(arguments, stderr=subprocess.PIPE)
        _, said = process.communicate(timeout=240)
        assert process.returncode == ends, said
    assert equal(tmp_path / "parts", tmp_path / "whole")
