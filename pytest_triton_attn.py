"""The pytest plugin of triton_attn: fixtures for kernel tests, and hypothesis profiles.

Fixtures: `strict` runs the test under `triton_attn.testing.strict_interpreter`; `poisoned_memory` fills `torch.empty` with NaN, so
that an output nobody wrote shows. Profiles for `--hypothesis-profile`: quick, thorough, nightly. It stands outside the package because
pytest loads it in every run of its environment: it must import neither torch nor triton, which decides at import whether it interprets.
"""

from collections.abc import Iterator
from typing import Any

import pytest

PROFILES = {"quick": 30, "thorough": 300, "nightly": 3000}  # examples


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-profile", default=None) in PROFILES:
        register_profiles()


def register_profiles() -> None:
    """Make the profiles known to hypothesis: no deadline, and only `quick` draws the same examples each time."""
    from hypothesis import HealthCheck, settings

    for name, examples in PROFILES.items():
        settings.register_profile(
            name,
            max_examples=examples,
            deadline=None,
            database=None,
            print_blob=True,
            derandomize=name == "quick",
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        )


@pytest.fixture
def strict() -> Iterator[Any]:
    """The test runs under the strict interpreter; gives its record of what ran."""
    from triton_attn.testing import strict_interpreter

    with strict_interpreter() as record:
        yield record


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kind are full of NaN, or of the largest integer, and torch runs deterministically."""
    from triton_attn.testing import unwritten

    with unwritten.poisoned_memory():
        yield
