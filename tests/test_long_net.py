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
    "a rule": ({"offset_rule": "paper"}, "LongNet: offset_rule is 'paper'"),
    "a mode of a dense model": ({"segment_lengths": None, "dilation_rates": None, "mode": "ring"}, "mode is 'ring'"),
    "an overlap": ({"overlap": "twice"}, "overlap is 'twice'"),
    "a base of nothing": ({"xpos_scale_base": 0}, "xpos_scale_base is 0; allowed: above 0"),
    "a negative ratio": ({"mlp_ratio": -1}, "mlp_ratio is -1; allowed: 1 / dim and more"),
    "no ratio": ({"mlp_ratio": float("nan")}, "mlp_ratio is nan; allowed: a finite number"),
    "a ratio of letters": ({"mlp_ratio": "a"}, "mlp_ratio is 'a'"),
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


def test_half_the_bits_hold_fewer_factors() -> None:
    rotary, cpu = Rotary(8, 512.0), torch.device("cpu")
    *_, factor = rotary(6790, cpu, torch.float16)
    assert factor is not None
    assert max(factor.max(), 1 / factor.min()) <= 2**12
    rotary(20000, cpu, torch.bfloat16)
    with pytest.raises(ArgumentError, match=r"has 12000 of them; allowed with xpos in float16: up to 6798, or position='rotary'"):
        rotary(12000, cpu, torch.float16)


def test_a_model_in_float16_says_how_far_it_reaches() -> None:
    network, given = model(dtype=torch.float32, xpos_scale_base=1.0), tokens()
    assert network(given).isfinite().all()
    with pytest.raises(ArgumentError, match="allowed with xpos in float16: up to 13"), torch.autocast("cpu", torch.float16):
        network(given)
    with pytest.raises(ArgumentError, match="allowed with xpos in float16: up to 13"):
        network.half()(given)


def test_a_cast_leaves_the_frequencies_alone() -> None:
    made, cast = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16).bfloat16()
    long = torch.zeros(1, 300, dtype=torch.int64)
    assert torch.equal(made(long), cast(long))


@pytest.mark.parametrize("how", ["assigned", "made empty"])
def test_a_model_made_on_meta_is_the_same_model(how: str) -> None:
    network, later = model(), model(device="meta")
    if how == "made empty":
        later = later.to_empty(device="cpu")
    later.load_state_dict(network.state_dict(), assign=how == "assigned")
    assert torch.equal(later(tokens()), network(tokens()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_tokens_may_be_narrow(dtype: torch.dtype) -> None:
    network, given = model(), tokens()
    assert torch.equal(network(given.to(dtype)), network(given))
    assert torch.equal(network.loss(given.to(dtype)), network.loss(given))
    assert network.generate(given.to(dtype), 2, temperature=0).tolist() == network.generate(given, 2, temperature=0).tolist()


def test_no_tokens_have_no_logits_and_nothing_follows_them() -> None:
    network, none = model(), tokens()[:, :0]
    assert network(none).shape == (2, 0, 11)
    with pytest.raises(ArgumentError, match=r"tokens has shape \(2, 0\); allowed: \(B, N\), N of 1 and more"):
        network.generate(none, 3)


@pytest.mark.parametrize("given", [[[1, 2]], torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)], ids=["list", "floats", "truths"])
def test_wrong_tokens_are_named(given: Any) -> None:
    network = model()
    for call in (network, network.loss, lambda x: network.generate(x, 1)):
        with pytest.raises(ArgumentError, match="tokens is "):
            call(given)


def test_generation_drops_nothing_and_goes_on_learning() -> None:
    network = model(dropout=0.9).train()
    network.norm.eval()
    expected = network.generate(tokens(), 6, temperature=0)
    assert network.training
    assert network.blocks[0].training
    assert not network.norm.training
    assert torch.equal(expected, network.eval().generate(tokens(), 6, temperature=0))
