"""HierarchicalVLM's modules: their definitions written out naively, the originals' states and the originals' defects."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_attn.nn import CrossMemoryAttention, HierarchicalAttentionBlock, LocalGlobalAttention, StridedAttention
from triton_attn.nn._projections import Projections

pytestmark = pytest.mark.filterwarnings("ignore:triton_attn.* takes its portable path")  # float64 on a GPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, HEADS, B = 24, 3, 2
DOUBLE: dict[str, Any] = {"dtype": torch.float64, "device": DEVICE}
SINGLE: dict[str, Any] = {"dtype": torch.float32, "device": DEVICE}
LENGTHS = [1, 2, 3, 7, 17, 65]
EACH_LENGTH = pytest.mark.parametrize("n", LENGTHS)
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])


def tokens(n: int, batch: int = B, **factory: Any) -> Tensor:
    return torch.randn(batch, n, DIM, **(factory or DOUBLE), requires_grad=True)


def padding(n: int) -> Tensor:
    """Some of one sequence, all of the other but its first token."""
    mask = torch.rand(B, n, device=DEVICE) > 0.6
    mask[1] = True
    mask[:, 0] = False
    return mask


# the definitions, written out: every score of every pair, float64


def split(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], HEADS, DIM // HEADS).transpose(1, 2)


def projected(module: Any, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    memory = x if memory is None else memory
    return split(module.q_proj(x)), split(module.k_proj(memory)), split(module.v_proj(memory))


def scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT / math.sqrt(query.shape[-1])


def weights(found: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen; nothing where nothing is."""
    return found.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)


def joined(module: Any, heads: Tensor) -> Tensor:
    out: Tensor = module.out_proj(heads.transpose(1, 2).flatten(2))
    return out


def shown(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """(B, 1, N, N): the keys that a query may see at all."""
    n = x.shape[1]
    seen = torch.ones(x.shape[0], 1, n, n, dtype=torch.bool, device=x.device)
    if causal:
        seen = seen.tril()
    return seen if mask is None else seen & ~mask[:, None, None, :]


def strided(module: StridedAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = projected(module, x)
    places = torch.arange(x.shape[1], device=x.device)
    grid = (places % module.stride == module.phase).expand(x.shape[1], -1)
    if module.include_self:
        grid = grid | (places == places[:, None])
    return joined(module, weights(scores(query, key), grid & shown(x, mask, module.causal)) @ value)


def local_global(module: LocalGlobalAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = projected(module, x)
    n, globals_ = x.shape[1], min(module.num_global_tokens, x.shape[1])
    places = torch.arange(n, device=x.device)
    window = (places - places[:, None]).abs() <= module.local_window // 2
    may = shown(x, mask, module.causal)
    if module.global_mode == "first":
        first = places < globals_
        if module.combine == "joint":
            return joined(module, weights(scores(query, key), (window | first | first[:, None]) & may) @ value)
        global_key, global_value, ignored = key[:, :, :globals_], value[:, :, :globals_], ~may[..., :globals_]
    elif module.global_mode == "summary":
        asking = split(module.q_proj(module.global_queries)[None])
        pooling = weights(scores(asking, key), may[:, :, :1])
        global_key, global_value = pooling @ key, pooling @ value
        ignored = torch.zeros(1, 1, 1, module.num_global_tokens, dtype=torch.bool, device=x.device)
    else:
        saliency = (x * module.saliency).sum(-1)
        ranked = saliency if mask is None else saliency.masked_fill(mask, -math.inf)
        chosen = ranked.argsort(dim=1, descending=True)[:, :globals_]
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        gate = torch.sigmoid(saliency[rows, chosen])
        global_key = key.transpose(1, 2)[rows, chosen].transpose(1, 2)
        global_value = (value.transpose(1, 2)[rows, chosen] * gate[..., None, None]).transpose(1, 2)
        ignored = torch.zeros_like(chosen, dtype=torch.bool) if mask is None else mask[rows, chosen]
        ignored = ignored[:, None, None, :]
    near, far = scores(query, key).masked_fill(~(window & may), -math.inf), scores(query, global_key).masked_fill(ignored, -math.inf)
    if module.combine == "joint":
        every = torch.cat((near, far), -1)
        return joined(module, weights(every, every > -math.inf) @ torch.cat((value, global_value), 2))
    return joined(module, 0.5 * (weights(near, near > -math.inf) @ value) + 0.5 * (weights(far, far > -math.inf) @ global_value))


def cross_memory(module: CrossMemoryAttention, x: Tensor, memory: Tensor | None, mask: Tensor | None) -> Tensor:
    query, key, value = projected(module, x, memory)
    seen = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=x.device) if mask is None else ~mask[:, None, None, :]
    return joined(module, weights(scores(query, key), seen) @ value)


STRIDED: dict[str, dict[str, Any]] = {
    "default": {},
    "stride 1": {"stride": 1},
    "phase": {"stride": 3, "phase": 2},
    "own token": {"stride": 3, "phase": 1, "include_self": True},
    "causal": {"causal": True},
    "causal, phase": {"stride": 3, "phase": 2, "causal": True},
    "causal, own token": {"stride": 3, "phase": 1, "include_self": True, "causal": True},
}
LOCAL_GLOBAL: dict[str, dict[str, Any]] = {
    **{f"{mode}, {how}": {"global_mode": mode, "combine": how} for mode in ("summary", "first", "topk") for how in ("joint", "average")},
    "first, joint, causal": {"global_mode": "first", "causal": True},
    "first, average, causal": {"global_mode": "first", "combine": "average", "causal": True},
    **{f"no globals, {mode}": {"num_global_tokens": 0, "global_mode": mode} for mode in ("summary", "first", "topk")},
}


def make_strided(options: dict[str, Any], **factory: Any) -> StridedAttention:
    return StridedAttention(**{"stride": 4, "dim": DIM, "num_heads": HEADS, **options, **(factory or DOUBLE)})


def make_local_global(options: dict[str, Any], **factory: Any) -> LocalGlobalAttention:
    given = {"local_window": 8, "num_global_tokens": 3, "dim": DIM, "num_heads": HEADS, **options, **(factory or DOUBLE)}
    return LocalGlobalAttention(**given)


def make_cross(**factory: Any) -> CrossMemoryAttention:
    return CrossMemoryAttention(DIM, HEADS, **(factory or DOUBLE))


MODULES: dict[str, Callable[..., Projections]] = {
    **{f"strided, {name}": lambda options=options, **f: make_strided(options, **f) for name, options in STRIDED.items()},
    **{f"local-global, {name}": lambda options=options, **f: make_local_global(options, **f) for name, options in LOCAL_GLOBAL.items()},
    "cross-memory": make_cross,
}
EACH_MODULE = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


def outcome(call: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    """The output and the gradients of a loss that tells its elements apart."""
    out = call()
    loss = (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype, device=out.device).view(out.shape).cos()).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [out, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """64 roundings at the scale of the largest number of each."""
    for a, b in zip(ours, theirs, strict=True):
        bound = 64 * torch.finfo(b.dtype).eps * max(1.0, b.detach().abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


# values and gradients


@MASKED
@EACH_LENGTH
@pytest.mark.parametrize("options", STRIDED.values(), ids=STRIDED.keys())
def test_strided_is_its_definition(options: dict[str, Any], n: int, masked: bool) -> None:
    module, x, mask = make_strided(options), tokens(n), padding(n) if masked else None
    leaves = (x, *module.parameters())
    assert_equal(outcome(lambda: module(x, mask), *leaves), outcome(lambda: strided(module, x, mask), *leaves))


@MASKED
@EACH_LENGTH
@pytest.mark.parametrize("options", LOCAL_GLOBAL.values(), ids=LOCAL_GLOBAL.keys())
def test_local_global_is_its_definition(options: dict[str, Any], n: int, masked: bool) -> None:
    module, x, mask = make_local_global(options), tokens(n), padding(n) if masked else None
    leaves = (x, *module.parameters())
    assert_equal(outcome(lambda: module(x, mask), *leaves), outcome(lambda: local_global(module, x, mask), *leaves))


@MASKED
@pytest.mark.parametrize("m", [None, 1, 5, 33])
@pytest.mark.parametrize("n", [1, 17])
def test_cross_memory_is_its_definition(n: int, m: int | None, masked: bool) -> None:
    module, x, memory = make_cross(), tokens(n), None if m is None else tokens(m)
    mask = padding(m or n) if masked else None
    leaves = (x, *module.parameters(), *([] if memory is None else [memory]))
    expected = outcome(lambda: cross_memory(module, x, memory, mask), *leaves)
    assert_equal(outcome(lambda: module(x, memory, False, mask), *leaves), expected)
    assert_equal([module(x, memory, memory_key_padding_mask=mask)], [expected[0] + x])


@pytest.mark.parametrize("options", [STRIDED["phase"], STRIDED["causal, phase"]], ids=["phase", "causal, phase"])
def test_strided_takes_the_originals_masks_for_each_query(options: dict[str, Any]) -> None:
    module, x = make_strided(options), tokens(17)
    seen = len(range(module.phase, 17, module.stride))
    for shape in ((B, 17, seen), (B, HEADS, 17, seen)):
        mask = torch.rand(shape, device=DEVICE) > 0.5
        mask[:, ..., 0] = False
        query, key, value = projected(module, x)
        grid = slice(module.phase, None, module.stride)
        rule = shown(x, None, module.causal)[..., grid] & ~(mask if mask.ndim == 4 else mask[:, None])
        expected = joined(module, weights(scores(query, key[:, :, grid]), rule) @ value[:, :, grid])
        assert_equal([module(x, mask)], [expected])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_fusion_mixes_by_a_number_or_by_a_gate_that_learns(ratio: float) -> None:
    module, x, memory = make_cross(), tokens(5), tokens(9)
    cross = cross_memory(module, x, memory, None).detach()
    assert_equal([module.fuse_with_memory(x, memory, ratio)], [ratio * cross + (1 - ratio) * x])
    for shape in ((), (DIM,), (B, 1, 1), (B, 5, DIM)):
        gate = torch.full(shape, ratio, **DOUBLE).requires_grad_()
        ours, theirs = module.fuse_with_memory(x, memory, gate), gate * cross + (1 - gate) * x
        assert_equal([ours, *torch.autograd.grad(ours.sum(), gate)], [theirs, *torch.autograd.grad(theirs.sum(), gate)])


@pytest.mark.parametrize(
    ("kind", "double"),
    [("strided", False), ("local_global", False), ("cross_memory", False), ("cross_memory", True), ("dense", False)],
)
def test_a_block_normalises_after_adding_once(kind: str, double: bool) -> None:
    options = {"compat_double_residual": True} if double else {}
    block = HierarchicalAttentionBlock(DIM, HEADS, kind, dropout=0.3, **options, **DOUBLE).eval()
    x, mask = tokens(17), padding(17)
    attended = {
        "strided": lambda: strided(block.attention, x, mask),  # type: ignore[arg-type]
        "dense": lambda: strided(block.attention, x, mask),  # type: ignore[arg-type]
        "local_global": lambda: local_global(block.attention, x, mask),  # type: ignore[arg-type]
        "cross_memory": lambda: cross_memory(block.attention, x, None, mask),  # type: ignore[arg-type]
    }[kind]()
    first = nn.functional.layer_norm(x + attended + (x if double else 0), (DIM,), block.norm1.weight, block.norm1.bias)
    expected = nn.functional.layer_norm(first + block.ffn(first), (DIM,), block.norm2.weight, block.norm2.bias)
    assert_equal([block(x, mask=mask)], [expected])


# the originals' defects


def test_tokens_beyond_the_window_do_not_leak() -> None:
    module, x = make_local_global({"num_global_tokens": 0, "local_window": 8}), tokens(40)
    (gradient,) = torch.autograd.grad(module(x)[:, 20].square().sum(), x)
    reached = gradient.abs().sum((0, 2)).nonzero()[:, 0].tolist()
    assert reached == list(range(16, 25))


@pytest.mark.parametrize("combine", ["joint", "average"])
@pytest.mark.parametrize(("mode", "learned"), [("summary", "global_queries"), ("topk", "saliency")])
def test_global_tokens_learn(mode: str, learned: str, combine: str) -> None:
    module = make_local_global({"global_mode": mode, "combine": combine})
    module(tokens(17)).square().sum().backward()
    gradient = getattr(module, learned).grad
    assert gradient is not None
    assert (gradient.abs().sum(-1) > 0).all()


@EACH_MODULE
def test_masks_act(make: Callable[..., Projections]) -> None:
    """What is ignored changes no other token, whatever finite number it is; and what is not, does."""
    module, x = make(), tokens(17).detach()
    mask = torch.zeros(B, 17, dtype=torch.bool, device=DEVICE)
    mask[:, 5:9] = True
    kept = ~mask[0]
    other = x.clone()
    other[:, 5:9] = 1e3
    masks = (None, False, mask) if isinstance(module, CrossMemoryAttention) else (mask,)
    assert_equal([module(other, *masks)[:, kept]], [module(x, *masks)[:, kept]])
    assert (module(other) - module(x))[:, kept].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["strided", "local_global", "cross_memory", "dense"])
def test_no_block_needs_a_memory(kind: str) -> None:
    block = HierarchicalAttentionBlock(DIM, HEADS, kind, **DOUBLE).eval()
    x = tokens(9)
    assert block(x).isfinite().all()
    if kind == "cross_memory":
        assert_equal([block(x)], [block(x, x)])
        assert block(x, x[:, :0]).isfinite().all()
        assert (block(x, tokens(4)) - block(x)).abs().max() > 1e-3


@EACH_MODULE
def test_causal_modules_leak_nothing_and_the_others_mix(make: Callable[..., Projections]) -> None:
    module, x = make(), tokens(17)
    (gradient,) = torch.autograd.grad(module(x)[:, 8].square().sum(), x)
    later = gradient[:, 9:].abs().sum()
    assert (later == 0) if getattr(module, "causal", False) else (later > 0)
    assert gradient[:, :8].abs().sum() > 0


@EACH_LENGTH
def test_fewer_tokens_than_globals_are_no_index_error(n: int) -> None:
    for options in LOCAL_GLOBAL.values():
        module = make_local_global({**options, "num_global_tokens": 10})
        assert module(tokens(n)).isfinite().all()


@EACH_MODULE
def test_no_tokens_give_no_tokens(make: Callable[..., Projections]) -> None:
    assert make()(tokens(0)).shape == (B, 0, DIM)
    assert make()(tokens(3, batch=0)).shape == (0, 3, DIM)


def test_only_strided_tokens_get_keys() -> None:
    lengths: list[int] = []
    for options in (STRIDED["phase"], STRIDED["causal, phase"]):
        module = make_strided(options)
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            projection.register_forward_hook(lambda _, given, out: lengths.append(given[0].shape[1]))
        module(tokens(17))
    assert lengths == [17, 5, 5] * 2
