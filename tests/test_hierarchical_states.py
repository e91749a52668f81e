"""HierarchicalVLM's modules as modules: signatures, states, dropout, dtypes, compilation, refusals; and building them from data."""

from __future__ import annotations

import builtins
import copy
import inspect
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_attn
from triton_attn import ArgumentError, Unsupported, use_backend
from triton_attn.nn import (
    CrossMemoryAttention,
    HierarchicalAttentionBlock,
    LocalGlobalAttention,
    MultiheadAttention,
    StridedAttention,
    build,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, HEADS, B, N = 24, 3, 2, 17
ROOT = Path(__file__).parents[1]
ORIGINAL: dict[str, Any] = {"global_mode": "first", "combine": "average"}
EVERY: list[Any] = [
    pytest.param(lambda **more: StridedAttention(4, DIM, HEADS, **more), id="strided"),
    pytest.param(lambda **more: StridedAttention(4, DIM, HEADS, causal=True, include_self=True, **more), id="strided, causal, own token"),
    pytest.param(lambda **more: LocalGlobalAttention(8, 3, DIM, HEADS, **more), id="summary"),
    pytest.param(lambda **more: LocalGlobalAttention(8, 3, DIM, HEADS, global_mode="topk", **more), id="topk"),
    pytest.param(lambda **more: LocalGlobalAttention(8, 3, DIM, HEADS, **ORIGINAL, **more), id="first, average"),
    pytest.param(lambda **more: CrossMemoryAttention(DIM, HEADS, **more), id="cross-memory"),
]
EACH = pytest.mark.parametrize("make", EVERY)
# one of each class; the others compile in the full run
OF_A_CLASS = [
    x if x.id in ("strided", "summary", "cross-memory") else pytest.param(*x.values, id=x.id, marks=pytest.mark.slow) for x in EVERY
]


def tokens(n: int = N) -> Tensor:
    return torch.randn(B, n, DIM, device=DEVICE)


def original_state(*extra: str, prefix: str = "") -> dict[str, Tensor]:
    """The names and shapes that HierarchicalVLM's attention modules save."""
    names = [f"{projection}_proj.{part}" for projection in ["q", "k", "v", "out"] for part in ("weight", "bias")]
    state = {prefix + name: torch.randn((DIM, DIM) if "weight" in name else (DIM,)) for name in names}
    return state | {prefix + name: torch.randn(3) for name in extra}


def original_block(*extra: str) -> dict[str, Tensor]:
    rest: dict[str, tuple[int, ...]] = {"ffn.0.weight": (4 * DIM, DIM), "ffn.0.bias": (4 * DIM,)}
    rest |= {"ffn.3.weight": (DIM, 4 * DIM), "ffn.3.bias": (DIM,)}
    rest |= {f"norm{i}.{part}": (DIM,) for i in (1, 2) for part in ("weight", "bias")}
    return original_state(*extra, prefix="attention.") | {name: torch.randn(shape) for name, shape in rest.items()}


# signatures and states


def test_positional_arguments_are_the_originals() -> None:
    def positional(function: Any) -> list[tuple[str, Any]]:
        every = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in every if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]

    wide = [("dim", 768), ("num_heads", 12), ("dropout", 0.0)]
    assert positional(StridedAttention) == [("stride", 4), *wide]
    assert positional(LocalGlobalAttention) == [("local_window", 64), ("num_global_tokens", 4), *wide]
    assert positional(CrossMemoryAttention) == wide
    block = [("dim", 768), ("num_heads", 12), ("attention_type", "local_global"), ("dropout", 0.1)]
    assert positional(HierarchicalAttentionBlock) == block
    empty = inspect.Parameter.empty
    assert positional(StridedAttention.forward) == positional(LocalGlobalAttention.forward) == [("x", empty), ("mask", None)]
    assert positional(CrossMemoryAttention.forward)[:3] == [("local_features", empty), ("memory_tokens", None), ("residual", True)]
    fuse = [("local_features", empty), ("memory_tokens", empty), ("fusion_ratio", 0.5)]
    assert positional(CrossMemoryAttention.fuse_with_memory)[:3] == fuse
    assert positional(HierarchicalAttentionBlock.forward)[:2] == [("x", empty), ("memory", None)]


def test_the_originals_states_load_strictly() -> None:
    for module in (StridedAttention(4, DIM, HEADS), CrossMemoryAttention(DIM, HEADS)):
        state = original_state()
        module.load_state_dict(state, strict=True)
        assert all(torch.equal(module.state_dict()[name], state[name]) for name in state)
    state = original_state("global_token_indices")
    local_global = LocalGlobalAttention(8, 3, DIM, HEADS, **ORIGINAL)
    local_global.load_state_dict(state, strict=True)
    assert "global_token_indices" in state  # it is left as it was
    assert state.keys() - local_global.state_dict().keys() == {"global_token_indices"}
    kinds: dict[str, dict[str, Any]] = {"strided": {}, "cross_memory": {}, "local_global": {"num_global_tokens": 3, **ORIGINAL}}
    for kind, options in kinds.items():
        block = HierarchicalAttentionBlock(DIM, HEADS, kind, **options)
        whole = original_block(*(["global_token_indices"] if options else []))
        block.load_state_dict(whole, strict=True)
        assert all(torch.equal(found, whole[name]) for name, found in block.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"global_mode": "topk"}, {"global_mode": "first"}], ids=str)
def test_an_original_state_in_another_mode_loads_with_a_warning(options: dict[str, Any]) -> None:
    block = HierarchicalAttentionBlock(DIM, HEADS, num_global_tokens=3, **options)
    before = copy.deepcopy(block.state_dict())
    state = original_block("global_token_indices")
    with pytest.warns(UserWarning, match="this state was trained with global_mode='first', combine='average'"):
        block.load_state_dict(state, strict=True)
    for name, found in block.state_dict().items():
        assert torch.equal(found, state.get(name, before[name]))


@EACH
def test_a_state_goes_round_without_pickled_code(make: Any) -> None:
    module, other = make(), make()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = tokens().cpu()
    assert torch.equal(module(x), other(x))
    with pytest.raises(RuntimeError, match="q_proj"):
        other.load_state_dict({name: x for name, x in module.state_dict().items() if not name.startswith("q_proj")}, strict=True)


def test_a_seed_gives_the_originals_initial_values() -> None:
    for make in (parameter.values[0] for parameter in EVERY):
        torch.manual_seed(5)
        module = make()
        torch.manual_seed(5)
        for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
            assert torch.equal(projection.weight, nn.Linear(DIM, DIM).weight)


# training, dtypes, compilation


@EACH
def test_dropout_goes_by_the_seed_and_rests_in_evaluation(make: Any) -> None:
    module, x = make(dropout=0.5, device=DEVICE), tokens()
    plain = make(device=DEVICE)
    plain.load_state_dict(module.state_dict())

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = module(x)
        return found

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.allclose(seeded(1), seeded(2))
    torch.testing.assert_close(torch.stack([seeded(i) for i in range(100)]).mean(0), plain(x), rtol=0, atol=0.5)
    assert torch.equal(module.eval()(x), module(x))
    torch.testing.assert_close(module(x), plain(x))


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_runs_in_half_and_under_autocast(make: Any, dtype: torch.dtype) -> None:
    module, x = make(device=DEVICE), tokens()
    mask = torch.arange(N, device=DEVICE).expand(B, N) > 11
    call = (x, None, False, mask) if isinstance(module, CrossMemoryAttention) else (x, mask)
    expected = module(*call)
    with torch.autocast(DEVICE, dtype):
        out = module(*call)
        out.sum().backward()
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
    half = make(device=DEVICE, dtype=dtype)
    half.load_state_dict(module.state_dict())
    found = half(x.to(dtype), *call[1:])
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("make", OF_A_CLASS)
@pytest.mark.parametrize("backend", ["portable", pytest.param("triton", marks=pytest.mark.slow)])
def test_it_compiles_in_one_graph(make: Any, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    module, x = make(dropout=0.2, device=DEVICE), tokens(5).requires_grad_()
    mask = torch.arange(5, device=DEVICE).expand(B, 5) > 3
    call = (x, None, False, mask) if isinstance(module, CrossMemoryAttention) else (x, mask)
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    found = []
    for each in (compiled, module):
        torch.manual_seed(4)
        with use_backend(backend):
            out = each(*call)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["strided", "local_global", "cross_memory", "dense"])
def test_a_block_compiles_and_is_explained(kind: str) -> None:
    torch._dynamo.reset()
    block, x = HierarchicalAttentionBlock(DIM, HEADS, kind, device=DEVICE).eval(), tokens()
    compiled: Any = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    assert triton_attn.explain(block, x).mechanism in triton_attn.CATALOG


# refusals

WRONG: list[tuple[Any, str]] = [
    (lambda: StridedAttention(0), "StridedAttention: stride is 0; allowed: a whole number, 1 and more"),
    (lambda: StridedAttention(2.0), "stride is 2.0, a float"),  # type: ignore[arg-type]
    (lambda: StridedAttention(4, 24, 5), "num_heads is 5; allowed: a divisor of dim, 24"),
    (lambda: StridedAttention(4, 514, 3), "num_heads is 3; allowed: a divisor of dim, 514"),
    (lambda: StridedAttention(4, 24, 3, 1.5), "dropout is 1.5; allowed: 0 to 1"),
    (lambda: StridedAttention(4, 24, 3, phase=4), "phase is 4; allowed: a whole number, 0 to 3"),
    (lambda: StridedAttention(4, 24, 3, causal=1), "causal is 1, a int; allowed: True, False"),  # type: ignore[arg-type]
    (lambda: LocalGlobalAttention(-1), "local_window is -1"),
    (lambda: LocalGlobalAttention(8, -1), "num_global_tokens is -1; allowed: a whole number, 0 and more"),
    (lambda: LocalGlobalAttention(8, 0, combine="average"), "num_global_tokens is 0; allowed: a whole number, 1 and more"),
    (lambda: LocalGlobalAttention(global_mode="last"), "global_mode is 'last'; allowed: 'summary', 'first', 'topk'"),
    (lambda: LocalGlobalAttention(combine="sum"), "combine is 'sum'; allowed: 'joint', 'average'"),
    (lambda: HierarchicalAttentionBlock(24, 3, "sparse"), "attention_type is 'sparse'; allowed: 'strided', 'local_global',"),
    (lambda: HierarchicalAttentionBlock(24, 3, "strided", window=3), "window is no option of attention_type='strided'; allowed: stride,"),
    (lambda: HierarchicalAttentionBlock(24, 3, "cross_memory", stride=3), "stride is no option .*; allowed: no option"),
    (lambda: HierarchicalAttentionBlock(24, 3, compat_double_residual=True), "compat_double_residual is True with 'local_global'"),
    (lambda: StridedAttention(4, DIM, HEADS)(torch.zeros(5, DIM)), r"x has shape \(5, 24\); allowed: \(B, N, 24\)"),
    (lambda: StridedAttention(4, DIM, HEADS)(torch.zeros(1, 5, 7)), r"x has shape \(1, 5, 7\); allowed: \(B, N, 24\)"),
    (lambda: StridedAttention(4, DIM, HEADS)([1.0]), "x is a list; allowed: torch.Tensor"),
    (lambda: StridedAttention(4, DIM, HEADS)(tokens(5), torch.zeros(B, 4).bool()), r"mask has shape \(2, 4\); allowed: \(2, 5\) or"),
    (lambda: StridedAttention(4, DIM, HEADS)(tokens(5), torch.zeros(B, 5)), r"mask has dtype torch.float32; allowed: torch.bool \(True"),
    (lambda: LocalGlobalAttention(8, 3, DIM, HEADS)(tokens(5), torch.zeros(B, 4).bool()), r"mask has shape \(2, 4\); allowed: \(2, 5\)$"),
    (lambda: StridedAttention(4, DIM, HEADS)(tokens(5), [[True]]), "StridedAttention: mask is a list; allowed: torch.Tensor"),
    (lambda: LocalGlobalAttention(8, 3, DIM, HEADS)(tokens(5), "x"), "LocalGlobalAttention: mask is a str; allowed: torch.Tensor"),
    (
        lambda: CrossMemoryAttention(DIM, HEADS)(tokens(5), tokens(4), True, [[True]]),
        "memory_key_padding_mask is a list; allowed: torch.Tensor",
    ),
    (
        lambda: HierarchicalAttentionBlock(DIM, HEADS, "cross_memory")(tokens(5), tokens(4), torch.ones(9, 9)),
        "HierarchicalAttentionBlock: mask is given with a memory, .*; allowed: memory_key_padding_mask",
    ),
    (
        lambda: CrossMemoryAttention(DIM, HEADS).fuse_with_memory(tokens(5), tokens(4), torch.ones(1) * 1j),
        "fusion_ratio has dtype torch.complex64; allowed: of real numbers",
    ),
    (lambda: CrossMemoryAttention(DIM, HEADS)(tokens(5), tokens(5)[:1]), "memory_tokens has batch size 1; allowed: 2"),
    (
        lambda: CrossMemoryAttention(DIM, HEADS)(tokens(5), tokens(4), True, torch.zeros(B, 5).bool()),
        r"memory_key_padding_mask has shape \(2, 5\); allowed: \(2, 4\)",
    ),
    (lambda: CrossMemoryAttention(DIM, HEADS).fuse_with_memory(tokens(5), tokens(4), 1.5), "fusion_ratio is 1.5; allowed: 0 to 1"),
    (
        lambda: CrossMemoryAttention(DIM, HEADS).fuse_with_memory(tokens(5), tokens(4), torch.ones(4)),
        r"fusion_ratio has shape \(4,\); allowed: broadcastable to \(2, 5, 24\)",
    ),
    (lambda: HierarchicalAttentionBlock(DIM, HEADS)(tokens(5), tokens(4)), "memory is given to 'local_global'; allowed: to 'cross_memory'"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_what_no_kernel_gives_is_refused_by_name() -> None:
    for mode in ("summary", "topk"):
        with pytest.raises(Unsupported, match=f"LocalGlobalAttention cannot give causal .*{mode}.*; say global_mode='first'"):
            LocalGlobalAttention(8, 3, DIM, HEADS, global_mode=mode, causal=True)
    mask = torch.zeros(B, 5, 5, dtype=torch.bool)
    with pytest.raises(Unsupported, match=r"LocalGlobalAttention cannot give a mask for each query; give \(B, N\)"):
        LocalGlobalAttention(8, 3, DIM, HEADS)(tokens(5), mask)
    with pytest.raises(Unsupported, match="StridedAttention cannot give a mask for each query with include_self"):
        StridedAttention(1, DIM, HEADS, include_self=True)(tokens(5), mask)


# from data


def test_the_example_configuration_builds_every_module() -> None:
    modules = build(ROOT / "examples" / "configs" / "sparse_attention.yaml")
    assert isinstance(modules, nn.ModuleDict)
    x = torch.randn(1, 9, 768)
    for name, kind in (("strided", StridedAttention), ("local_global", LocalGlobalAttention), ("cross_memory", CrossMemoryAttention)):
        assert type(modules[name]) is kind
        assert modules[name](x).shape == x.shape
    assert modules["block"].attention_type == "cross_memory"


def test_a_mapping_builds_a_module_or_several() -> None:
    module = build({"type": "StridedAttention", "stride": 3, "dim": DIM, "num_heads": HEADS, "causal": True}, dtype=torch.float64)
    assert isinstance(module, StridedAttention)
    assert (module.stride, module.dim, module.causal, module.q_proj.weight.dtype) == (3, DIM, True, torch.float64)
    torch_s = build({"type": "MultiheadAttention", "embed_dim": DIM, "num_heads": HEADS, "batch_first": True})
    assert isinstance(torch_s, MultiheadAttention)
    block = build({"a": {"type": "HierarchicalAttentionBlock", "dim": DIM, "num_heads": HEADS, "local_window": 6, "global_mode": "topk"}})
    assert block.a.attention.local_window == 6  # type: ignore[union-attr]


NO_NAMES = ("", "a.b", "keys", "forward", "training")
BAD: list[tuple[Any, str]] = [
    ({}, "config has no type; allowed: StridedAttention, LocalGlobalAttention,"),
    ({"type": "Linear"}, "config has type 'Linear'; allowed: StridedAttention"),
    ({"type": 3}, "config has no type"),
    ({"stride": 4}, "config has the key 'stride' and no 'type'"),
    ({"a": {"stride": 4}}, "a has no type; allowed"),
    (
        {"a": {"type": "StridedAttention", "strid": 4, "fusion_method": 1}},
        "a has unknown keys strid, fusion_method; allowed: type, stride, dim",
    ),
    ({"type": "StridedAttention", "dtype": "float32"}, "config has unknown keys dtype"),
    ({"type": "StridedAttention", "stride": [4]}, "config has a list for stride; allowed: a number"),
    ({"type": "StridedAttention", "stride": "4"}, "StridedAttention: stride is '4', a str; allowed: a whole number"),
    ({"type": "MultiheadAttention", "embed_dim": 8}, "config lacks num_heads, which MultiheadAttention needs"),
    *(({name: {"type": "StridedAttention"}}, f"has a module named '{name}'; allowed: no dot") for name in NO_NAMES),
    *((given, f"config is a {kind}; allowed: a mapping, or the path") for given, kind in ((None, "NoneType"), ([1], "list"), (3, "int"))),
    ({"type": "HierarchicalAttentionBlock", "attention_type": "dense", "stride": 2}, "stride is no option of attention_type='dense'"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_wrong_configuration_names_the_key(config: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build(config)


NO_NUMBERS = ("2001-99-99", "!!int x", "!!int ''", "!!bool x", "!!timestamp x", "9" * 5000)
FILES = [
    ("- 1\n- 2\n", "config is a file that holds a list; allowed: a mapping"),
    ("", "config is a file that holds a NoneType"),
    ("type: [", "config is no YAML that can be read"),
    ("a: " + "[" * 5000, "config is no YAML that can be read"),
    ("type: !!python/object/apply:os.system ['touch /tmp/never']", "config is no YAML that can be read: could not determine a constructor"),
    *((f"stride: {number}", "config is no YAML that can be read") for number in NO_NUMBERS),
    ("#" * 65537, "config is a file of more than 65536 bytes"),
    ("a: &a [x, x]\nb: &b [*a, *a]\ntype: StridedAttention\nstride: *b", "config has unknown keys a, b"),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=[message[:40] for _, message in FILES])
def test_a_file_is_data_of_a_limited_size(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(ArgumentError, match=message):
        build(path)


def test_without_pyyaml_dictionaries_build_and_files_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "yaml":
            raise ModuleNotFoundError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert isinstance(build({"type": "CrossMemoryAttention"}), CrossMemoryAttention)
    with pytest.raises(ImportError, match=r"PyYAML: pip install 'triton-attn\[yaml\]', or pass a dictionary"):
        build("x.yaml")
