"""triton-attn train-clip-adapter: what was killed ends as what was not, and what goes wrong is said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_attn import ArgumentError
from triton_attn.cli import main
from triton_attn.clip import checkpoints, sources, training
from triton_attn.clip.checkpoints import FILES
from triton_attn.clip.drawn import draw
from triton_attn.clip.settings import Settings, read

for _needed in ("sklearn", "transformers", "PIL", "yaml"):
    pytest.importorskip(_needed)
SIDE = 32
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "mvtec", each=1, side=SIDE)


def small(data: Path, **how: Any) -> Settings:
    given: dict[str, Any] = {"text_epochs": 2, "image_epochs": 2, "text_batch": 4, "image_batch": 4, "text_lr": 1e-3, "image_size": SIDE}
    return Settings(**{"data": str(data), **given, **how})


class Killed(Exception):
    pass


def same(a: Path, b: Path) -> bool:
    ends = [{name: torch.load(folder / name, weights_only=True) for name in FILES.values()} for folder in (a, b)]
    return all(
        torch.equal(x, ends[1][file][part][name])
        for file, held in ends[0].items()
        for part in ("text_adapter", "text_cross_attn", "image_adapter", "image_cross_attn")
        if part in held
        for name, x in held[part].items()
    )


@pytest.mark.parametrize("crossed", [True, False])
def test_interrupted_in_either_stage_and_resumed_is_uninterrupted(
    crossed: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(data, context_dropout=0.5, cross_attention=crossed, image_cross_attention=crossed)
    whole = training.train(settings, tmp_path / "whole")
    for step in ("text_step", "image_step"):
        real: Any = getattr(training, step)
        calls: list[int] = []

        def dies(*given: Any, real: Any = real, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 3:  # the second epoch's first batch
                raise Killed
            return real(*given)

        with monkeypatch.context() as patched:
            patched.setattr(training, step, dies)
            with pytest.raises(Killed):
                training.train(settings, tmp_path / "parts", resume=step == "image_step")
        torch.manual_seed(123)
    parts = training.train(settings, tmp_path / "parts", resume=True)
    assert parts.losses == whole.losses
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "parts" / training.LOSSES).stat().st_size > 1000


@pytest.mark.slow
def test_a_process_killed_at_any_moment_resumes(data: Path, tmp_path: Path) -> None:
    flags = ["--data", str(data), "--image-size", str(SIDE), "--text-epochs", "3", "--image-epochs", "3", "--text-batch", "2"]
    command = [sys.executable, "-m", "triton_attn", "train-clip-adapter", *flags, "--output-dir"]
    there = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, cwd=ROOT, env=there, capture_output=True)
    parts, resume, kills = tmp_path / "parts", False, 0
    for waits in (0.05, 0.4, 0.8, 0.2):
        before = sum(path.stat().st_mtime for path in parts.glob("*.pth"))
        running = subprocess.Popen([*command, str(parts), *(["--resume"] if resume else [])], cwd=ROOT, env=there, stderr=subprocess.PIPE)
        while running.poll() is None and sum(path.stat().st_mtime for path in parts.glob("*.pth")) == before:
            time.sleep(0.01)
        time.sleep(waits)
        running.send_signal(signal.SIGKILL)
        kills += running.wait() == -signal.SIGKILL
        running.communicate()
        resume = True
    assert kills >= 2
    subprocess.run([*command, str(parts), "--resume"], check=True, cwd=ROOT, env=there, capture_output=True)
    assert same(tmp_path / "whole", parts)


def test_checkpoints_are_the_original_s_and_the_original_s_load(data: Path, tmp_path: Path) -> None:
    settings = small(data, text_epochs=1, image_epochs=1, image_cross_attention=True)
    run = training.train(settings, tmp_path)
    text, image = (torch.load(tmp_path / FILES[stage], weights_only=True) for stage in ("text", "image"))
    assert {"epoch", "text_adapter", "text_cross_attn", "text_optimizer"} <= set(text)
    assert {"epoch", "image_adapter", "image_cross_attn", "image_optimizer"} <= set(image)
    assert set(text["text_cross_attn"]) == {f"{name}_proj.{part}" for name in ("q", "k", "v", "out") for part in ("weight", "bias")}
    assert {"0.fc.0.weight", "1.fc.0.weight"} == set(text["text_adapter"])
    for extra in ("settings", "random", "losses"):  # what the original does not write
        del text[extra]
    torch.save(text, tmp_path / FILES["text"])
    (tmp_path / FILES["image"]).unlink()
    again = training.train(replace(settings, text_epochs=2), tmp_path, resume=True)
    assert len(again.losses["text"]) == 1
    assert again.model.text_adapter[0].fc[0].weight.ne(run.model.text_adapter[0].fc[0].weight).any()  # type: ignore[index,union-attr]
    checkpoints.restore(again.model, text, "text", tmp_path / FILES["text"])
    assert again.model.expects_context  # the original has always had one


def test_both_stages_learn_and_the_clip_stays_as_it_was(data: Path, tmp_path: Path) -> None:
    settings = small(data, text_epochs=8, image_epochs=8, cross_attn_dropout=0.0, context_dropout=0.0, image_lr=2e-3)
    before = {name: x.clone() for name, x in training.build(settings).model.clipmodel.state_dict().items()}
    run = training.train(settings, tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in run.model.clipmodel.state_dict().items())
    for values in run.losses.values():
        assert values[-1] < 0.9 * values[0]
    assert run.model.expects_context
    with pytest.warns(UserWarning, match="trained beside an image's context"):
        run.model.encode_text(run.tokens["flower"][0])
    assert run.score().pixel_auroc > training.build(settings).score().pixel_auroc


def test_stage_2_alone_stands_on_stage_1(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / FILES['text']} is no file")):
        training.train(small(data, stages="image"), tmp_path)
    training.train(small(data, stages="text"), tmp_path)
    training.train(small(data, stages="image"), tmp_path)
    training.train(small(data), tmp_path / "both")
    assert same(tmp_path, tmp_path / "both")


def test_resuming_with_other_settings_is_refused(data: Path, tmp_path: Path) -> None:
    settings = small(data, text_epochs=1, image_epochs=0)
    training.train(settings, tmp_path)
    with pytest.raises(ArgumentError, match=re.escape(f"finds other settings in {tmp_path / FILES['text']}: text_lr, seed")):
        training.train(replace(settings, seed=3, text_lr=0.5), tmp_path, resume=True)
    training.train(replace(settings, image_lr=0.5), tmp_path, resume=True)  # of the stage that has not begun
    with pytest.raises(FileExistsError, match="--resume"):
        training.train(settings, tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing to go on from"):
        training.train(settings, tmp_path / "nowhere", resume=True)


def test_a_loss_that_is_no_number_stops_and_keeps_what_was(data: Path, tmp_path: Path) -> None:
    settings = small(data, text_lr=1e30, cross_attn_dropout=0.0, text_epochs=30)
    with pytest.raises(training.TrainingStopped, match=r"loss is nan in stage text, epoch \d+, batch \d+, with lr 1e\+30; "):
        training.train(settings, tmp_path)


def test_a_write_that_fails_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / FILES["text"]
    checkpoints.save({"a": 1}, path)

    def full(held: Any, where: Path) -> None:
        where.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_foreign_files_are_refused_by_name(data: Path, tmp_path: Path) -> None:
    torch.save({"settings": small(data)}, tmp_path / "pickled.pth")
    torch.save({"epoch": 1}, tmp_path / "part.pth")
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    for name, said in (("pickled", "cannot be read"), ("broken", "cannot be read"), ("part", "lacks text_adapter, text_cross_attn")):
        with pytest.raises(ArgumentError, match=f"{name}.pth {said}"):
            checkpoints.load(tmp_path / f"{name}.pth", "text")
    settings = small(data, text_epochs=1, image_epochs=0)
    training.train(settings, tmp_path)
    path = tmp_path / FILES["text"]
    other, held = training.build(replace(settings, text_adapt_until=2)).model, checkpoints.load(path, "text")
    with pytest.raises(ArgumentError, match=rf"{path.name} does not fit this model: .*2.fc.0.weight"):
        checkpoints.restore(other, held, "text", path)


def test_bytes_are_tokens_with_a_begin_and_an_end() -> None:
    found = sources.bytes_of(["ab", "x" * 100])
    assert found.shape == (2, 77)
    assert found[0, :5].tolist() == [sources.BEGIN, 97, 98, sources.END, 0]
    assert found[1, -1] == sources.END


def test_a_folder_of_transformers_is_a_source_with_its_own_tokenizer(data: Path, tmp_path: Path) -> None:
    tokenizers: Any = pytest.importorskip("tokenizers")
    transformers: Any = pytest.importorskip("transformers")

    from tests.small_clip import END, TOKENS, small_clip

    words = {word: at for at, word in enumerate(["pad", "a", "photo", "of", "damaged", "temple", "flower", "the", "broken", "with"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({**words, "unk": 11, "begin": 12, "end": END}, unk_token="unk"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing("begin $A end", special_tokens=[("begin", 12), ("end", END)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="pad", unk_token="unk", eos_token="end")
    small_clip().save_pretrained(tmp_path / "clip")
    fast.save_pretrained(tmp_path / "clip")
    source = sources.load(f"transformers:{tmp_path / 'clip'}")
    assert source.loader.side == SIDE
    found = source.tokenizer(["a photo of a damaged temple"])
    assert found.tolist() == [[12, 1, 2, 3, 1, 4, 5, END, 0]]
    assert found.shape == (1, TOKENS)
    given = {"clip": f"transformers:{tmp_path / 'clip'}", "image_size": None, "levels": (2, 5), "text_epochs": 1, "image_epochs": 1}
    run = training.train(small(data, **given), tmp_path / "run")
    assert 0.0 <= run.score().pixel_auroc <= 1.0


# settings and the command


def test_a_file_s_settings_stand_under_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: there\ntext_lr: 1e-4\nlevels: [1, 3]\ncalled: {pill: white pill}\nimage_size: null\nrelu: false\nimage_lr: 1\n")
    found = read(path, {"data": None, "text_lr": 0.5})
    expected = Settings(data="there", text_lr=0.5, levels=(1, 3), called={"pill": "white pill"}, relu=False, image_lr=1.0)
    assert found == expected
    assert read(path, {}).text_lr == 1e-4


WRONG: dict[str, tuple[str, str]] = {
    "unknown": ("data: x\nepochs: 3\n", "has the key 'epochs'; allowed: data, layout"),
    "kind": ("data: x\nseed: many\n", "has seed: 'many'; allowed: int"),
    "levels": ("data: x\nlevels: [one]\n", "has levels: \"['one']\"; allowed: tuple[int, ...] or NoneType"),
    "code": ("data: !!python/object/apply:os.getcwd []\n", "is no YAML"),
    "list": ("- data\n", "holds a list; allowed: a mapping of settings"),
    "range": ("data: x\ncontext_dropout: 2\n", "context_dropout is 2.0; allowed: 0 to 1"),
    "choice": ("data: x\nlevel_reduce: mean\n", "level_reduce is 'mean'; allowed: 'sum', 'last'"),
    "none": ("seed: 1\n", "data is not given"),
}


@pytest.mark.parametrize(("content", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_setting_is_named(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=re.escape(said)):
        read(path, {})


COMMANDS: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda data: ["--data", str(data), "--clip", "other"], "clip is 'other'; allowed: tiny, transformers:"),
    (lambda data: ["--data", str(data / "none")], "none is no folder; allowed: MVTec AD's"),
    (lambda data: ["--data", str(data), "--layout", "coco"], "layout is 'coco'; allowed: 'mvtec', 'visa'"),
    (lambda data: ["--data", str(data), "--resume"], "there is nothing to go on from"),
    (lambda data: ["--data", str(data), "--clip", "transformers:/nowhere/at/all"], "which transformers cannot load"),
    (lambda data: ["--data", str(data), "--image-size", "30"], "image_size is 30; allowed: multiples of 8"),
]


@pytest.mark.parametrize(("flags", "said"), COMMANDS, ids=[said[:20] for _, said in COMMANDS])
def test_the_command_names_what_is_wrong(
    flags: Callable[[Path], list[str]], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train-clip-adapter", *flags(data), "--output-dir", str(tmp_path)])
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_command_trains_and_scores(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(data), "--test-data", str(data), "--image-size", str(SIDE), "--text-epochs", "1", "--image-epochs", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["train-clip-adapter", *flags, "--text-batch", "6", "--output-dir", str(tmp_path)])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["text adapters, epoch 1", "image adapters, epoch 1"]
    assert re.fullmatch(r".*: 6 images, pixel AUROC 0\.\d{4}, image AUROC \d\.\d{4}", lines[2])
