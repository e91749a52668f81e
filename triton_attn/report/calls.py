"""What a call would run: on this machine, and on a GPU of another capability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from triton_attn import device, dispatch, tiles
from triton_attn.mechanism import Case, Input, Mechanism
from triton_attn.testing import inputs


@dataclass(frozen=True)
class Call:
    """One call of a mechanism: what serves it at a place, with which tiles, and why not the others."""

    mechanism: str
    sizes: str
    dtype: str
    where: str  # "cpu", a GPU's name, or a target such as "sm_80"
    path: str  # "kernel", "portable" or "reference"
    kernel: str
    tiles: Mapping[str, str]  # launch -> tile and where it comes from
    reasons: Mapping[str, Sequence[str]]  # who does not serve it -> why

    @property
    def serves(self) -> str:
        return f"kernel {self.kernel}" if self.kernel else self.path


def here(row: Mechanism, case: Case, dtype: torch.dtype, where: torch.device) -> Call:
    """What this machine would run. Tensors are allocated, and but for indices never written or read."""
    tensors, options = inputs.meta(row, case, dtype)
    given = {name: tensor for name, tensor in tensors.items() if row.inputs[name].kind != "seed"}
    real = {name: None if tensor is None else _allocated(row.inputs[name], tensor, case, where) for name, tensor in given.items()}
    told = dispatch.explain(row.call, **real, **options)
    place = device.profile(where.index or 0).name if where.type == "cuda" else where.type
    return Call(row.name, sizes(case), short(dtype), place, told.path, told.kernel, told.tiles, told.reasons)


def _allocated(given: Input, tensor: torch.Tensor, case: Case, where: torch.device) -> torch.Tensor:
    if given.kind == "offsets":  # these and indices are looked at before anything runs
        spaced = torch.linspace(0, case.sizes[given.into], len(tensor), dtype=torch.float64)
        return spaced.to(tensor.dtype).to(where)
    return (torch.zeros_like if given.kind == "index" else torch.empty_like)(tensor, device=where)


def on_target(row: Mechanism, case: Case, dtype: torch.dtype, target: str) -> Call:
    """What a GPU of this capability would run, and the table its tiles would come from; ValueError on a bad target."""
    capability = device.capability(target)
    tensors, options = inputs.meta(row, case, dtype)
    options = {**row.defaults, **options}
    refusal = device.refusal(capability)
    if dtype == torch.float64:
        refusal = "kernels serve float16, bfloat16 and float32"
    reasons: dict[str, Sequence[str]] = {}
    for kernel in row.kernels:
        refused = [refusal] if refusal else dispatch.capability_refusal(kernel, capability) or kernel.refuses(tensors, options)
        if refused:
            reasons[kernel.name] = refused
            continue
        code, profile, found = kernel.load(), device.Profile(target, capability), {}
        key = code.key(tensors, options)
        # of a GPU that is not here nobody knows how many multiprocessors would stand idle
        launches = [(kernel, code, launch) for launch in kernel.launches if not launch.shared]
        if kernel is not row.kernels[-1]:  # the variants share the backward of the most general one
            general = row.kernels[-1]
            launches += [(general, general.load(), launch) for launch in general.launches if launch.gradients]
        for owner, loaded, launch in launches:
            entry = tiles.look_up(f"{row.name}/{owner.name}/{launch.name}", loaded.spaces[launch.name], key, profile)
            found[launch.name] = f"tile {entry.tile}, {entry.source}{', stale' if entry.stale else ''}"
        return Call(row.name, sizes(case), short(dtype), target, "kernel", kernel.name, found, reasons)
    return Call(row.name, sizes(case), short(dtype), target, "portable", "", {}, reasons)


def sized(name: str, case: Case, given: Sequence[str]) -> Case:
    """The case with other sizes, like "n=4096"; ValueError tells which are allowed."""
    sizes_given = dict(case.sizes)
    for text in given:
        axis, _, number = text.partition("=")
        if axis not in sizes_given or not (number.isascii() and number.isdigit()) or len(number) > 12:
            raise ValueError(f"size is {text!r}; allowed for {name}: a whole number by axis, {sizes(case)}")
        sizes_given[axis] = int(number)
    return Case(case.name, sizes_given, case.options)


def sizes(case: Case) -> str:
    """ "b=1 h=8": a case's sizes in one line."""
    return " ".join(f"{axis}={size}" for axis, size in case.sizes.items())


def short(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
