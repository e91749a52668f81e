"""Memory of OpenCLIP's image towers, counted on shapes, is what a real step allocates; the largest batch is the largest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.test_capacity import allocated
from triton_attn import ArgumentError, device, use_backend
from triton_attn.capacity import TOWERS, TowerPeak, TowerSetup, largest_batch, tower_peak
from triton_attn.capacity.blocks import ImageTower, tower_step
from triton_attn.nn.enhanced_transformer import BLOCK_TYPES

TINY = TowerSetup("tiny", dtype="float32")


@pytest.mark.skipif(not device.interpreting(), reason="the real step's kernels run in Triton's interpreter: TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["standard", "parallel", "linear"])
def test_a_real_step_allocates_what_was_predicted(kind: str) -> None:
    setup, batch = TowerSetup("tiny", kind, "float32"), 3
    step = tower_step(setup, batch)
    with use_backend("portable"):
        step.run()  # after it there are states
    given = [*step.made, *(parameter for module in step.modules for parameter in module.parameters())]
    given += [tensor for state in step.optimizer.state.values() for tensor in state.values()]
    with use_backend("triton"):
        measured = allocated(step) + sum(tensor.nbytes for tensor in given)
    # a CPU's operators allocate a little inside of themselves, which is much of so small a step
    assert tower_peak(setup, batch).bytes == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_block_is_counted_and_checkpointing_saves(kind: str) -> None:
    # wide enough in images that activations decide
    plain, saving = (tower_peak(TowerSetup("tiny", kind, checkpointing=on), 64) for on in (False, True))
    for peak in (plain, saving):
        assert sum(peak.parts.values()) == peak.bytes
        assert peak.parts["optimizer"] >= 2 * peak.parts["parameters"] > 0
    assert saving.bytes < plain.bytes < tower_peak(TowerSetup("tiny", kind, "float32"), 64).bytes


@pytest.mark.parametrize("memory", [7e5, 1e6, 5e6])
def test_one_image_more_does_not_fit(memory: float) -> None:
    best = largest_batch(TINY, memory)
    assert best is not None
    assert best.bytes <= memory < tower_peak(TINY, best.batch + 1).bytes


@pytest.mark.parametrize(
    ("bytes_of", "memory", "expected"),
    [
        (lambda n: 100 + 10 * n, 1000, 90),
        (lambda n: 100 + 10 * n, 109, None),
        (lambda n: max(5000, 100 * n), 5000, 50),  # at first the optimiser decides
        (lambda n: 100 * n + 64 * (n // 7), 7777, 71),  # a workspace by steps
        (lambda n: n * n, 10_000, 100),
        (lambda n: 10 * n if n < 50 else 1000 + 10 * n, 1100, 49),
    ],
    ids=["line", "none", "flat first", "steps", "square", "jump"],
)
def test_the_search_finds_the_largest_on_other_curves(bytes_of: Any, memory: float, expected: int | None) -> None:
    asked = []

    def measure(setup: TowerSetup, batch: int) -> TowerPeak:
        asked.append(batch)
        return TowerPeak(setup, batch, bytes_of(batch))

    best = largest_batch(TINY, memory, measure=measure)
    assert (best.batch if best else None) == expected
    assert len(asked) < 60


@pytest.mark.parametrize(("tower", "parameters"), [("ViT-B-16", 86_192_640), ("ViT-L-14", 303_966_208), ("ViT-H-14", 632_076_800)])
def test_towers_have_the_parameters_of_open_clip_s(tower: str, parameters: int) -> None:
    """The numbers are sums over open_clip 3.3.0's own model.visual."""
    with torch.device("meta"):
        made = ImageTower(TOWERS[tower], "standard")
    assert sum(parameter.numel() for parameter in made.parameters()) == parameters


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tower": "ViT-X"}, "tower is 'ViT-X'; allowed: ViT-B-16"),
        ({"block_type": "round"}, "block_type is 'round'; allowed: standard"),
        ({"dtype": "int4"}, "dtype is 'int4'; allowed: bf16, float32"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; allowed: adamw"),
    ],
)
def test_wrong_arguments_are_named(changes: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        TowerSetup(**changes)


@pytest.mark.parametrize("batch", [0, -1, 1.5, True])
def test_a_batch_is_a_whole_number(batch: Any) -> None:
    with pytest.raises(ArgumentError, match=r"batch is .*; allowed: 1 and more"):
        tower_peak(TINY, batch)
