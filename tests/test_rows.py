"""Every row of the catalogue is complete: signatures agree, kernels load, docs name every argument, tiles are there."""

from __future__ import annotations

import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_attn import CATALOG, device
from triton_attn.mechanism import Case, Kernel, Launch, Mechanism
from triton_attn.testing import patterns
from triton_attn.tiles import Tile

ROOT = Path(__file__).resolve().parents[1]

EACH_ROW = pytest.mark.parametrize("row", CATALOG.values(), ids=CATALOG.keys())


def launches() -> Iterator[Any]:
    for row in CATALOG.values():
        for kernel in row.kernels:
            yield from (pytest.param(kernel, launch, id=f"{row.name}-{kernel.name}-{launch.name}") for launch in kernel.launches)


def parameters(function: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """Name, kind, default and annotation of each, but for what only implementations take, or only public functions."""
    every = inspect.signature(function, eval_str=True).parameters.values()
    apart = {"seed", "tile"}.union(*(row.public for row in CATALOG.values() if row.function is function))
    assert all(p.kind is p.KEYWORD_ONLY for p in every if p.name in apart)
    return [(p.name, p.kind, p.default, p.annotation) for p in every if p.name not in apart]


def by_the_row(row: Mechanism) -> list[tuple[Any, ...]]:
    """Parameters of the public function, where a tuple of inputs counts as those inputs."""
    found = []
    for name, kind, default, annotation in parameters(row.function):
        parts = row.packed.get(name)
        if parts is None:
            found.append((name, kind, default, annotation))
            continue
        assert typing.get_args(typing.get_args(annotation)[0]) == (torch.Tensor,) * len(parts)
        found += [(part, kind, default, torch.Tensor | None) for part in parts]
    return found


@EACH_ROW
def test_portable_and_reference_take_what_the_public_function_takes(row: Mechanism) -> None:
    assert parameters(row.portable) == by_the_row(row)
    assert parameters(row.reference) == by_the_row(row)
    assert not {"seed", "tile"} & inspect.signature(row.function).parameters.keys()


@EACH_ROW
def test_every_kernel_loads_and_takes_what_the_public_function_takes(row: Mechanism) -> None:
    pytest.importorskip("triton")
    for kernel in row.kernels:
        code = kernel.load()
        assert parameters(code.forward) == by_the_row(row)
        assert code.spaces.keys() == {launch.name for launch in kernel.launches}


@EACH_ROW
def test_the_row_and_the_signature_name_the_same_arguments(row: Mechanism) -> None:
    seeds = {name for name, given in row.inputs.items() if given.kind == "seed"}
    assert {*row.inputs, *row.options, row.more} - seeds == {name for name, *_ in by_the_row(row)}
    assert set(row.public) <= inspect.signature(row.function).parameters.keys()
    assert seeds <= inspect.signature(row.reference).parameters.keys()


@EACH_ROW
def test_the_last_kernel_serves_every_gpu_of_the_others_and_computes_every_gradient(row: Mechanism) -> None:
    *others, general = row.kernels
    assert {capability for kernel in others for capability in kernel.capabilities} <= set(general.capabilities) <= device.LIMITS.keys()
    assert {name for launch in general.launches for name in launch.gradients} == set(row.differentiable)


@EACH_ROW
def test_the_docs_and_the_docstring_name_every_argument(row: Mechanism) -> None:
    page = ROOT / "docs" / f"{row.name}.md"
    assert page.is_file()
    text = inspect.getdoc(row.function) or ""
    for section in ("Args", "Returns", "Raises", "Source"):
        assert re.search(rf"^{section}: *", text, re.MULTILINE), section
    arguments = text.partition("\nArgs:\n")[2].partition("\nReturns:")[0]
    assert re.findall(r"^    (\w+):", arguments, re.MULTILINE) == list(inspect.signature(row.function).parameters)


SOFTMAX = [pytest.param(row, id=row.name) for row in CATALOG.values() if "lse" in row.outputs and row.exact_pairs]


@pytest.mark.parametrize("row", SOFTMAX)
def test_the_work_model_counts_the_pairs_that_the_reference_sees(row: Mechanism) -> None:
    for case in row.cases:
        if any(name == "dropout_p" or (name in row.inputs and row.inputs[name].kind in ("mask", "padding")) for name in case.options):
            continue
        lengths = [axis for axis in case.sizes if axis not in "bhgde"]
        for drawn in itertools.product((0, 1, 2, 5, 8), repeat=len(lengths)):
            sizes = {**case.sizes, **dict(zip(lengths, drawn, strict=True)), "d": 3}
            sizes = row.fitted(sizes, case.options)
            pairs = int(patterns.seen(row, Case(case.name, sizes, case.options)).sum())
            work = row.work(sizes, case.options, 2)
            assert work.flops == 2 * (sizes["d"] + sizes["e"]) * pairs, sizes
            assert work.exponentials == pairs, sizes


@pytest.mark.parametrize(("kernel", "launch"), list(launches()))
def test_every_launch_has_tiles_for_every_gpu_and_every_key(kernel: Kernel, launch: Launch) -> None:
    pytest.importorskip("triton")
    space = kernel.load().spaces[launch.name]
    for capability, key in itertools.product(device.LIMITS, space.entries()):
        candidates = list(space.of(capability, key))
        assert candidates, (capability, key)
        assert len(set(candidates)) == len(candidates), (capability, key)
        assert [Tile.parse(str(tile)) for tile in (space.first(key), *candidates)] == [space.first(key), *candidates]
