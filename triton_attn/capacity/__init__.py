"""How long a sequence a GPU can train on: the real training step on tensors that have shapes and no numbers, its memory counted."""

from triton_attn.capacity.blocks import TOWERS, TowerPeak, TowerSetup, largest_batch, tower_peak
from triton_attn.capacity.memory import Peak, peak_of, readable, workspace
from triton_attn.capacity.search import growth, longest
from triton_attn.capacity.training import ATTENTIONS, COMPONENTS, DTYPES, MODELS, OPTIMIZERS, Setup, step_of

__all__ = [
    "ATTENTIONS",
    "COMPONENTS",
    "DTYPES",
    "MODELS",
    "OPTIMIZERS",
    "TOWERS",
    "Peak",
    "Setup",
    "TowerPeak",
    "TowerSetup",
    "growth",
    "largest_batch",
    "longest",
    "peak_of",
    "readable",
    "step_of",
    "tower_peak",
    "workspace",
]
