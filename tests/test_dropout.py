"""Dropout: one generator in every backend, a mask that depends on position and seed only, the same in both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import triton_attn
from triton_attn.kernels import attention as kernels
from triton_attn.portable.attention import attention as portable
from triton_attn.reference import _dropout
from triton_attn.reference.attention import attention as reference
from triton_attn.tiles import Tile

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        # known answers of the Random123 library for philox4x32-10
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_gives_the_published_words(counter: tuple[int, ...], seed: int, words: tuple[int, ...]) -> None:
    found = _dropout.philox(torch.tensor(seed), *(torch.tensor(c) for c in counter[:3]))
    assert tuple(found.flatten().tolist()) == words


def mask_of(call: object, n: int = 40, p: float = 0.3, seed: Tensor = SEED, **options: object) -> Tensor:
    """Which entries a call keeps, read off with values that are the identity and equal scores."""
    query, key = torch.zeros(2, 2, n, 16), torch.zeros(2, 2, n, 16)
    value = torch.eye(n).expand(2, 2, n, n)
    return call(query, key, value, dropout_p=p, seed=seed, **options) > 0  # type: ignore[operator,no-any-return]


def test_every_backend_drops_the_same_entries() -> None:
    kept = mask_of(reference)
    assert 0.6 < kept.float().mean() < 0.8
    assert torch.equal(kept, mask_of(portable))
    for tile in (Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)):
        assert torch.equal(kept, mask_of(kernels.attention, tile=tile)), tile


def test_heads_batches_and_seeds_have_masks_of_their_own() -> None:
    kept = mask_of(reference).flatten(0, 1)
    other = mask_of(reference, seed=SEED + 1).flatten(0, 1)
    every = torch.cat((kept, other))
    for i in range(len(every)):
        for j in range(i):
            assert (every[i] == every[j]).float().mean() < 0.7  # independent masks agree on 0.58


def test_the_share_that_falls_is_the_share_asked_for() -> None:
    index = torch.arange(512)
    for p in (0.1, 0.5, 0.9):
        kept = _dropout.keep(SEED, p, index[:4], index, index).float()
        deviation = (p * (1 - p) / kept.numel()) ** 0.5
        assert abs(kept.mean().item() - (1 - p)) < 5 * deviation
        # neighbours along each axis are uncorrelated
        for axis in range(3):
            first, second = kept.narrow(axis, 0, kept.shape[axis] - 1), kept.narrow(axis, 1, kept.shape[axis] - 1)
            correlation = torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1].item()
            assert abs(correlation) < 5 / first.numel() ** 0.5


def test_backward_uses_the_mask_of_forward() -> None:
    """dV of equal scores and a gradient of the identity is the mask again, transposed."""
    n, p = 40, 0.3
    query, key = torch.zeros(1, 1, n, 16), torch.zeros(1, 1, n, 16)
    value = torch.eye(n)[None, None]
    tile = Tile(16, 32, 4, 1)
    out, lse = kernels.attention(query, key, value, dropout_p=p, seed=SEED, return_lse=True, tile=tile)
    _, _, dv = kernels.attention_backward(value, None, query, key, value, out, lse, dropout_p=p, seed=SEED, tile=Tile(32, 16, 4, 1))
    assert torch.equal(dv > 0, (out > 0).mT)


@pytest.mark.parametrize("backend", ["triton", "portable", "reference"])
def test_the_generator_decides_and_checkpointing_repeats(backend: str) -> None:
    def call(query: Tensor) -> Tensor:
        with triton_attn.use_backend(backend):
            return triton_attn.attention(query, query, query, dropout_p=0.4)  # type: ignore[no-any-return]

    query = torch.randn(1, 2, 20, 16, requires_grad=True)
    torch.manual_seed(5)
    first, second = call(query), call(query)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(first, call(query))
    torch.manual_seed(5)
    again = checkpoint(call, query, use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(out.sum(), query)[0] for out in (first, again)))


@pytest.mark.parametrize("backend", ["triton", "portable", "reference"])
def test_the_two_ends_of_dropout(backend: str) -> None:
    query = torch.randn(1, 1, 20, 16)
    with triton_attn.use_backend(backend):
        assert torch.equal(triton_attn.attention(query, query, query, dropout_p=0.0), triton_attn.attention(query, query, query))
        assert not triton_attn.attention(query, query, query, dropout_p=1.0).any()
