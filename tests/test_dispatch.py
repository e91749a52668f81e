"""What serves a call on which device: kernel, tiles, portable or reference, with the reason; told alike by the call and by explain."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_attn import CATALOG, ArgumentError, Unsupported, attention, device, dispatch, explain, operators, tiles, use_backend
from triton_attn.mechanism import Code
from triton_attn.tiles import Key, Tile

ROOT = Path(__file__).resolve().parents[1]
ROW = CATALOG["attention"]
KERNELS = {kernel.name: kernel for kernel in ROW.kernels}
KEYS = tuple(tiles.every_key())
NOTHING: dict[str, Any] = {"mask": None, "key_padding_mask": None, "seed": None}
PLAIN: dict[str, Any] = {"causal": "", "scale": 1.0, "dropout_p": 0.0}

# the interpreter's own promise is tested where it is on
interpreted = pytest.mark.skipif(not device.interpreting(), reason="needs the interpreter: TRITON_INTERPRET=1")


class OnCuda(torch.Tensor):
    """A tensor in ordinary memory that says it is on a GPU: strides and addresses are real."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)

    def view(self, *shape: Any) -> Tensor:
        return on_cuda(super().view(*shape))


def on_cuda(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnCuda)


def qkv(*shape: int, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    return {name: on_cuda(torch.zeros(shape or (1, 2, 64, 64), dtype=dtype)) for name in ("query", "key", "value")}


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend chosen, no warning given."""
    monkeypatch.setattr(dispatch._local, "backend", None, raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Pretend to have a GPU, a build of torch and a triton."""

    def be(capability: tuple[int, int], *, name: str = "NVIDIA test", hip: str | None = None, triton: str = "3.9.0") -> None:
        properties = SimpleNamespace(major=capability[0], minor=capability[1], name=name, multi_processor_count=1, total_memory=2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(device, "triton_version", lambda: triton)
        device.profile.cache_clear()

    yield be
    device.profile.cache_clear()


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shipped tables of one tile for each capability: block_n tells which."""
    pytest.importorskip("triton")
    spaces = {f"attention/{k.name}/{launch.name}": k.load().spaces[launch.name] for k in ROW.kernels for launch in k.launches}
    hashes = {launch: tiles.source_hash(space.modules) for launch, space in spaces.items()}
    for stem, block_n in (("sm_80", 32), ("sm_90", 128)):
        chosen = {str(key): Tile(64, block_n, 4, 2) for key in KEYS}
        made = {launch: {"hash": known, "evidence": "offline", "tiles": chosen} for launch, known in hashes.items()}
        tiles.write(tmp_path / f"{stem}.json", made, {})
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    monkeypatch.setattr(tiles.Space, "of", lambda self, capability, key: tuple(Tile(64, block_n, 4, 2) for block_n in (32, 128)))
    monkeypatch.setattr(device, "USER_TABLE", "")
    yield
    tiles.forget()


# which kernel, which tiles


def test_an_a100_runs_the_pointer_kernel_with_the_tiles_of_its_capability(machine: Machine, tables: None) -> None:
    machine((8, 0))
    explained = explain(attention, **qkv())
    assert (explained.path, explained.kernel) == ("kernel", "pointers")
    assert explained.reasons == {"descriptors": ("compiled and checked for sm_90, not for sm_80",)}
    source = "tile 64x32 w4 s2, shipped table sm_80.json (offline)"
    assert explained.tiles == dict.fromkeys(("forward", "backward_query", "backward_key"), source)


def test_a_hopper_gpu_runs_the_descriptor_kernel_with_the_tiles_of_its_capability(machine: Machine, tables: None) -> None:
    machine((9, 0))
    explained = explain(attention, **qkv(), causal=True)
    assert (explained.path, explained.kernel, dict(explained.reasons)) == ("kernel", "descriptors", {})
    assert explained.tiles["forward"] == "tile 64x128 w4 s2, shipped table sm_90.json (offline)"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_explain_names_the_tile_of_every_launch_that_a_training_step_makes(machine: Machine, capability: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    machine(capability)
    assert set(explain(attention, **qkv()).tiles) == {"forward", "backward_query", "backward_key"}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_wider_heads_than_any_kernels_take_the_portable_path(machine: Machine, capability: tuple[int, int]) -> None:
    machine(capability)
    explained = explain(attention, **qkv(1, 2, 8, 320))
    assert explained.path == "portable"
    assert "query has width 320; kernels serve up to 256" in str(explained)


HALF = torch.zeros(1, 2, 64, 256, dtype=torch.float16)
UNDESCRIBABLE: dict[str, tuple[dict[str, Any], str]] = {
    "a mask": ({"mask": on_cuda(torch.ones(64, 64) > 0)}, "mask is not read by bulk copies"),
    "padding": ({"key_padding_mask": on_cuda(torch.zeros(1, 64) > 0)}, "key_padding_mask is not read by bulk copies"),
    "float32": (qkv(dtype=torch.float32), "query has dtype torch.float32; bulk copies serve float16 and bfloat16"),
    "every second column": ({"key": on_cuda(HALF[..., :128:2])}, "key has strides (32768, 16384, 256, 2)"),
    "rows of 24 bytes": (qkv(1, 2, 64, 12), "query has strides (1536, 768, 12, 1); bulk copies need rows of 16 aligned bytes"),
    "rows at odd places": ({"value": on_cuda(HALF[..., :65].contiguous()[..., :64])}, "value has strides (8320, 4160, 65, 1)"),
    "a start between 16 bytes": ({"value": on_cuda(HALF[..., 1:65])}, "value does not start at a multiple of 16 bytes"),
}


@pytest.mark.parametrize(("change", "reason"), UNDESCRIBABLE.values(), ids=UNDESCRIBABLE.keys())
def test_a_hopper_gpu_runs_the_pointer_kernel_where_bulk_copies_cannot_and_says_why(
    machine: Machine, tables: None, change: dict[str, Any], reason: str
) -> None:
    machine((9, 0))
    explained = explain(attention, **(qkv() | change))
    assert explained.kernel == "pointers"
    assert reason in "; ".join(explained.reasons["descriptors"])
    assert "sm_90.json" in explained.tiles["forward"]


def test_rows_that_are_sliced_at_16_bytes_keep_the_descriptor_kernel(machine: Machine) -> None:
    machine((9, 0))
    given = {"query": on_cuda(HALF[..., :64]), "key": on_cuda(HALF[..., 64:128]), "value": on_cuda(HALF[..., 8:40])}
    assert dispatch.pick(ROW, given | NOTHING, PLAIN).name == "descriptors"


def operand_bytes(launch: str, tile: Tile, key: Key) -> int:
    """The least that the two streamed operands take: every stage but the one in registers. The compiler says the whole of it."""
    streamed = tile.block_m if launch == "backward_key" else tile.block_n
    return 2 * streamed * max(tile.num_stages - 1, 1) * key.width * (2 if key.operands == "16bit" else 4)


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)])
def test_a_smaller_gpu_gets_tiles_whose_operands_fit_its_99_kib(capability: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    kernel = KERNELS["pointers"]
    assert not dispatch.capability_refusal(kernel, capability)
    for launch in kernel.launches:
        for key in KEYS:
            full, space = f"attention/pointers/{launch.name}", kernel.load().spaces[launch.name]
            found = tiles.look_up(full, space, key, device.Profile("NVIDIA test", capability))
            assert operand_bytes(launch.name, found.tile, key) <= 99 * 1024, (launch.name, key, found)


# portable, with a reason

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Turing": ({"capability": (7, 5)}, "needs compute capability 8.0 or higher, this GPU has 7.5"),
    "Blackwell": ({"capability": (10, 0)}, "compute capability 10.0 is not measured yet"),
    "Blackwell at home": ({"capability": (12, 0)}, "compute capability 12.0 is not measured yet"),
    "ROCm": ({"capability": (9, 4), "hip": "6.4"}, "ROCm is not measured yet"),
    "ROCm with a capability like Hopper's": ({"capability": (9, 0), "hip": "6.4"}, "ROCm is not measured yet"),
    "no triton": ({"capability": (9, 0), "triton": ""}, "triton is not installed"),
    "a bad triton": ({"capability": (8, 0), "triton": "3.8.0"}, "triton 3.8.0"),
}


@pytest.mark.parametrize(("gpu", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_gpu_that_no_kernel_serves_runs_portable_and_warns_once_where_it_was_called(
    machine: Machine, gpu: dict[str, Any], reason: str
) -> None:
    machine(**gpu)
    with pytest.warns(UserWarning, match="takes its portable path") as warned:
        first = attention(**qkv())
    assert reason in str(warned[0].message)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attention(**qkv()), first)


@pytest.mark.filterwarnings("ignore:.*takes its portable path")
@pytest.mark.parametrize(("gpu", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_explain_and_the_refusal_of_a_kernel_give_the_same_reason(machine: Machine, gpu: dict[str, Any], reason: str) -> None:
    machine(**gpu)
    assert f"attention runs its portable path\n  not a kernel: {reason}" in str(explain(attention, **qkv()))
    with use_backend("triton"), pytest.raises(Unsupported) as refused:
        attention(**qkv())
    assert reason in str(refused.value)


def test_explain_leaves_the_warning_to_the_call(machine: Machine) -> None:
    machine((7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(attention, **qkv())
    with pytest.warns(UserWarning, match="takes its portable path"):
        attention(**qkv())


def test_float64_and_a_mask_with_a_gradient_run_portable_on_any_gpu_each_with_a_warning(machine: Machine) -> None:
    machine((9, 0))
    mask = on_cuda(torch.zeros(1, 1, 64, 64)).requires_grad_()
    with pytest.warns(UserWarning, match=r"query has dtype torch\.float64"):
        attention(**qkv(dtype=torch.float64))
    with pytest.warns(UserWarning, match="mask requires a gradient"):
        attention(**qkv(), mask=mask)
    with torch.no_grad():
        assert dispatch.choose(ROW, qkv() | NOTHING | {"mask": mask}) == "kernel"


def test_a_cpu_runs_portable_without_a_warning_and_the_interpreter_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreting", lambda: True)
    x = torch.zeros(1, 2, 8, 8)
    given = {"query": x, "key": x, "value": x} | NOTHING
    assert dispatch.choose(ROW, given) == "portable"
    with use_backend("triton"):
        assert dispatch.choose(ROW, given) == "kernel"
        assert dispatch.pick(ROW, given, PLAIN) is ROW.kernels[-1]
        with pytest.raises(Unsupported, match=r"torch\.bfloat16, which Triton's interpreter computes wrongly"):
            dispatch.choose(ROW, given | {"query": x.bfloat16()})


def test_a_triton_without_package_metadata_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.metadata, "version", unknown)  # as where a fork brings the module under its own name
    assert device.triton_version.__wrapped__()


# choosing a backend


def test_backends_nest_and_an_error_ends_them() -> None:
    with use_backend("portable"):
        with use_backend("reference"):
            assert dispatch.backend() == "reference"
        assert dispatch.backend() == "portable"
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError(dispatch.backend())
        assert dispatch.backend() == "portable"
    assert dispatch.backend() == device.DEFAULT_BACKEND


def test_one_choice_may_be_entered_twice() -> None:
    before, choice = dispatch.backend(), use_backend("portable")
    with choice:
        with choice:
            assert dispatch.backend() == "portable"
        assert dispatch.backend() == "portable"
    assert dispatch.backend() == before


def test_a_choice_holds_for_its_own_thread() -> None:
    with use_backend("reference"), ThreadPoolExecutor(max_workers=1) as elsewhere:
        assert elsewhere.submit(dispatch.backend).result() == device.DEFAULT_BACKEND
        elsewhere.submit(use_backend("portable").__enter__).result()
        assert (dispatch.backend(), elsewhere.submit(dispatch.backend).result()) == ("reference", "portable")


def test_the_environment_gives_the_default_and_a_choice_overrides_it() -> None:
    code = """
from triton_attn import dispatch, use_backend
print(dispatch.backend())
with use_backend("portable"):
    print(dispatch.backend())
"""
    environment = {**os.environ, "TRITON_ATTN_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["reference", "portable"]


# explain


def test_explain_is_a_paragraph_for_people(machine: Machine, tables: None) -> None:
    machine((9, 0))
    source = "tile 64x128 w4 s2, shipped table sm_90.json (offline)"
    assert str(explain(attention, **qkv(), mask=on_cuda(torch.ones(64, 64) > 0))).splitlines() == [
        "attention runs kernel pointers",
        *(f"  {launch}: {source}" for launch in ("forward", "backward_query", "backward_key")),
        "  not descriptors: mask is not read by bulk copies",
    ]


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_explain_says_that_a_backend_was_asked_for_and_draws_no_seed(backend: str) -> None:
    x = torch.zeros(1, 1, 2, 8)
    before = torch.get_rng_state()
    with use_backend(backend):
        text = str(explain(attention, x, x, x, dropout_p=0.5))
    assert text == f"attention runs its {backend} path\n  not a kernel: {backend} was asked for"
    assert torch.equal(torch.get_rng_state(), before)


def test_explain_checks_arguments_and_leaves_later_calls_alone() -> None:
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ArgumentError, match="scale is nan"):
        explain(attention, x, x, x, scale=float("nan"))
    with pytest.raises(ArgumentError, match="made no call"):
        explain(torch.add, x, x)
    assert attention(x, x, x).shape == x.shape


# under the compiler


class Recording:
    """Compiles nothing, and notes which implementation the graph of each call holds."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        graphs = [inner.graph for inner in module.modules() if isinstance(inner, torch.fx.GraphModule)]
        text = " ".join(str(node.target) for graph in graphs for node in graph.nodes)
        (path,) = (path for sign, path in SIGNS.items() if sign in text)
        return lambda *args: (self.ran.append(path), module(*args))[1]  # type: ignore[func-returns-value]


SIGNS = {"triton_attn": "kernel", "scaled_dot_product": "portable", "einsum": "reference"}
PATHS = {"auto": "portable", "triton": "kernel", "portable": "portable", "reference": "reference"}


@interpreted
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shared", [False, True], ids=["three tensors", "one tensor thrice"])
@pytest.mark.parametrize(("backend", "path"), PATHS.items())
def test_a_compiled_call_takes_the_backend_asked_for_in_one_graph(backend: str, path: str, training: bool, shared: bool) -> None:
    torch._dynamo.reset()
    recording = Recording()
    compiled = torch.compile(attention, backend=recording, fullgraph=True)
    given = [torch.randn(1, 2, 5, 8, requires_grad=training) for _ in range(3)]
    given = given[:1] * 3 if shared else given
    with use_backend(backend):
        found, eager = compiled(*given), attention(*given)
        assert recording.ran == [path]
        assert torch.equal(found, eager)
        if training:
            gradients = [torch.autograd.grad(out.sum(), given) for out in (found, eager)]
            for one, other in zip(*gradients, strict=True):
                torch.testing.assert_close(one, other)  # a leaf used thrice sums its gradients in another order


@pytest.mark.parametrize("inside", [False, True], ids=["around the compiled call", "inside of it"])
def test_a_compiled_call_follows_a_change_of_backend(inside: bool) -> None:
    torch._dynamo.reset()
    recording = Recording()

    def call(backend: str, x: Tensor) -> Any:
        with use_backend(backend):
            return attention(x, x, x)

    x = torch.randn(1, 2, 5, 8)
    compiled = torch.compile(call if inside else attention, backend=recording, fullgraph=True)
    for backend in ("auto", "reference", "portable", *(["triton"] if device.interpreting() else []), "reference", "auto"):
        if inside:
            compiled(backend, x)
        else:
            with use_backend(backend):
                compiled(x, x, x)
        assert recording.ran[-1] == PATHS[backend]
    assert dispatch.backend() == device.DEFAULT_BACKEND


# the device is current while a kernel launches


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that `torch.cuda.device` has made current, innermost last."""
    stack: list[torch.device] = []

    @contextlib.contextmanager
    def make_current(which: torch.device) -> Iterator[None]:
        stack.append(which)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "device", make_current)
    return stack


def test_a_guard_makes_a_gpu_current_and_leaves_a_cpu_alone(current: list[torch.device]) -> None:
    with device.guard(on_cuda(torch.zeros(1))):
        assert current == [torch.device("cuda", 0)]
    with device.guard(torch.zeros(1)):
        assert current == []


def test_the_operators_run_kernels_under_the_guard(current: list[torch.device], machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 0))
    seen: list[list[torch.device]] = []

    def launch(*grads: Any, **given: Any) -> tuple[torch.Tensor, ...]:
        seen.append(list(current))
        return (given["query"],) * 3 if grads else ()

    code = Code(launch, launch, {}, lambda tensors, options: None)
    operator = operators._OPERATORS["attention"]
    monkeypatch.setattr(operator, "row", replace(ROW, kernels=(replace(KERNELS["pointers"], load=lambda: code),)))
    x = on_cuda(torch.zeros(1, 1, 8, 8))
    inputs, options = (x, x, x, None, None, None), ("", 1.0, 0.0)
    operator._run(*inputs, *options)
    operator._run_backward(x, None, *inputs, x, x, *options, [True, True, True])
    assert seen == [[x.device]] * 2
