"""scikit-learn's two photographs, cut up and scratched, in MVTec AD's folders: defects whose masks are exact, without a download."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from triton_attn import ArgumentError

NAMES = {"temple": "china.jpg", "flower": "flower.jpg"}
DEFECTS = ("scratch", "stain")
LARGEST = 10_000


def draw(root: Path, each: int = 8, side: int = 64, seed: int = 0) -> Path:
    """Write CLASS/train/good, CLASS/test/{good,scratch,stain} and CLASS/ground_truth/{scratch,stain}, `each` images in every folder.

    A scratch is a line of two strokes, a stain a blot; both are magenta and opaque, and the mask has the same pixels.

    Args:
        root: an empty folder, or one to be made.
        each: how many images a folder gets.
        side: of the images, in pixels, 16 to 256.
        seed: which cuttings and defects.

    Returns:
        root.

    Raises:
        ArgumentError: an argument is out of its range, or root is not empty.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    for argument, given, least, most in (("each", each, 1, LARGEST), ("side", side, 16, 256)):
        if not least <= given <= most:
            raise ArgumentError("draw", argument, f"is {given}; allowed: {least} to {most}")
    if root.exists() and any(root.iterdir()):
        raise ArgumentError("draw", "root", f"{root} is not empty; allowed: an empty folder")
    from PIL import Image

    try:
        from sklearn.datasets import load_sample_image
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the photographs come with scikit-learn: pip install 'triton-attn[examples]'") from None
    chance = random.Random(seed)
    for name, file in NAMES.items():
        photograph = Image.fromarray(load_sample_image(file))
        for part, kind in (("train", "good"), ("test", "good"), *(("test", defect) for defect in DEFECTS)):
            folder = root / name / part / kind
            folder.mkdir(parents=True)
            for index in range(each):
                image = _cutting(photograph, side, chance)
                if kind != "good":
                    mask = _damage(image, kind, chance)
                    masks = root / name / "ground_truth" / kind
                    masks.mkdir(parents=True, exist_ok=True)
                    mask.save(masks / f"{index:03}_mask.png")
                image.save(folder / f"{index:03}.png")
    return root


def _cutting(photograph: Any, side: int, chance: random.Random) -> Any:
    size = chance.randint(3 * side, 5 * side)
    size = min(size, *photograph.size)
    left, top = (chance.randint(0, most - size) for most in photograph.size)
    return photograph.crop((left, top, left + size, top + size)).resize((side, side))


def _damage(image: Any, kind: str, chance: random.Random) -> Any:
    """Draw into the image; the mask of what was drawn."""
    from PIL import Image, ImageDraw

    side = image.size[0]
    mask = Image.new("L", image.size, 0)
    on_image, on_mask = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    if kind == "scratch":
        points = [(chance.uniform(0.1, 0.9) * side, chance.uniform(0.1, 0.9) * side) for _ in range(3)]
        colour, width = (chance.randint(230, 255), chance.randint(0, 60), chance.randint(200, 255)), max(2, side // 14)
        on_image.line(points, fill=colour, width=width, joint="curve")
        on_mask.line(points, fill=255, width=width, joint="curve")
        return mask
    across, down = (chance.uniform(0.15, 0.3) * side for _ in range(2))
    left, top = chance.uniform(0, side - across), chance.uniform(0, side - down)
    colour = (chance.randint(160, 220), chance.randint(0, 30), chance.randint(160, 255))
    for drawing, fill in ((on_image, colour), (on_mask, 255)):
        drawing.ellipse((left, top, left + across, top + down), fill=fill)
    return mask
