from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from delfast.ledger import Ledger
from tests.ledger.small import write_job


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A job file and a checkpoint of its network; tests leave them as they are."""
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def ledger(files: tuple[Path, Path], tmp_path: Path) -> Iterator[Ledger]:
    """A new ledger without requests."""
    job, model = files
    with Ledger.create(tmp_path / "ledger", job=job, model=model) as made:
        yield made
