"""Runs of train-clip-adapter that cannot end well: said before they begin, by name, and nothing good is written over."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_clip_training import SIDE, data, small
from triton_attn import ArgumentError
from triton_attn.arguments import ArgumentTypeError
from triton_attn.cli import main
from triton_attn.clip import checkpoints, training
from triton_attn.clip.checkpoints import FILES

__all__ = ["data"]


def said_by(flags: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as ended:
        main(["train-clip-adapter", *flags])
    return ended.value.code, " ".join(capsys.readouterr().err.replace("│", " ").split())


def other_class(data: Path, root: Path) -> Path:
    shutil.copytree(data / "flower", root / "screw")
    return root


# what is scored at the end


def test_classes_that_are_scored_alone_have_sentences_too(data: Path, tmp_path: Path) -> None:
    run = training.build(small(data, test_data=str(other_class(data, tmp_path))))
    assert set(run.tokens) == {"flower", "temple", "screw"}
    assert {sample.class_name for sample in run.tests} == {"screw"}
    assert 0.0 <= run.score(run.tests).pixel_auroc <= 1.0
    with pytest.raises(ArgumentError, match="class_names has 'pill', of which there are no sentences; allowed: flower"):
        run.score([replace(run.tests[0], class_name="pill")])
    with pytest.raises(ArgumentError, match="data has no images"):
        run.score([])


def test_a_folder_that_cannot_be_scored_is_said_before_training(data: Path, tmp_path: Path) -> None:
    def train(root: Path, **how: Any) -> None:
        training.train(small(data, test_data=str(root), **how), tmp_path / "run")

    (tmp_path / "empty").mkdir()
    whole = other_class(data, tmp_path / "whole")
    for kind in ("scratch", "stain"):
        shutil.rmtree(whole / "screw" / "test" / kind)
    for root, said in (("nowhere", "is no folder"), ("empty", "holds no folder with test"), ("whole", "has 1 images, none damaged")):
        with pytest.raises(ArgumentError, match=f"{tmp_path / root} {said}"):
            train(tmp_path / root)
    assert not (tmp_path / "run").exists()


# stages that stand on each other


def test_stage_1_does_not_go_on_under_stage_2(data: Path, tmp_path: Path) -> None:
    settings = small(data, text_epochs=1, image_epochs=1)
    training.train(settings, tmp_path)
    kept = [(tmp_path / name).read_bytes() for name in FILES.values()]
    for how in ({}, {"stages": "text"}):
        with pytest.raises(ArgumentError, match=rf"text_epochs is 2, but .* 1 of stage 1 .*; allowed: 1, or remove {FILES['image']}"):
            training.train(replace(settings, text_epochs=2, **how), tmp_path, resume=True)  # type: ignore[arg-type]
    assert [(tmp_path / name).read_bytes() for name in FILES.values()] == kept
    training.train(replace(settings, image_epochs=2), tmp_path, resume=True)


def test_stage_2_alone_takes_no_stage_1_of_other_settings(data: Path, tmp_path: Path) -> None:
    training.train(small(data, stages="text", text_epochs=1), tmp_path)
    with pytest.raises(ArgumentError, match=re.escape(f"finds other settings in {tmp_path / FILES['text']}: seed; allowed")):
        training.train(small(data, stages="image", seed=3), tmp_path)
    # of stage 1, or of stage 2, alone
    run = training.train(small(data, stages="image", text_lr=0.5, image_cross_attention=True, image_epochs=0), tmp_path)
    assert run.model.expects_context


@pytest.mark.parametrize("crossed", [True, False])
def test_checkpoints_with_another_image_cross_attention_are_named(crossed: bool, data: Path, tmp_path: Path) -> None:
    settings = small(data, text_epochs=0, image_epochs=1, image_cross_attention=crossed)
    training.train(settings, tmp_path)
    path = tmp_path / FILES["image"]
    held = torch.load(path, weights_only=True)
    torch.save({name: x for name, x in held.items() if name not in ("settings", "random", "losses")}, path)  # as the original's
    with pytest.raises(ArgumentError, match=rf"image_cross_attention is {not crossed}, but .*image_cross_attn; allowed: {crossed}"):
        training.train(replace(settings, image_cross_attention=not crossed, image_epochs=2), tmp_path, resume=True)


# files


def test_an_error_of_a_file_is_the_same_from_a_worker(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    for path in root.glob("flower/test/*/*.png"):
        path.write_bytes(b"no image")
    flags = ["--data", str(root), "--image-size", str(SIDE), "--text-batch", "1", "--text-epochs", "1"]
    here, there = (said_by([*flags, "--workers", count, "--output-dir", str(tmp_path / count)], capsys) for count in ("0", "1"))
    assert here == there
    assert here[0] == 2
    assert "is no image that can be read" in here[1]


@pytest.mark.parametrize("kind", [ArgumentError, ArgumentTypeError])
def test_errors_of_arguments_are_rebuilt_as_they_were(kind: type[ArgumentError]) -> None:
    error = kind("call", "data", "is missing")
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (str(again), again.argument) == ("call: data is missing", "data")


def test_weights_that_are_no_numbers_are_not_written(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(data, text_epochs=1, image_epochs=0, text_batch=6)
    training.train(settings, tmp_path)
    path = tmp_path / FILES["text"]
    kept = path.read_bytes()
    real = torch.optim.Adam.step

    def spoils(self: Any, *given: Any) -> Any:
        out = real(self, *given)
        self.param_groups[0]["params"][0].data[0, 0] = float("inf")
        return out

    monkeypatch.setattr(torch.optim.Adam, "step", spoils)
    said = rf"text_adapter.0.fc.0.weight is not finite after stage text, epoch 1, with lr 0.001; {re.escape(str(path))} holds the epoch"
    with pytest.raises(training.TrainingStopped, match=said):
        training.train(replace(settings, text_epochs=2), tmp_path, resume=True)
    assert path.read_bytes() == kept


CORRUPT: dict[str, Callable[[dict[str, Any]], None]] = {
    "epoch": lambda held: held.update(epoch="1"),
    "losses": lambda held: held.update(losses=3),
    "random": lambda held: held.update(random=[1]),
    "settings": lambda held: held.update(settings={"cross_attention": "on"}),
    "text_optimizer": lambda held: held.update(text_optimizer=[1]),
    "text_adapter": lambda held: held.update(text_adapter=[1]),
    "text_cross_attn": lambda held: held.update(text_cross_attn={"q_proj.weight": 1}),
    "text_optimizer of fewer": lambda held: held["text_optimizer"]["param_groups"][0]["params"].pop(),
    "text_optimizer whose exp_avg": lambda held: held["text_optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "text_optimizer without": lambda held: held["text_optimizer"]["state"][0].pop("exp_avg"),
    "random that is no": lambda held: held["random"].update(cpu=torch.zeros(3, dtype=torch.uint8)),
}


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    training.train(small(data, text_epochs=1, image_epochs=0), folder)
    return folder / FILES["text"]


@pytest.mark.parametrize("entry", CORRUPT)
def test_an_entry_of_a_wrong_kind_is_named(entry: str, trained: Path, data: Path, tmp_path: Path) -> None:
    held = checkpoints.load(trained, "text")
    CORRUPT[entry](held)
    path = tmp_path / FILES["text"]
    torch.save(held, path)
    with pytest.raises(ArgumentError, match=rf"checkpoint {re.escape(str(path))} holds {entry.split(' ')[0]} "):
        training.train(small(data, text_epochs=2, image_epochs=0), tmp_path, resume=True)


# settings


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "cud"], "device is 'cud', which torch does not have here"),
        (["--device", "cuda:99"], "device is 'cuda:99', which torch does not have here"),
        (["--seed", str(2**64)], f"seed is {2**64}; allowed: a whole number, 0 to {2**32 - 1}"),
    ],
    ids=["device", "number", "seed"],
)
def test_a_wrong_flag_is_named(flags: list[str], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = said_by(["--data", str(data), *flags, "--output-dir", str(tmp_path / "run")], capsys)
    assert code == 2
    assert said in found
