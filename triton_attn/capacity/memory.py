"""What a step holds at its worst moment, by what it is for; kernels count with what they allocate for themselves."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from triton_attn import CATALOG, dispatch, operators
from triton_attn.capacity.training import Setup, Step, step_of

KINDS = ("parameters", "gradients", "optimizer", "workspace", "activations")


@dataclass(frozen=True)
class Peak:
    """Bytes at the worst moment of a step, and how they divide into KINDS."""

    setup: Setup
    length: int
    bytes: int
    parts: dict[str, int] = field(default_factory=dict)


def peak_of(setup: Setup, length: int) -> Peak:
    """The peak of a step by its shapes alone, at the second step, when the optimiser's states are there.

    Every tensor that an operator makes counts from then until nobody holds it. Kernels are those of a GPU, not the portable path.
    """
    return Peak(setup, length, *count(lambda: step_of(setup, length)))


def count(make: Callable[[], Step]) -> tuple[int, dict[str, int]]:
    """The bytes at the worst moment of the second run of a step that is made on shapes, and how they divide into KINDS."""
    with FakeTensorMode(allow_non_fake_inputs=True), dispatch.simulate_kernels():
        return _counted(make())


def _counted(step: Step) -> tuple[int, dict[str, int]]:
    parameters = [parameter for module in step.modules for parameter in module.parameters()]
    if step.optimizer is not None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        step.optimizer.step()
        step.optimizer.zero_grad()
    held = Held()
    held.note("activations", step.made)
    held.note("parameters", [*parameters, *(buffer for module in step.modules for buffer in module.buffers())])
    held.note("optimizer", _states(step))
    hooks: list[Any] = [
        parameter.register_post_accumulate_grad_hook(lambda one: held.note("gradients", [one.grad]))  # type: ignore[no-untyped-call]
        for parameter in parameters
    ]
    with held, Workspaces(held):
        step.run()
    for hook in hooks:
        hook.remove()
    return held.most, {kind: held.worst[kind] for kind in KINDS}


def _states(step: Step) -> list[Tensor]:
    state = getattr(step.optimizer, "state", [])
    return [x for x in tree_leaves(dict(state) if isinstance(state, dict) else state) if isinstance(x, Tensor)]


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that somebody holds, by kind, and keeps the worst moment."""

    def __init__(self, made: str = "activations") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made, self.kinds = made, dict[int, str]()
        self.now, self.worst, self.most = Counter[str](), Counter[str](), 0

    def note(self, kind: str, tensors: Iterable[Any]) -> None:
        """Count tensors as of a kind, whatever they were counted as before."""
        for tensor in tensors:
            for plain in _plain(tensor):
                storage = plain.untyped_storage()
                size, before = storage.nbytes(), self.kinds.get(id(storage))
                if before is None:
                    weakref.finalize(storage, self._freed, id(storage), size)
                else:
                    self.now[before] -= size
                self.kinds[id(storage)] = kind
                self.now[kind] += size
        if self.now.total() > self.most:
            self.most, self.worst = self.now.total(), self.now.copy()

    def _freed(self, storage: int, size: int) -> None:
        self.now[self.kinds.pop(storage)] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.note(self.made, [x for x in made if any(id(y.untyped_storage()) not in self.kinds for y in _plain(x))])
        return result


def _plain(tensor: Tensor | None) -> list[Tensor]:
    """The tensors that hold a tensor's numbers."""
    if tensor is None:
        return []
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [inner for name in names for inner in _plain(getattr(tensor, name))]
    return [tensor]


class Workspaces(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While one of our operators runs, as many bytes are held as its kernels allocate beside their results."""

    def __init__(self, held: Held) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != operators.NAMESPACE:
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.held.made, before = "workspace", self.held.made
        torch.empty(workspace(func, args), dtype=torch.uint8)  # the mode below counts it, and it goes at once
        self.held.made = before
        return result


_known: dict[Any, int] = {}


def workspace(operator: Any, args: Sequence[Any]) -> int:
    """Bytes that an operator of ours holds at most beside its arguments and results: its own host code, run on shapes."""
    name = operator.name().partition("::")[2].partition(".")[0]
    row = CATALOG[name.removesuffix("_backward")]
    key = (name, tuple(_described(x) for x in args))
    if key not in _known:
        ours = operators.operator(row)
        run: Callable[..., Any] = ours._run_backward if name.endswith("_backward") else ours._run
        with unset_fake_temporarily(), _disable_current_modes(), _no_launches(), Held() as held:
            given = tree_map_only(Tensor, _as_shape, list(args))
            before = held.now.total()
            results = run(*given)
            returned = sum({id(x.untyped_storage()): x.untyped_storage().nbytes() for x in results}.values())
            _known[key] = max(0, held.most - before - returned)
    return _known[key]


def _as_shape(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _described(x: Any) -> Any:
    if isinstance(x, Tensor):
        return tuple(x.shape), tuple(x.stride()), x.dtype
    return tuple(x) if isinstance(x, list) else x


@contextlib.contextmanager
def _no_launches() -> Iterator[None]:
    """Inside, kernels are chosen and not launched."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, GridExecutor.__call__
    JITFunction.run = lambda self, *args, **options: None
    GridExecutor.__call__ = lambda self, *args, **options: None
    try:
        yield
    finally:
        JITFunction.run, GridExecutor.__call__ = before


def readable(count: float) -> str:
    """Bytes as people write them: "12.3 GB", of 10^9."""
    power = min(int(math.log10(count)) // 3, 4) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
