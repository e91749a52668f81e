"""What every test runs under: one thread, one seed, poisoned memory, and hypothesis without deadlines."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import pytest_triton_attn
from triton_attn import tiles

pytest_triton_attn.register_profiles()
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _one_thread_and_seed(poisoned_memory: None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _tables_where_they_are_by_default() -> Iterator[None]:
    yield
    tiles.use_tables(None)
