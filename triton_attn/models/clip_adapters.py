"""AA-CLIP's small layers, under the names of its checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

SLOPE = 0.01


class SimpleAdapter(nn.Module):
    """leaky_relu(W x), without a bias; state: fc.0.weight."""

    def __init__(self, width: int, out: int, **factory: Any) -> None:
        super().__init__()
        linear = nn.Linear(width, out, bias=False, **factory)
        self.fc = nn.Sequential(linear, nn.LeakyReLU(SLOPE))
        nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


class SimpleProj(nn.Module):
    """W x, or leaky_relu(W x); state: fc.weight, or fc.0.weight."""

    def __init__(self, width: int, out: int, relu: bool = True, **factory: Any) -> None:
        super().__init__()
        linear = nn.Linear(width, out, bias=False, **factory)
        nn.init.xavier_uniform_(linear.weight)
        self.fc = nn.Sequential(linear, nn.LeakyReLU(SLOPE)) if relu else linear

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out
