"""LongNet: causal, its positions relative, dense where one segment is all, and it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import ArgumentError
from triton_attn.models import LongNet
from triton_attn.models.long_net import Rotary, turned

SMALL: dict[str, Any] = {"num_tokens": 11, "dim": 16, "depth": 2, "heads": 2, "segment_lengths": (4, 8), "dilation_rates": (1, 2)}
POSITIONS = pytest.mark.parametrize("position", ["xpos", "rotary"])


def model(**changed: Any) -> LongNet:
    torch.manual_seed(0)
    return LongNet(**{**SMALL, "dtype": torch.float64, **changed}).eval()


def tokens(n: int = 19, batch: int = 2) -> Tensor:
    return torch.randint(11, (batch, n), generator=torch.Generator().manual_seed(1))


@POSITIONS
def test_no_token_sees_a_later_one(position: str) -> None:
    network, given = model(position=position), tokens()
    later = given.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 11
    # of the same length: xpos counts from the middle, which scores do not show
    torch.testing.assert_close(network(later)[:, :7], network(given)[:, :7], rtol=0, atol=0)
    assert not torch.equal(network(later)[:, 7], network(given)[:, 7])


@POSITIONS
def test_scores_depend_on_distances_alone(position: str) -> None:
    rotary = Rotary(8, 512.0 if position == "xpos" else None)
    cos, sin, factor = rotary(12, torch.device("cpu"))
    more = torch.ones(()) if factor is None else factor
    query, key = torch.randn(8).expand(1, 1, 12, 8), torch.randn(8).expand(1, 1, 12, 8)
    scores = (turned(query, cos * more, sin * more) @ turned(key, cos / more, sin / more).mT)[0, 0]
    for distance in range(6):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_one_segment_of_rate_one_is_the_dense_model() -> None:
    dilated, dense = model(segment_lengths=(64,), dilation_rates=(1,)), model(segment_lengths=None, dilation_rates=None)
    dense.load_state_dict(dilated.state_dict())
    torch.testing.assert_close(dense(tokens()), dilated(tokens()), rtol=1e-6, atol=1e-8)


def test_a_few_steps_learn_a_period() -> None:
    torch.manual_seed(0)
    network = LongNet(**SMALL)
    text = torch.arange(40).remainder(5)[None]
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(network(text[:, :-1])[0], text[0, 1:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < losses[0]
    continued = network.eval().generate(text[:, :23], 6, temperature=0)
    assert continued[0].tolist() == text[0, :29].tolist()


def test_generation_draws_from_its_generator() -> None:
    network = model()
    draws = [network.generate(tokens(3), 8, top_k=4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0][:, :3], tokens(3))


def test_it_compiles_in_one_graph() -> None:
    network = model(dtype=torch.float32)
    torch.testing.assert_close(
        torch.compile(network, fullgraph=True, backend="aot_eager")(tokens()), network(tokens()), rtol=1e-4, atol=1e-5
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "odd heads": ({"heads": 3}, "heads is 3; allowed: a divisor of dim / 2, 8"),
    "rates alone": ({"segment_lengths": None}, "are not both given"),
    "a position": ({"position": "alibi"}, "position is 'alibi'; allowed: 'xpos', 'rotary'"),
    "the other order": ({"segment_lengths": (1, 2), "dilation_rates": (4, 8)}, "looks like the other order"),
}


@pytest.mark.parametrize(("changed", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        LongNet(**{**SMALL, **changed})
    assert said in str(raised.value)


@pytest.mark.parametrize("how", [{"checkpointing": True}, {"chunk": 5}, {"checkpointing": True, "chunk": 32}], ids=str)
def test_what_saves_memory_changes_no_loss_and_no_gradient(how: dict[str, Any]) -> None:
    plain, saving, given = model(), model(**how), tokens()
    expected = F.cross_entropy(plain(given[:, :-1]).flatten(0, 1), given[:, 1:].flatten())
    torch.testing.assert_close(plain.loss(given), expected)
    found = saving.loss(given)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(x, list(network.parameters())) for x, network in ((expected, plain), (found, saving)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(saving(given), plain(given))


def test_xpos_says_how_far_its_factors_reach() -> None:
    rotary = Rotary(8, 4.0)
    cos, sin, factor = rotary(560, torch.device("cpu"))
    assert factor is not None
    assert factor.isfinite().all()
    assert (factor > 0).all()
    with pytest.raises(
        ArgumentError, match=r"has 1000 of them; allowed with xpos: up to 562, or position='rotary' or an xpos_scale_base from 8"
    ):
        rotary(1000, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(3,), (2, 1)])
def test_a_loss_needs_two_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="tokens has shape"):
        model().loss(torch.zeros(shape, dtype=torch.int64))
