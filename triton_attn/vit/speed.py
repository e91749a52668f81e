"""Whole models timed in turns, and what a training step holds of memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from triton_attn.vit.settings import Settings, model

FORWARD, TRAINING = "forward", "training"
SECONDS = 2.0  # of rounds, where nobody says
Size = tuple[int, int, int]  # side, classes, channels


@dataclass(frozen=True)
class Speed:
    """The median of a model's steps."""

    what: str
    side: int
    tokens: int
    direction: str
    batch: int
    ms: float
    images_per_second: float
    rounds: int


def step(given: Settings, size: Size, batch: int, device: torch.device, direction: str = TRAINING) -> Callable[[], object]:
    """A call that runs the model once: forward in evaluation, or a whole training step with AdamW."""
    side, classes, channels = size
    torch.manual_seed(given.seed)
    network = model(given, *size).to(device)
    pixels = torch.randn(batch, channels, side, side, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    if direction == FORWARD:
        network.eval()

        def forward() -> object:
            with torch.no_grad():
                return network(pixels)

        return forward
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    def train() -> object:
        loss = F.cross_entropy(network(pixels), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    return train


def in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float | None = None, least: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of each call in every round, the order reversed in every other one; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    seconds = SECONDS if seconds is None else seconds
    begun, turn = time.perf_counter(), 0
    while turn <= least or time.perf_counter() - begun < seconds:
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            calls[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
        turn += 1
    return times


def speeds(
    models: Mapping[str, Settings],
    sides: Sequence[int],
    device: torch.device,
    *,
    batch: int = 1,
    classes: int = 100,
    channels: int = 3,
    directions: Sequence[str] = (FORWARD, TRAINING),
    seconds: float | None = None,
    least: int = 3,
) -> list[Speed]:
    """Every model at every size of image, those of one size in turns; the settings' patch size stays.

    Raises:
        ArgumentError: a patch does not divide a side; the message says so.
    """
    rows = []
    for side in sides:
        for direction in directions:
            calls = {name: step(given, (side, classes, channels), batch, device, direction) for name, given in models.items()}
            times = in_turns(calls, device, seconds=seconds, least=least)
            for name, given in models.items():
                ms = statistics.median(times[name])
                tokens = (side // given.patch_size) ** 2 + 1
                rows.append(Speed(name, side, tokens, direction, batch, ms, 1e3 * batch / ms, len(times[name])))
    return rows


def peak(given: Settings, size: Size, batch: int, device: torch.device) -> int | None:
    """Bytes that one training step needs at most, parameters apart: on a GPU as allocated by torch, on Linux by how far the resident
    memory of a process of its own rises; None elsewhere."""
    if device.type == "cuda":
        call = step(given, size, batch, device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    asked = json.dumps({"given": asdict(given), "size": size, "batch": batch})
    command = [sys.executable, "-W", "ignore", "-m", "triton_attn.vit.speed", asked]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(ended.stdout) if ended.returncode == 0 and ended.stdout.strip().isdigit() else None


def _rise(asked: Mapping[str, Any]) -> int:
    """Of this process's resident memory over a training step."""
    torch.set_num_threads(1)
    given = Settings(**asked["given"])
    side, classes, channels = asked["size"]
    tiny = step(given, (side, classes, channels), 1, torch.device("cpu"))
    tiny()  # loads what the first step loads
    del tiny
    call = step(given, (side, classes, channels), asked["batch"], torch.device("cpu"))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the highest so far
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(line: str) -> int:
    for text in Path("/proc/self/status").read_text().splitlines():
        name, _, value = text.partition(":")
        if name == line:
            return 1024 * int(value.split()[0])
    raise OSError(f"/proc/self/status has no {line}")


if __name__ == "__main__":
    print(_rise(json.loads(sys.argv[1])))
