"""Modules beside job files: each job has its own, as they are when it is read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from delfast.errors import InputError
from delfast.jobs import Job, modules, read_job

JOB = """
import torch
{imports}
def model(): return torch.nn.Linear(2, 2)
def train_set():
    {lazy}
    return torch.utils.data.TensorDataset(X, torch.tensor([0, 1, 0, 1]))
test_set = train_set
"""


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore what the process has imported."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(modules, "_folders", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, value: float, module: str = "mydata") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(f"import torch\nX = torch.full((4, 2), {value})\n")


def job(folder: Path, imports: str = "from mydata import X", lazy: str = "pass") -> Job:
    (folder / "job.py").write_text(JOB.format(imports=imports, lazy=lazy))
    return read_job(folder / "job.py")


def first(read: Job) -> float:
    return float(read.train_set[0][0][0])


@pytest.mark.parametrize("where", [{}, {"imports": "", "lazy": "from mydata import X"}])
def test_a_module_that_two_jobs_have_is_refused(tmp_path: Path, where: dict[str, str]) -> None:
    write(tmp_path / "a", 1.0)
    write(tmp_path / "b", 7.0)
    assert first(job(tmp_path / "a", **where)) == 1
    with pytest.raises(InputError, match=r"got 'mydata', which is also in '.*a'; read the jobs in two processes"):
        job(tmp_path / "b", **where)
    assert first(job(tmp_path / "a", **where)) == 1, "a job that was refused has no part in it"
    write(tmp_path / "b", 8.0, "other_data")
    assert first(job(tmp_path / "b", imports="from other_data import X")) == 8, "what it does not import is no matter"


def test_a_module_of_a_module_is_found(tmp_path: Path) -> None:
    write(tmp_path / "a", 1.0)
    job(tmp_path / "a")
    write(tmp_path / "b", 7.0)
    package = tmp_path / "b" / "reading"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import X\n")
    (package / "inner.py").write_text("from mydata import X\n")
    with pytest.raises(InputError, match="got 'mydata'"):
        job(tmp_path / "b", imports="from reading import X")


@pytest.mark.parametrize("where", [{}, {"imports": "", "lazy": "from mydata import X"}])
def test_an_edited_module_is_read_again(tmp_path: Path, where: dict[str, str]) -> None:
    write(tmp_path / "a", 1.0)
    before = job(tmp_path / "a", **where)
    assert first(before) == 1
    write(tmp_path / "a", 99.5)
    assert first(job(tmp_path / "a", **where)) == 99.5
    assert first(before) == 1


def test_a_module_that_the_process_imported_itself_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "a", 1.0)
    sys.path.append(str(tmp_path / "a"))
    import mydata  # type: ignore[import-not-found]

    mydata.X = mydata.X + 1
    assert first(job(tmp_path / "a")) == 2
