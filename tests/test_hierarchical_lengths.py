"""HierarchicalVLM's modules under transforms at lengths whose portable path is a band of blocks; and the dtype of a mix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triton_attn.nn import CrossMemoryAttention, LocalGlobalAttention
from triton_attn.portable import _banded, _near
from triton_attn.portable.local_global_attention import SHORT

N = SHORT + 45
MODES: list[dict[str, Any]] = [{}, {"global_mode": "first"}]
EACH_MODE = pytest.mark.parametrize("options", MODES, ids=["summary", "first"])


def drawn(options: dict[str, Any]) -> tuple[LocalGlobalAttention, Tensor]:
    return LocalGlobalAttention(16, 2, 16, 2, **options), torch.randn(1, N, 16, requires_grad=True)


def outcome(call: Any, module: LocalGlobalAttention, x: Tensor) -> list[Tensor]:
    out = call(x)
    return [out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))]


@EACH_MODE
@pytest.mark.parametrize("way", ["fused", "windows"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_band_is_recomputed_under_a_checkpoint(
    options: dict[str, Any], way: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "windows":
        monkeypatch.setattr(_near, "LONGEST", 0)
    module, x = drawn(options)
    bands: list[bool] = []
    forward = _banded.banded
    monkeypatch.setattr(_banded, "banded", lambda *given: bands.append(True) or forward(*given))  # type: ignore[func-returns-value]
    expected = module(x)
    expected.square().sum().backward()
    leaves = (x, *module.parameters())
    wanted = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    out = checkpoint(module, x, use_reentrant=reentrant)
    out.square().sum().backward()
    assert len(bands) == 3
    assert torch.equal(out, expected)
    for leaf, gradient in zip(leaves, wanted, strict=True):
        assert torch.equal(leaf.grad, gradient)  # type: ignore[arg-type]


@EACH_MODE
def test_what_a_band_saves_may_be_packed(options: dict[str, Any]) -> None:
    module, x = drawn(options)
    expected = outcome(module, module, x)
    with torch.autograd.graph.save_on_cpu():
        found = outcome(module, module, x)
    torch.testing.assert_close(found, expected)


@EACH_MODE
def test_a_band_and_its_graph_are_one_function(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    module, x = drawn(options)
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outcome(compiled, module, x), outcome(module, module, x))


@EACH_MODE
def test_a_band_and_its_exported_program_are_one_function(options: dict[str, Any]) -> None:
    module, x = drawn(options)
    program = torch.export.export(module, (x.detach(),), dynamic_shapes={"x": {1: torch.export.Dim.DYNAMIC}}).module()
    for n in (N, N + 33):
        other = torch.randn(1, n, 16)
        torch.testing.assert_close(program(other), module(other))


@pytest.mark.parametrize("gate", [torch.tensor([0.5], dtype=torch.float64), torch.tensor([1]), torch.tensor(True)], ids=str)
def test_a_gate_of_another_dtype_widens_nothing(gate: Tensor) -> None:
    module, x, memory = CrossMemoryAttention(16, 2), torch.randn(1, 5, 16), torch.randn(1, 3, 16)
    found = module.fuse_with_memory(x, memory, gate)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, module.fuse_with_memory(x, memory, float(gate)))
