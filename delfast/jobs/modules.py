"""The modules beside a job file: a job gets its own, and not those of another job that the process has read."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from delfast.errors import InputError

# folders of jobs that were read, and the names of modules in each that the process had imported before by itself
_folders: dict[Path, frozenset[str]] = {}


def prepare_imports(job: Path) -> None:
    """Make the modules in the job's folder importable, as they are now.

    Modules that an earlier reading of a job in this folder imported are read again. InputError for a module that is
    also in the folder of another job: Python keeps one module of a name in a process, so one job would silently have
    the other one's data.
    """
    folder = job.parent
    kept = _folders.get(folder)
    if kept is None:
        kept = frozenset(name for name in list(sys.modules) if _is_from(name, folder))
    own = _own_imports(job, folder, kept)
    for name in own:
        for other in _folders:
            if other != folder and _file(name, other) is not None:
                raise InputError(
                    f"expected modules of '{job}' that no other job of this process has, got '{name}', which is also "
                    f"in '{other}'; read the jobs in two processes, or rename one of the modules"
                )
    _folders.setdefault(folder, kept)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end, where its modules cannot replace installed packages
    for name in list(sys.modules):
        top = name.partition(".")[0]
        if top in own and _is_from(top, folder):
            del sys.modules[name]
    importlib.invalidate_caches()


def _own_imports(path: Path, folder: Path, kept: frozenset[str]) -> set[str]:
    """Return the names of the folder's modules that a file imports, and those that they import."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        for name in _imported(waiting.pop()):
            file = _file(name, folder)
            if file is None or name in found or name in kept:
                continue
            found.add(name)
            waiting += file.parent.rglob("*.py") if file.name == "__init__.py" else [file]
    return found


def _imported(path: Path) -> Iterator[str]:
    """Yield the first part of each name that a file imports, in functions too; none for a file that Python refuses."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the import itself raises it, where the job imports it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def _file(name: str, folder: Path) -> Path | None:
    """Return the file of a module of this name in a folder; None without one."""
    files = (folder / f"{name}.py", folder / name / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _is_from(name: str, folder: Path) -> bool:
    """Return whether the module that the process has imported by this name is the one in the folder."""
    file = getattr(sys.modules.get(name), "__file__", None)
    found = _file(name, folder)
    return file is not None and found is not None and Path(file).resolve() == found.resolve()
