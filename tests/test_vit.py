"""triton-attn vit: what was interrupted ends as what was not, and what goes wrong is said."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_attn import ArgumentError
from triton_attn.cli import main
from triton_attn.models.vision_transformer import TYPES
from triton_attn.vit import augmentation, checkpoints, training
from triton_attn.vit.settings import RECIPES, Settings, settings

pytest.importorskip("sklearn")
SMALL = Settings(epochs=2, batch_size=480, dim=16, depth=1, heads=2, dim_head=8, mlp_dim=32, dropout=0.1, hydra_branches=2)
SHORT = ["--epochs", "1", "--batch-size", "480", "--dim", "16", "--depth", "1"]


class Killed(Exception):
    pass


def dies_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """The run ends before that batch."""
    calls: list[int] = []
    augmented = augmentation.augmented

    def counts(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == batch:
            raise Killed
        return augmented(*given)

    monkeypatch.setattr(augmentation, "augmented", counts)


@pytest.mark.parametrize("kind", ["ripple", "hydra", "baseline"])
def test_interrupted_in_an_epoch_and_resumed_is_uninterrupted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(SMALL, attention_type=kind)
    whole = training.train(given, tmp_path / "whole")
    with monkeypatch.context() as patched:
        dies_at(patched, 5)  # the second epoch's second batch
        with pytest.raises(Killed):
            training.train(given, tmp_path / "parts")
    torch.manual_seed(123)
    assert training.train(given, tmp_path / "parts", resume=True) == whole
    ends = [checkpoints.load(tmp_path / name / checkpoints.LAST) for name in ("whole", "parts")]
    assert all(torch.equal(a, ends[1]["model"][name]) for name, a in ends[0]["model"].items())
    assert training.evaluate(tmp_path / "parts" / checkpoints.BEST) == max(row.accuracy for row in whole)
    logged = [json.loads(line) for line in (tmp_path / "parts" / checkpoints.LOG).read_text().splitlines()]
    assert [(row["epoch"], row["loss"], row["accuracy"]) for row in logged] == [(row.epoch, row.loss, row.accuracy) for row in whole]


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    training.train(replace(SMALL, epochs=1), tmp_path)
    with pytest.raises(ArgumentError, match=r"other settings in .*: epochs, lr;"):
        training.train(replace(SMALL, lr=0.5), tmp_path, resume=True)
    with pytest.raises(FileExistsError, match="--resume"):
        training.train(SMALL, tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in ("ripple", "hydra", "baseline")])
def test_every_other_mechanism_trains_without_options_of_its_own(kind: str, tmp_path: Path) -> None:
    (only,) = training.train(replace(SMALL, epochs=1, attention_type=kind), tmp_path)
    assert 0 < only.loss < 10
    assert training.evaluate(tmp_path / checkpoints.LAST) == only.accuracy


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    ends = [training.train(replace(SMALL, epochs=1, seed=seed), tmp_path / str(seed))[0].loss for seed in (0, 1)]
    assert ends[0] != ends[1]


@pytest.mark.parametrize("changed", [{"precision": "bfloat16"}, {"compiler": "aot_eager"}])
def test_autocast_and_compilation_train_nearly_the_same(changed: dict[str, Any], tmp_path: Path) -> None:
    given = replace(SMALL, epochs=1, dropout=0.0)
    torch.compiler.reset()
    plain, other = (training.train(one, tmp_path / str(i))[0].loss for i, one in enumerate((given, replace(given, **changed))))
    torch.compiler.reset()  # other tests compile the same model, and only so often is that allowed
    assert other == pytest.approx(plain, rel=2e-2)
    assert ("precision" in changed) == (other != pytest.approx(plain, rel=1e-5))
    names = [checkpoints.load(tmp_path / str(i) / checkpoints.LAST)["model"].keys() for i in (0, 1)]
    assert names[0] == names[1]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"config": SMALL}, tmp_path / "pickled.pt")
    torch.save({"model": {}}, tmp_path / "part.pt")
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    for name, said in (("pickled", "cannot be read .*vit convert"), ("broken", "cannot be read"), ("part", "lacks history, optimizer")):
        with pytest.raises(ArgumentError, match=said) as raised:
            checkpoints.load(tmp_path / f"{name}.pt")
        assert f"{name}.pt" in str(raised.value)


def test_flags_win_over_a_file_and_a_file_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("dataset: cifar100\nlr: 3e-4\nepochs: 7\n")
    found = settings({"epochs": 9, "dim": None}, path)
    assert (found.epochs, found.lr, found.dim, found.dataset) == (9, 3e-4, RECIPES["cifar100"]["dim"], "cifar100")
    assert settings({}) == Settings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed: 3", r"run.yaml has 'speed'; allowed: attention_type, dataset"),
        ("- 1", "run.yaml holds a list"),
        ("lr: [1]", r"lr is '\[1\]' in .*run.yaml; allowed: a number"),
        ("lr: -1", "lr is -1.0; allowed: 0 and more"),
        ("epochs: many", "epochs is 'many'"),
        ("dim: !!python/object/apply:os.getcwd []", "run.yaml is no YAML"),
        ("warm_up: 1", "warm_up is 1.0; allowed: 0 to below 1"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=said):
        settings({}, path)


def run(*given: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(["vit", *given])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--dataset", "faces"], "dataset is 'faces'; allowed: 'digits'"),
        (["--dataset", "cifar100"], "data_dir is not given"),
        (["--dataset", "tiny_imagenet", "--data-dir", "/nowhere"], "/nowhere holds no tiny-imagenet-200"),
        (["--attention-type", "whirl"], "attention_type is 'whirl'"),
        (["--epochs", "0"], "epochs is 0"),
        (["--patch-size", "3"], "patch_size is 3"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["--device", "cuda"], "device is cuda; allowed on this machine: cpu"),
        (["--resume"], "is no file"),
    ],
)
def test_commands_name_what_is_wrong(given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in given and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run("train", *given, "--output-dir", str(tmp_path)) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_commands_train_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--output-dir", str(tmp_path), *SHORT) == 0
    assert run("evaluate", "--checkpoint", str(tmp_path / "last.pt")) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1: loss ")
    assert first.endswith(second)


def test_train_has_a_flag_for_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("train", "evaluate", "compare", "sweep", "speed", "visualize", "convert"):
        assert run(command, "--help") == 0
        shown = capsys.readouterr().out
        if command == "train":
            for name in asdict(SMALL):
                assert f"--{name.replace('_', '-')}" in shown


def test_tensorboard_logs_where_it_is_installed_and_says_so_where_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--output-dir", str(tmp_path), *SHORT, "--tensorboard") == 0
    logged = list((tmp_path / "tensorboard").glob("events*")) if (tmp_path / "tensorboard").exists() else []
    said = capsys.readouterr().err
    assert bool(logged) != ("tensorboard is not installed" in said)


def test_a_checkpoint_of_other_classes_is_refused(tmp_path: Path) -> None:
    training.train(replace(SMALL, epochs=1), tmp_path)
    held = checkpoints.load(tmp_path / checkpoints.LAST)
    held["model"]["mlp_head.1.bias"] = torch.zeros(100)
    checkpoints.save(held, tmp_path / "other.pt")
    with pytest.raises(ArgumentError, match=r"dataset has 10 classes, .*other.pt has 100"):
        training.evaluate(tmp_path / "other.pt")
