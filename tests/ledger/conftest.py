from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from delfast.ledger import Ledger
from tests.ledger import jobs
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


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job of a second's training and a ledger with two references and no request."""
    folder = tmp_path_factory.mktemp("made")
    jobs.make_ledger(folder, jobs.write_job(folder), references=2).close()
    return folder
