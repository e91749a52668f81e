"""What is to be looked at: losses over epochs, an image beside where damage is seen, what a word looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from triton_attn.clip.folders import Loader


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)


def losses(stages: Mapping[str, Sequence[float]], path: Path) -> None:
    """A panel for each stage that has an epoch: its mean loss over epochs."""
    drawn = {stage: values for stage, values in stages.items() if values}
    figure, panels = _figure(4.0 * max(len(drawn), 1), 3.0, max(len(drawn), 1))
    for panel, (stage, values) in zip(panels, drawn.items(), strict=False):
        panel.plot(range(1, len(values) + 1), values, marker="o", markersize=3)
        panel.set(title=f"{stage} adapters", xlabel="epoch", ylabel="loss")
    _save(figure, path)


def heat_map(image: Tensor, mask: Tensor, maps: Mapping[str, Tensor], loader: Loader, path: Path) -> None:
    """The image, its mask, and maps in 0 to 1 over it.

    Args:
        image: (3, side, side), as the loader gives it.
        mask: (side, side).
        maps: titles and (side, side).
        loader: that normalised the image.
        path: where the picture goes, as a whole.
    """
    pixels = pixels_of(image, loader)
    figure, panels = _figure(2.4 * (2 + len(maps)), 2.8, 2 + len(maps))
    panels[0].imshow(pixels)
    panels[0].set_title("image")
    panels[1].imshow(mask.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    panels[1].set_title("mask")
    for panel, (title, values) in zip(panels[2:], maps.items(), strict=True):
        panel.imshow(pixels)
        panel.imshow(values.cpu().numpy(), cmap="inferno", alpha=0.75, vmin=0, vmax=1)
        panel.set_title(title)
    for panel in panels:
        panel.axis("off")
    _save(figure, path)


def word_attention(image: Tensor, weights: Mapping[str, Tensor], loader: Loader, path: Path) -> None:
    """What words look at: weights over patches, (side, side) each, one scale for all."""
    figure, panels = _figure(2.4 * (1 + len(weights)), 2.8, 1 + len(weights))
    panels[0].imshow(pixels_of(image, loader))
    panels[0].set_title("image")
    low, high = (f(float(f(x.flatten().tolist())) for x in weights.values()) for f in (min, max))
    for panel, (word, values) in zip(panels[1:], weights.items(), strict=True):
        panel.imshow(values.detach().cpu().numpy(), cmap="viridis", vmin=low, vmax=high)
        panel.set_title(word)
    for panel in panels:
        panel.axis("off")
    _save(figure, path)


def pixels_of(image: Tensor, loader: Loader) -> Any:
    """(side, side, 3) in 0 to 1."""
    mean, std = (image.new_tensor(x)[:, None, None] for x in (loader.mean, loader.std))
    return (image * std + mean).clamp(0, 1).movedim(0, 2).cpu().numpy()
