"""AA-CLIP with and without cross-attention on drawn defects: scikit-learn's photographs, cut up and scratched, and a small random CLIP.

    python examples/clip_defects.py [--each 12] [--text-epochs 4] [--image-epochs 12] [--output-dir clip_defects]

Draws a folder to learn from and one to test with, in MVTec AD's layout; trains stage 1 and stage 2 with and without cross-attention;
prints pixel and image AUROC on the test images, untrained and trained, and how far two images move the same prompts. Writes
heat_map.png, one test image with what each model sees in it, and words.png, what words of a prompt look at. Three minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from triton_attn.clip import pictures, training
from triton_attn.clip.drawn import draw
from triton_attn.clip.evaluation import anomaly_map
from triton_attn.clip.folders import Sample
from triton_attn.clip.prompts import embeddings
from triton_attn.clip.settings import Settings
from triton_attn.clip.sources import bytes_of

SENTENCE, WORDS = "a photo of a damaged {}.", ("photo", "damaged", "{}")


def settings_of(data: Path, chosen: argparse.Namespace) -> Settings:
    """Faster than the defaults, which are for a CLIP that knows something. Dropout in attention costs a CPU more than all else."""
    small: dict[str, Any] = {"cross_attn_dropout": 0.0, "text_lr": 1e-3, "image_lr": 2e-3, "text_batch": 8, "image_batch": 8}
    epochs = {"text_epochs": chosen.text_epochs, "image_epochs": chosen.image_epochs}
    return Settings(data=str(data), image_size=chosen.side, seed=chosen.seed, **small, **epochs)


def moved(run: training.Run, samples: list[Sample]) -> float:
    """How far the text of damage is apart beside two images, as a share of its length."""
    batch = run.loader.load(samples[:2])
    names = [samples[0].class_name] * 2
    with torch.no_grad():
        states = embeddings(run.model, run.tokens, names, run.model.compute_image_context(batch.images))
    return float((states[0, :, 1] - states[1, :, 1]).norm())


def show(runs: dict[str, training.Run], sample: Sample, folder: Path) -> None:
    """heat_map.png, words.png."""
    maps = {}
    for name, run in runs.items():
        batch = run.loader.load([sample])
        maps[name] = anomaly_map(run.model, batch, run.tokens, cross_attention=run.settings.cross_attention)[0][0]
    pictures.heat_map(batch.images[0], batch.masks[0], maps, run.loader, folder / "heat_map.png")
    run = runs["with"]
    sentence = SENTENCE.format(sample.class_name)
    run.model.set_image_context(run.model.compute_image_context(batch.images))
    weights = run.model.patch_attention(bytes_of([sentence])).mean(1)[0]  # over heads
    run.model.clear_image_context()
    side = round(weights.shape[1] ** 0.5)
    looks = {}
    for word in (word.format(sample.class_name) for word in WORDS):
        start = 1 + sentence.index(word)  # a token is a byte; the first one begins the text
        looks[word] = weights[start : start + len(word)].mean(0).view(side, side)
    pictures.word_attention(batch.images[0], looks, run.loader, folder / "words.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=12, help="images of each kind and class to learn from")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--text-epochs", type=int, default=4)
    parser.add_argument("--image-epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("clip_defects"))
    chosen = parser.parse_args(argv)
    chosen.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        learn = draw(Path(folder) / "learn", chosen.each, chosen.side, seed=1)
        test = draw(Path(folder) / "test", chosen.each, chosen.side, seed=2)
        settings = settings_of(learn, chosen)
        samples = training.samples_of(settings, str(test))
        print(f"{len(training.samples_of(settings, str(learn)))} images to learn from, {len(samples)} to test with")
        print("| cross-attention | trained | pixel AUROC | image AUROC | loss of stage 1 | loss of stage 2 | apart | seconds |")
        print("|---|---|---|---|---|---|---|---|")
        runs = {}
        for name in ("with", "without"):
            told = replace(settings, cross_attention=name == "with")
            start = time.perf_counter()
            untrained = training.build(told).score(samples)
            print(f"| {name} | no | {untrained.pixel_auroc:.3f} | {untrained.image_auroc:.3f} | | | | |", flush=True)
            run = runs[name] = training.train(told, Path(folder) / name)
            found, text, image = run.score(samples), run.losses["text"], run.losses["image"]
            apart = f"{moved(run, samples):.4f}" if name == "with" else "0"
            steps = f"{text[0]:.2f} to {text[-1]:.2f} | {image[0]:.2f} to {image[-1]:.2f}"
            took = time.perf_counter() - start
            print(f"| {name} | yes | {found.pixel_auroc:.3f} | {found.image_auroc:.3f} | {steps} | {apart} | {took:.0f} |", flush=True)
        show(runs, next(sample for sample in samples if sample.defect == "scratch"), chosen.output_dir)
    print(f"{chosen.output_dir / 'heat_map.png'}, {chosen.output_dir / 'words.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
