from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from delfast.ops import BACKEND

ISAS = list(BACKEND.module.isas()) if BACKEND.module else []

if importlib.util.find_spec("hypothesis"):  # a machine with a GPU may run tests/test_cuda.py without it
    from hypothesis import HealthCheck, settings

    # the same examples everywhere, and no time limit that a slow or busy machine could exceed
    settings.register_profile(
        "same", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("same")


def seed_all() -> None:
    """Seed every process-wide generator that a test could draw from."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any) -> None:
    """Make a fixture that several tests share independent of the test that runs first."""
    if fixturedef.scope != "function":
        seed_all()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Start every test from the same generators, and restore what a failing test may have left changed."""
    seed_all()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    isa = BACKEND.module.isa() if BACKEND.module else None
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if BACKEND.module:
        BACKEND.module.force_isa(isa)


@pytest.fixture(autouse=True, scope="session")
def _own_data_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests decode out of the user's data directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("delfast.experiments.datasets.images.DEFAULT_DATA_DIR", tmp_path_factory.mktemp("data"))
        yield


@pytest.fixture(
    params=ISAS or [pytest.param("none", marks=pytest.mark.skip(reason=f"no native kernels: {BACKEND.reason}"))]
)
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set of this CPU in turn."""
    assert BACKEND.module is not None
    BACKEND.module.force_isa(request.param)
    return str(request.param)


@pytest.fixture
def one_and_two_threads() -> tuple[int, int]:
    """Thread counts for a test to set."""
    return (1, 2)
