"""Linear attention: how time grows with the number of tokens, and the causal call beside what others have. Ratios, interleaved.

    python -m pytest benchmarks/bench_linear.py --benchmark-enable --benchmark-only -s

prints the numbers of docs/linear_attention.md; the assertions are what the project promises on a CPU. Peers are timed if installed:
`pip install --no-deps fla-core linear-attention-transformer axial-positional-embedding product-key-memory linformer colt5-attention`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_attn import bench, linear_attention, orthogonal_projection, performer_attention

WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (8192, 16384, 32768, 65536)
GROWTH = (1.8, 2.2)  # of time, where the number of tokens doubles
SHAPE = (1, 8, 2048, 64)


def drawn(*size: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, device=WHERE) for _ in range(3)]


def performer(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Any:
    generator = torch.Generator().manual_seed(0)
    projection = orthogonal_projection(64, query.shape[-1], generator=generator, device=query.device)
    return performer_attention(query, key, value, projection, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("call", [linear_attention, performer], ids=["linear", "performer, 64 features"])
def test_time_grows_as_the_number_of_tokens(benchmark: Any, call: Callable[..., Any], causal: bool) -> None:
    """(1, 1, N, 64), N from 8192 to 65536: the least time of each length, in turns, over that of half the length."""
    # one head: no tensor is so large that the allocator asks the system for it every time
    made = {length: drawn(1, 1, length, 64) for length in LENGTHS}
    least: dict[int, float] = {}
    with torch.no_grad():
        for short, long in zip(LENGTHS[::2], LENGTHS[1::2], strict=True):
            calls = [partial(call, *made[length], causal=causal) for length in (short, long)]
            times = bench.interleave(calls[0], calls[1], WHERE, seconds=6.0, least=5)
            least.update({short: min(times[0]), long: min(times[1])})
        growth = {long: least[long] / least[short] for short, long in pairwise(LENGTHS)}
        benchmark.extra_info.update(growth=growth)
        benchmark.pedantic(lambda: call(*made[LENGTHS[0]], causal=causal), rounds=3, warmup_rounds=1)
    told = ", ".join(f"{length}: {1e3 * time:.1f} ms" for length, time in least.items())
    print(f"\n{told}; doublings {', '.join(f'{ratio:.2f}' for ratio in growth.values())}")
    if WHERE.type == "cpu":
        assert all(GROWTH[0] <= ratio <= GROWTH[1] for ratio in growth.values())


def fla_chunks() -> Callable[..., Any]:
    """fla's naive chunked form, of features computed outside, tokens before heads as it wants them."""
    naive = pytest.importorskip("fla.ops.linear_attn.naive", exc_type=ImportError)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        q, k = (torch.nn.functional.elu(x) + 1.0 for x in (query, key))
        return naive.naive_chunk_linear_attn(*(x.transpose(1, 2) for x in (q, k, value)), scale=1.0, normalize=True)

    return call


def transformer_buckets() -> Callable[..., Any]:
    """linear-attention-transformer's causal call, whose queries see whole buckets before their own alone: not the same function."""
    theirs = pytest.importorskip("linear_attention_transformer.linear_attention_transformer", exc_type=ImportError)
    found: Callable[..., Any] = theirs.causal_linear_attn
    return found


PEERS: dict[str, tuple[Callable[[], Callable[..., Any]], float]] = {
    "fla's naive chunks": (fla_chunks, 1.0),
    "linear-attention-transformer's buckets": (transformer_buckets, 0.5),
}


@pytest.mark.filterwarnings("ignore:Triton is not supported")  # fla's own, where there is no GPU
@pytest.mark.parametrize("peer", PEERS)
def test_causal_call_beside_others(benchmark: Any, peer: str) -> None:
    """(1, 8, 2048, 64), elu + 1, float32, forward."""
    made, least = PEERS[peer]
    theirs = made()
    given = drawn(*SHAPE)

    def ours() -> Any:
        return linear_attention(*given, causal=True)

    with torch.no_grad():
        if made is fla_chunks:
            torch.testing.assert_close(theirs(*given).transpose(1, 2), ours(), rtol=1e-3, atol=1e-4)
        mine, others = bench.interleave(ours, lambda: theirs(*given), WHERE, seconds=8.0)
        ratio = statistics.median(b / a for a, b in zip(mine, others, strict=True))
        benchmark.extra_info.update(ratio=ratio)
        benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
    print(f"\n{peer}: {1e3 * statistics.median(mine):.2f} ms beside {1e3 * statistics.median(others):.2f} ms, ratio {ratio:.2f}")
    if WHERE.type == "cpu":
        assert ratio >= least
