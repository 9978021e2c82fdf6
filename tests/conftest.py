from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from delfast.ops import BACKEND

# Files that train networks by whole commands, build, or start many processes: more than ten seconds of CPU time each.
# `make test` starts them first, the longest at the head, so that no process still runs one while the others are idle;
# `make check` leaves them out. test_nvcc.py would wait while test_cpp.py builds in the same folder, so it comes before.
HEAVY = (
    "packaging/test_nvcc.py",
    "packaging/test_cpp.py",
    "experiments/test_demo.py",
    "docs/test_examples.py",
    "cli/test_cli.py",
    "experiments/test_grid.py",
    "cli/test_methods_cli.py",
    "experiments/test_records.py",
    "cli/test_job.py",
    "packaging/test_backend.py",
    "docs/test_readme.py",
    "packaging/test_core_install.py",
    "experiments/test_profile.py",
    "docs/test_site.py",
    "cli/test_stop.py",
    "test_distributed.py",
    "distributed/test_localize.py",
    "distributed/test_training.py",
    "distributed/test_evaluate.py",
    "distributed/test_unlearn.py",
    "distributed/test_errors_inside_passes.py",
)
ISAS = list(BACKEND.module.isas()) if BACKEND.module else []

if importlib.util.find_spec("hypothesis"):  # a machine with a GPU may run tests/test_cuda.py without it
    from hypothesis import HealthCheck, settings

    # the same examples everywhere, and no time limit that a slow or busy machine could exceed
    settings.register_profile(
        "same", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of heavy files first, and mark them long."""
    tests = Path(__file__).parent
    rank = {tests / name: number for number, name in enumerate(HEAVY)}
    items.sort(key=lambda item: rank.get(item.path, len(HEAVY)))
    for item in items:
        if item.path in rank:
            item.add_marker(pytest.mark.long)


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
