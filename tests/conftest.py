from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from delfast.ops import BACKEND

ISAS = list(BACKEND.module.isas()) if BACKEND.module else []


@pytest.fixture(
    params=ISAS or [pytest.param("none", marks=pytest.mark.skip(reason=f"no native kernels: {BACKEND.reason}"))]
)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this CPU in turn."""
    assert BACKEND.module is not None
    before = BACKEND.module.isa()
    BACKEND.module.force_isa(request.param)
    yield request.param
    BACKEND.module.force_isa(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_and_two_threads() -> Iterator[tuple[int, int]]:
    before = torch.get_num_threads()
    yield (1, 2)
    torch.set_num_threads(before)
