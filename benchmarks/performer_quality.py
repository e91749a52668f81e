"""How far Performer attention is from softmax attention, over features, and what orthogonal ones save; --draw makes a picture."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from triton_attn import orthogonal_projection, performer_attention
from triton_attn.reference.attention import attention

FEATURES = (64, 128, 256, 512, 1024)
HEADS, TOKENS, DIM = 4, 512, 64
COLOURS = {"orthogonal": "#0072b2", "independent": "#e69f00"}
Errors = dict[tuple[float, str, int], list[float]]


def independent(features: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.randn(features, dim, generator=generator)


def orthogonal(features: int, dim: int, generator: torch.Generator) -> Tensor:
    return orthogonal_projection(features, dim, generator=generator)


KINDS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {"orthogonal": orthogonal, "independent": independent}


def measure(spreads: Sequence[float], features: Sequence[int], draws: int, tokens: int = TOKENS) -> Errors:
    """(spread of queries and keys, kind, features) -> for each draw |estimate - softmax attention| / |softmax attention|, in float64."""
    errors: Errors = {}
    for spread in spreads:
        made = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, HEADS, tokens, DIM, generator=made, dtype=torch.float64) for _ in range(3))
        query, key = query * spread, key * spread
        truth = attention(query, key, value)
        assert isinstance(truth, Tensor)
        for kind, draw in KINDS.items():
            for count in features:
                errors[spread, kind, count] = [
                    float((performer_attention(query, key, value, draw(count, DIM, of)) - truth).norm() / truth.norm())
                    for of in (torch.Generator().manual_seed(seed) for seed in range(1, draws + 1))
                ]
    return errors


def picture(errors: Errors, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullLocator

    spreads = list(dict.fromkeys(spread for spread, _, _ in errors))
    figure = Figure(figsize=(3.4 * len(spreads), 3.2), layout="constrained")
    for axes, spread in zip(figure.subplots(1, len(spreads), squeeze=False)[0], spreads, strict=True):
        for kind, colour in COLOURS.items():
            found = {count: values for (at, which, count), values in errors.items() if (at, which) == (spread, kind)}
            axes.plot(list(found), [statistics.median(values) for values in found.values()], "o-", color=colour, label=kind)
            axes.fill_between(list(found), [min(x) for x in found.values()], [max(x) for x in found.values()], color=colour, alpha=0.2)
        axes.set(xscale="log", yscale="log", title=f"queries and keys N(0, {spread:g}²)", xlabel="features", ylabel="relative error")
        axes.set_xticks(list(found), [str(count) for count in found])
        axes.xaxis.set_minor_locator(NullLocator())
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(FormatStrFormatter("%.2g"))
        axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="standard deviations of queries and keys")
    parser.add_argument("--features", type=int, nargs="+", default=list(FEATURES))
    parser.add_argument("--draws", type=int, default=5, help="projections for each number")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--draw", type=Path, help="where the picture goes")
    given = parser.parse_args(arguments)
    errors = measure(given.spreads, given.features, given.draws, given.tokens)
    print("| spread | features | orthogonal | independent | independent / orthogonal, squared |\n|---|---|---|---|---|")
    for spread in given.spreads:
        for count in given.features:
            mean = {kind: math.sqrt(statistics.fmean(x * x for x in errors[spread, kind, count])) for kind in KINDS}
            saved = (mean["independent"] / mean["orthogonal"]) ** 2
            print(f"| {spread:g} | {count} | {mean['orthogonal']:.3f} | {mean['independent']:.3f} | {saved:.2f} |")
    if given.draw:
        picture(errors, given.draw)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
