"""Peers behind their guards: absent without their library, called as the library wants to be, and aimed at where a shape is known."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import compositions, dilated_peers, flex_peers, linear_peers, mamba_peers, on_gpu, peers, targets
from triton_attn import CATALOG, bench
from triton_attn.mechanism import Case
from triton_attn.testing import inputs


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's, of tensors whose heads come after the steps."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


LIBRARIES = (
    "fla",
    "liger_kernel",
    "flash_attn",
    "local_attention",
    "natten",
    "dilated_attention_pytorch",
    "xformers",
    "mambapy",
    "mamba_ssm",
    "causal_conv1d",
    "performer_pytorch",
)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module of some functions where a library would be, and its packages above it."""

    def pretend(name: str, **functions: Any) -> None:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            full = ".".join(parts[:end])
            if full not in sys.modules or end == len(parts):
                module = ModuleType(full)
                module.__spec__ = ModuleSpec(full, None, is_package=True)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, full, module)
        for function, does in functions.items():
            monkeypatch.setattr(sys.modules[name], function, does, raising=False)

    return pretend


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name.split(".")[0] in LIBRARIES else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)


@pytest.mark.usefixtures("no_libraries")
@pytest.mark.parametrize("gpu", [False, True])
def test_without_their_libraries_only_torchs_and_transformers_own_peers_are_left(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    added = {row.name: set(peers.beside(row).peers) - set(row.peers) for row in CATALOG.values()}
    assert added["attention"] == ({"SDPA cuDNN", "SDPA flash", "SDPA efficient", "FlexAttention"} if gpu else set())
    assert added["selective_scan"] <= {"transformers' loop"}
    assert added["performer_attention"] == added["add_layer_norm"] == added["causal_conv1d"] == set()
    assert added["linear_attention"] == {"einsum", "einsum, compiled"}
    assert added["dilated_attention"] == {"torchscale's way", "FlexAttention for each branch"}
    assert all(added[name] == {"FlexAttention"} for name in ("strided_attention", "local_global_attention", "subset_attention"))


def test_with_their_libraries_every_peer_has_its_row(library: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in (*LIBRARIES, "flash_attn.cute", "selective_scan_cuda"):
        library(name)
    library("local_attention", LocalAttention=None)
    added = {row.name: set(peers.beside(row).peers) - set(row.peers) for row in CATALOG.values()}
    assert added["attention"] >= {"FA4", "fla"}
    assert added["attention_varlen"] == {"fla"}
    assert added["linear_attention"] == {"einsum", "einsum, compiled", "fla chunk", "fla fused chunk"}
    assert added["dilated_attention"] >= {"dilated-attention-pytorch"}
    assert added["performer_attention"] == {"performer-pytorch"}
    assert added["add_layer_norm"] == {"fla", "eager sum, Liger"}
    assert added["causal_conv1d"] == {"causal-conv1d", "fla"}
    assert added["selective_scan"] >= {"mambapy", "mamba-ssm"}
    assert added["local_global_attention"] == {"FlexAttention", "local-attention", "natten", "FA4"}


def drawn(name: str, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors, options = inputs.draw(CATALOG[name], case, dtype=torch.float32)
    tensors.pop("seed", None)
    return tensors, options


HEADS = {"b": 1, "h": 2, "g": 2, "m": 9, "n": 9, "d": 4, "e": 4}


@pytest.mark.parametrize("way", ["chunk", "fused chunk"])
@pytest.mark.parametrize("feature_map", ["elu", "relu", "crelu", "identity"])
def test_flas_linear_attention_is_given_features_in_its_layout(
    library: Callable[..., None], monkeypatch: pytest.MonkeyPatch, way: str, feature_map: str
) -> None:
    """A stand-in that computes what fla documents, for tensors of (batch, steps, heads, width)."""
    seen: list[str] = []

    def documented(name: str) -> Callable[..., Any]:
        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, normalize: bool = True) -> tuple[Tensor, None]:
            seen.append(name)
            weights = torch.einsum("bihd,bjhd->bhij", q * (scale or q.shape[-1] ** -0.5), k).tril()
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-6) if normalize else weights
            return torch.einsum("bhij,bjhe->bihe", weights, v), None

        return attend

    library("fla.ops.linear_attn", chunk_linear_attn=documented("chunk"), fused_chunk_linear_attn=documented("fused chunk"))
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        fla = linear_peers.of_linear_attention()[f"fla {way}"]
    row = CATALOG["linear_attention"]
    options = {"causal": True, "feature_map": feature_map, "normalize": feature_map != "identity"}
    sizes = row.fitted({**HEADS, "f": 4}, options)
    tensors, options = drawn("linear_attention", Case("small", sizes, options))
    out = fla(**tensors, **options)
    torch.testing.assert_close(out, row.call(**tensors, **options), rtol=1e-3, atol=1e-4)
    assert seen == [way]
    with pytest.raises(NotImplementedError, match="causal, one key head"):
        fla(**tensors, **{**options, "causal": False})


def test_flas_attention_is_causal_and_given_its_layout(library: Callable[..., None]) -> None:
    def parallel_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, True)

    library("fla.ops.attn", parallel_attn=parallel_attn)
    tensors, options = drawn("attention", Case("small", HEADS, {"causal": True}))
    torch.testing.assert_close(peers._fla_attention(**tensors, **options), CATALOG["attention"].call(**tensors, **options))
    with pytest.raises(NotImplementedError, match="causal attention"):
        peers._fla_attention(**tensors)


def test_flas_packed_attention_counts_the_query_into_its_window(library: Callable[..., None]) -> None:
    def parallel_attn(q: Tensor, k: Tensor, v: Tensor, window_size: int | None, cu_seqlens: Tensor) -> Tensor:
        assert cu_seqlens.dtype == torch.int64
        places = torch.arange(q.shape[1])
        sequence = torch.searchsorted(cu_seqlens, places, right=True)
        apart = places[:, None] - places
        mask = (sequence[:, None] == sequence) & (apart >= 0) & (apart < (window_size or 10**9))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    library("fla.ops.attn", parallel_attn=parallel_attn)
    row = CATALOG["attention_varlen"]
    options = {"cu_seqlens_q": "growing", "cu_seqlens_k": "growing", "causal": True}
    for window in ((-1, -1), (3, -1)):
        case = Case("small", {"m": 24, "n": 24, "h": 2, "g": 2, "d": 8, "e": 8, "p": 4}, {**options, "window_size": window})
        tensors, given = drawn(row.name, case)
        torch.testing.assert_close(peers._fla_varlen(**tensors, **given), row.call(**tensors, **given))
    with pytest.raises(NotImplementedError, match="causal attention of sequences"):
        peers._fla_varlen(**tensors, causal=False)


def test_fa4_is_given_its_layout(library: Callable[..., None]) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, None]:
        return softmax_attention(q, k, v, causal), None

    library("flash_attn.cute", flash_attn_func=flash_attn_func)
    tensors, options = drawn("attention", Case("small", HEADS, {"causal": True}))
    torch.testing.assert_close(peers._fa4(**tensors, **options), CATALOG["attention"].call(**tensors, **options))


NORM = Case("small", {"b": 2, "l": 3, "d": 8, "r": 2}, {"residual": "normal", "weight": "normal", "bias": "normal"})


@pytest.mark.parametrize("kept_in", ["fla.modules.norm.layernorm", "fla.modules.layernorm"])
def test_norms_of_fla_and_liger_add_the_residual_once(library: Callable[..., None], kept_in: str) -> None:
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x if residual is None else x + residual, x.shape[-1:], weight, bias, eps)

    class Function:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    library(kept_in, layer_norm=layer_norm)
    library("liger_kernel.ops.layer_norm", LigerLayerNormFunction=Function)
    tensors, options = drawn("add_layer_norm", NORM)
    ours = CATALOG["add_layer_norm"].call
    for peer in peers.of_add_layer_norm().values():
        torch.testing.assert_close(peer(**tensors, **options), ours(**tensors, **options))
    torch.testing.assert_close(peers._liger_norm(**tensors, alpha=2.0), ours(**tensors, alpha=2.0))
    with pytest.raises(NotImplementedError, match="no alpha"):
        peers._fla_norm(**tensors, alpha=2.0)


@pytest.mark.parametrize("kept_in", ["fla.modules.causal_conv1d", "fla.modules.conv"])
def test_flas_convolution_is_given_steps_before_channels(library: Callable[..., None], kept_in: str) -> None:
    def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> tuple[Tensor, None]:
        rows = F.pad(x.mT, (weight.shape[1] - 1, 0))
        out = F.conv1d(rows, weight[:, None], bias, groups=x.shape[-1])
        return (F.silu(out) if activation == "silu" else out).mT, None

    library(kept_in, causal_conv1d=causal_conv1d)
    sizes = {"b": 2, "d": 6, "l": 7, "k": 4, "j": 3}
    tensors, options = drawn("causal_conv1d", Case("small", sizes, {"activation": "silu", "bias": "normal"}))
    given = {name: tensor for name, tensor in tensors.items() if name in ("x", "weight", "bias")}
    torch.testing.assert_close(mamba_peers._fla_conv1d(**given, **options), CATALOG["causal_conv1d"].call(**given, **options))
    with pytest.raises(NotImplementedError, match="no states"):
        mamba_peers._fla_conv1d(**given, initial_states=given["x"])


def test_performer_pytorch_is_made_once_for_the_features_and_direction(library: Callable[..., None]) -> None:
    made: list[tuple[int, int, bool]] = []

    class FastAttention(torch.nn.Module):
        def __init__(self, dim_heads: int, nb_features: int, causal: bool) -> None:
            super().__init__()
            made.append((dim_heads, nb_features, causal))
            self.causal = causal

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)

    library("performer_pytorch", FastAttention=FastAttention)
    linear_peers._fast_attention.cache_clear()
    tensors, _ = drawn("performer_attention", Case("small", {**HEADS, "f": 6}))
    del tensors["initial_normalizer"], tensors["initial_level"]
    for causal in (False, True, True):
        expected = F.scaled_dot_product_attention(tensors["query"], tensors["key"], tensors["value"], is_causal=causal)
        torch.testing.assert_close(linear_peers._performer_pytorch(**tensors, causal=causal), expected)
    assert made == [(4, 6, False), (4, 6, True)]
    with pytest.raises(NotImplementedError, match="no shared keys"):
        linear_peers._performer_pytorch(**tensors, kernel_epsilon=0.0)
    linear_peers._fast_attention.cache_clear()


def test_natten_and_fa4_are_given_a_window_in_their_layout(library: Callable[..., None]) -> None:
    def banded(q: Tensor, k: Tensor, v: Tensor, half: int) -> Tensor:
        places = torch.arange(q.shape[1])
        mask = (places[:, None] - places).abs() <= half
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    library("natten.functional", na1d=lambda q, k, v, kernel_size: banded(q, k, v, kernel_size // 2))
    library("flash_attn.cute", flash_attn_func=lambda q, k, v, window_size: (banded(q, k, v, window_size[0]), None))
    row = CATALOG["local_global_attention"]
    tensors, options = drawn(row.name, Case("small", {**HEADS, "c": 0}, {"window": 4}))
    ours = row.call(**tensors, **options)
    for peer in (peers._natten, peers._fa4_window):
        torch.testing.assert_close(peer(**tensors, **options), ours)
        with pytest.raises(NotImplementedError, match="a window alone"):
            peer(**tensors, **options, global_tokens=2)


# peers that need nothing but torch compute what ours does


DILATED: dict[str, Any] = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_mixes_the_branches_of_dilated_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **how: call)  # compiled for a CPU it has no log-sum-exp
    row = CATALOG["dilated_attention"]
    tensors, options = drawn(row.name, Case("small", {"b": 1, "h": 2, "g": 2, "m": 32, "d": 16, "e": 16}, DILATED))
    with torch.no_grad():
        found = dilated_peers.of_dilated_attention()["FlexAttention for each branch"](**tensors, **options)
    torch.testing.assert_close(found, row.call(**tensors, **options), rtol=1e-3, atol=1e-4)


def test_dilated_attention_pytorch_is_asked_for_heads_of_each_branch(library: Callable[..., None]) -> None:
    made: list[Any] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        made.append((tuple(q.shape), is_causal))
        return q

    def module(segment_lengths: Any, dilation_rates: Any) -> Callable[..., Tensor]:
        made.append((segment_lengths, dilation_rates))
        return attend

    library("dilated_attention_pytorch.dilated_attention", DilatedAttention=module)
    dilated_peers._dilated_module.cache_clear()
    tensors, options = drawn("dilated_attention", Case("small", {"b": 1, "h": 2, "g": 2, "m": 32, "d": 16, "e": 16}, DILATED))
    out = dilated_peers._dilated_attention_pytorch(**tensors, **options, mode="head_group", causal=True)
    assert made == [((8, 16), (1, 2)), ((1, 32, 2, 16), True)]
    assert out.shape == tensors["query"].shape
    with pytest.raises(NotImplementedError, match="heads of its own"):
        dilated_peers._dilated_attention_pytorch(**tensors, **options)
    dilated_peers._dilated_module.cache_clear()


@pytest.mark.slow  # compiles
def test_flex_attention_sees_summaries_before_the_keys() -> None:
    row, how = CATALOG["local_global_attention"], {"window": 8, "global_key": "normal", "global_value": "normal"}
    tensors, options = drawn(row.name, Case("small", {"b": 1, "h": 2, "g": 2, "m": 32, "d": 16, "e": 16, "c": 3}, how))
    with torch.no_grad():
        found = flex_peers.flex_local_global()(**tensors, **options)
    torch.testing.assert_close(found, row.call(**tensors, **options), rtol=1e-3, atol=1e-4)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("row", compositions.ROWS, ids=lambda row: row.name)
def test_a_composition_is_what_its_peers_compute(row: Any) -> None:
    small = {"b": 2, "h": 2, "g": 2, "m": 64, "n": 64, "d": 16, "e": 16, "f": 32}
    options = {"block": 8, "causal": True} if row is compositions.STRIDED else {"rows": 8, "stages": 2}
    tensors, options = inputs.draw(row, Case("small", {axis: small[axis] for axis in row.workloads["cuda"][0].sizes}, options))
    with torch.no_grad():
        ours = row.call(**tensors, **options)
        for name in sorted(row.peers.keys() - {"dense, causal"}):
            torch.testing.assert_close(row.peers[name](**tensors, **options), ours, rtol=1e-3, atol=1e-4)
    for case in row.workloads["cuda"]:
        assert row.work(case.sizes, case.options, 2).flops > 0


@pytest.mark.parametrize("name", ["einsum", "cosines"])
@pytest.mark.parametrize("way", ["whole", "causal"])
def test_sums_operator_by_operator_are_ours(name: str, way: str) -> None:
    row = CATALOG["linear_attention" if name == "einsum" else "meta_hydra_attention"]
    sizes = {**HEADS, "f": 4} if name == "einsum" else {"b": 2, "r": 2, "h": 2, "m": 9, "n": 9, "d": 8}
    tensors, options = drawn(row.name, Case("small", sizes, {"causal": way == "causal"}))
    peer = peers.beside(row).peers[name]
    if (name, way) == ("einsum", "causal"):
        with pytest.raises(NotImplementedError, match="sees all keys"):
            peer(**tensors, **options)
    else:
        torch.testing.assert_close(peer(**tensors, **options), row.call(**tensors, **options), rtol=1e-3, atol=1e-5)


# what is aimed at


def test_every_target_is_of_a_workload_that_exists_and_of_a_peer_that_some_machine_has(
    library: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in (*LIBRARIES, "flash_attn.cute", "selective_scan_cuda"):
        library(name)
    library("local_attention", LocalAttention=None)
    rows = {row.name: row for row in (*map(peers.beside, CATALOG.values()), *compositions.ROWS)}
    for (mechanism, workload, direction), aims in targets.RATIOS.items():
        assert direction in (bench.FORWARD, bench.BOTH)
        assert all(0.5 < aim <= 50 for aim in aims.values())
        assert workload in {case.name for case in rows[mechanism].workloads["cuda"]}, (mechanism, workload)
        assert set(aims) <= set(rows[mechanism].peers), (mechanism, workload)
    for mechanism, workload, _ in targets.TIMES:
        assert workload in {case.name for case in rows[mechanism].workloads["cuda"]}, (mechanism, workload)


def test_each_ratio_stands_beside_its_target(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = CATALOG["attention"]

    def timed(given: Any, case: Case, peer: str, direction: str, *args: Any, **options: Any) -> bench.Timing:
        if peer == "SDPA flash":
            raise NotImplementedError("no mask")
        ratio = 1.0 if peer == "SDPA cuDNN" else 0.5
        return bench.Timing(row.name, case.name, "", "bfloat16", "NVIDIA H200", direction, "kernel", 1.0, peer, ratio, ratio, 9, None)

    monkeypatch.setattr(on_gpu, "CATALOG", {"attention": row})
    monkeypatch.setattr(compositions, "ROWS", ())
    monkeypatch.setitem(targets.TIMES, (row.name, "dense d64", bench.FORWARD), 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "time_beside", timed)
    rows = [check.run() for check in on_gpu.peers()]
    found = {(each["case"], each["peer"], each["direction"]): each for each in rows}
    dense = found["dense d128", "SDPA cuDNN", bench.FORWARD]
    assert (dense["target"], dense["reached"]) == (0.92, True)
    assert found["dense d128", "FlexAttention", bench.FORWARD]["reached"] is False
    assert "target" not in found["dense d128", "torch SDPA", bench.FORWARD]
    assert found["dense d64", "SDPA flash", bench.FORWARD]["not run"] == "NotImplementedError: no mask"
    said = capsys.readouterr().out
    assert "attention dense d128, forward, beside SDPA cuDNN: 1.00, target 0.92 (on an H200)\n" in said
    assert "attention dense d128, forward, beside FlexAttention: 0.50, target 1.25 (on an H200): missed\n" in said
    assert "attention dense d128, forward, beside torch SDPA: 0.50\n" in said
    assert found["dense d64", "torch SDPA", bench.FORWARD]["in_time"] is False
    assert "beside torch SDPA: 0.50; 1.000 ms of at most 0.5 (on an H200): missed\n" in said
