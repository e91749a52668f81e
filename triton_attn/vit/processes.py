"""The processes that torchrun starts, which train one model; one process alone is a group of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from triton_attn import ArgumentError


@dataclass(frozen=True)
class Group:
    """Which of how many processes this is, and where it computes."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Every so manieth of a batch."""
        return slice(self.rank, count, self.count)

    def sum(self, number: float) -> float:
        """Of all processes."""
        if self.count == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process, on the CPU."""
        if self.count == 1:
            return [tensor]
        held: list[Tensor] = [torch.empty_like(tensor, device=self.device) for _ in range(self.count)]
        dist.all_gather(held, tensor.to(self.device))
        return [x.cpu() for x in held]

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients are means over the processes."""
        if self.count == 1:
            return model
        # a ripple whose grid is one cell early leaves layers out
        return DistributedDataParallel(model, find_unused_parameters=True)

    def wait(self) -> None:
        """For all of them."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def group(device: str | None = None) -> Iterator[Group]:
    """Joins the processes that torchrun started, NCCL on GPUs and gloo on CPUs, and leaves them at the end.

    Raises:
        ArgumentError: there is no such device here.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(kind).type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("vit", "device", f"is {kind}; allowed on this machine: cpu")
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Group(0, 1, torch.device(kind))
        return
    cuda = torch.device(kind).type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        where = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(where)
        yield Group(dist.get_rank(), dist.get_world_size(), where)
    finally:
        dist.destroy_process_group()
