"""The two drop-in calls under torch's transforms: compiled and exported for every length, differentiated by torch.func, on meta."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from triton_attn import scaled_dot_product_attention
from triton_attn.nn import MultiheadAttention

E = 16
ALMOST_NO_DROPOUT = 1e-12  # takes the path of dropout, and drops nothing


class Attention(nn.Module):
    """The function as a module, over heads of a width of 4."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(*x.shape[:2], -1, 4).transpose(1, 2)
        out: Tensor = scaled_dot_product_attention(heads, heads, heads, **self.options)
        return out.transpose(1, 2).flatten(2)


class Both(nn.Module):
    """Torch's module as ours: output and weights in one row."""

    def __init__(self, **call: Any) -> None:
        super().__init__()
        self.attend, self.call = MultiheadAttention(E, 2, batch_first=True), call

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([y.flatten(1) for y in self.attend(x, x, x, **self.call) if y is not None], 1)


SUBJECTS: dict[str, Callable[[], nn.Module]] = {
    "function": Attention,
    "function, causal": lambda: Attention(is_causal=True),
    "function, dropout": lambda: Attention(dropout_p=ALMOST_NO_DROPOUT),
    "module, averaged weights": Both,
    "module, weights": lambda: Both(average_attn_weights=False),
    "module, no weights": lambda: Both(need_weights=False),
}
EACH = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS.keys())


@pytest.fixture(autouse=True)
def _low_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that the lengths of a test lie on both sides of every limit, and of the larger ones every call is in pieces."""
    monkeypatch.setattr("triton_attn.nn.multihead_attention.FEW", 200)
    monkeypatch.setattr("triton_attn.nn.attention_weights.SCORES_AT_ONCE", 200)
    monkeypatch.setattr("triton_attn.portable._rows.SCORES_AT_ONCE", 300)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(length: int) -> Tensor:
    return torch.randn(2, length, E)


@EACH
def test_one_graph_serves_every_length(subject: Callable[[], nn.Module]) -> None:
    module, counter = subject(), CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for length in (6, 7, 11, 20):
        x = draw(length)
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1


@EACH
def test_one_exported_program_serves_every_length(subject: Callable[[], nn.Module]) -> None:
    module = subject().eval()
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(module, (draw(6),), dynamic_shapes=({1: length},)).module()
    for x in (draw(3), draw(20)):
        torch.testing.assert_close(program(x), module(x))


def loss(module: nn.Module, parameters: dict[str, Any], x: Tensor) -> Tensor:
    out: Tensor = torch.func.functional_call(module, parameters, (x,))
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


@EACH
def test_torch_func_differentiates_it(subject: Callable[[], nn.Module]) -> None:
    module, x = subject(), draw(20).requires_grad_()
    parameters = dict(module.named_parameters())
    found = torch.func.grad(loss, argnums=(1, 2))(module, {name: p.detach() for name, p in parameters.items()}, x.detach())
    expected = torch.autograd.grad(loss(module, parameters, x), (*parameters.values(), x))
    for a, b in zip((*found[0].values(), found[1]), expected, strict=True):
        torch.testing.assert_close(a, b)


@EACH
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for its own fused call
def test_each_sample_has_its_gradient(subject: Callable[[], nn.Module]) -> None:
    module, samples = subject(), torch.stack([draw(20), draw(20)])
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def gradients(x: Tensor) -> Any:
        return torch.func.grad(loss, argnums=(1, 2))(module, parameters, x)

    found, of_x = torch.func.vmap(gradients, randomness="different")(samples)
    for i, x in enumerate(samples):
        expected, expected_of_x = gradients(x)
        torch.testing.assert_close({name: g[i] for name, g in found.items()}, expected)
        torch.testing.assert_close(of_x[i], expected_of_x)


@EACH
def test_on_meta_it_has_shapes_and_no_numbers(subject: Callable[[], nn.Module]) -> None:
    module = subject()
    expected = module(draw(20))
    x = draw(20).to("meta").requires_grad_()
    out = module.to("meta")(x)
    assert (out.shape, out.dtype, out.device.type) == (expected.shape, expected.dtype, "meta")
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
