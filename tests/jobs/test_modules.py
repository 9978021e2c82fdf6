"""Modules beside job files: each job has its own, as they are when it is read."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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
    with pytest.raises(InputError, match=r"module 'mydata', '.*b/mydata.py', got .* '.*a/mydata.py'; read the job"):
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
    with pytest.raises(InputError, match="its own module 'mydata'"):
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


def package(folder: Path, value: float, name: str = "src") -> None:
    """Write a package without ``__init__.py``."""
    folder.mkdir(exist_ok=True)
    write(folder / name, value)


def test_a_package_without_init_that_two_jobs_have_is_refused(tmp_path: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 7.0)):
        package(tmp_path / folder, value)
    imports = "from src.mydata import X"
    assert first(job(tmp_path / "a", imports=imports)) == 1
    with pytest.raises(InputError, match=r"its own module 'src', '.*b/src', got .* '.*a/src'"):
        job(tmp_path / "b", imports=imports)
    assert str(tmp_path / "b") not in sys.path
    package(tmp_path / "a", 99.5)
    assert first(job(tmp_path / "a", imports=imports)) == 99.5, "it is read again"


def test_submodules_of_an_edited_package_are_read_again(tmp_path: Path) -> None:
    package(tmp_path / "a", 1.0)
    (tmp_path / "a" / "src" / "__init__.py").touch()
    assert first(job(tmp_path / "a", imports="from src.mydata import X")) == 1
    package(tmp_path / "a", 99.5)
    assert first(job(tmp_path / "a", imports="from src.mydata import X")) == 99.5


@pytest.mark.parametrize("is_imported", [True, False])
@pytest.mark.parametrize("is_package", [True, False])
def test_a_module_of_the_calling_script_is_refused(tmp_path: Path, is_imported: bool, is_package: bool) -> None:
    for folder, value in (("script", 1.0), ("job", 7.0)):
        (package if is_package else write)(tmp_path / folder, value)
    imports = "from src.mydata import X" if is_package else "from mydata import X"
    name = "src" if is_package else "mydata"
    sys.path.insert(0, str(tmp_path / "script"))
    if is_imported:
        importlib.import_module(name)
    with pytest.raises(InputError, match=rf"its own module '{name}', .* got .* '.*script/{name}"):
        job(tmp_path / "job", imports=imports)


def test_a_module_without_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", 1.0)
    sys.modules["mydata"] = ModuleType("mydata")
    with pytest.raises(InputError, match=r"'mydata', .* which has no file"):
        job(tmp_path / "a")


@pytest.mark.parametrize("is_package", [True, False])
def test_a_folder_of_data_by_the_same_name_replaces_nothing(tmp_path: Path, is_package: bool) -> None:
    (tmp_path / "script" / "src").mkdir(parents=True)
    sys.path.insert(0, str(tmp_path / "script"))
    if is_package:
        package(tmp_path / "a", 1.0)
    else:
        write(tmp_path / "a", 1.0, "src")
    for _ in range(2):
        read = job(tmp_path / "a", imports=f"from src{'.mydata' if is_package else ''} import X")
        assert first(read) == 1


def test_installed_packages_come_before_folders_and_files(tmp_path: Path) -> None:
    write(tmp_path / "torch", 1.0)
    write(tmp_path, 1.0, "numpy")
    assert first(job(tmp_path, imports="import numpy, json\nX = torch.full((4, 2), 3.0)")) == 3


def test_a_folder_of_data_beside_the_job_is_no_module_of_it(tmp_path: Path) -> None:
    write(tmp_path / "library", 3.0, "src")
    (tmp_path / "a" / "src").mkdir(parents=True)
    sys.path.insert(0, str(tmp_path / "library"))
    assert first(job(tmp_path / "a", imports="from src import X")) == 3
