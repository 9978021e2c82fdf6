"""The modules beside a job file: a job gets its own, not those of another job or of the process that reads it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from delfast.errors import InputError

INSTALLED = {"site-packages", "dist-packages"}  # the second is Debian's

# folders of jobs that were read, and the names of modules in each that the process had imported before by itself
_folders: dict[Path, frozenset[str]] = {}


def prepare_imports(job: Path) -> None:
    """Make the modules in the job's folder importable, as they are now.

    Modules that an earlier job in this folder imported are read again. InputError if the process has, or finds first,
    a module of the same name elsewhere: Python keeps one module of a name in a process, so the job would silently have
    another job's data, or the calling script's. Installed packages and Python's own modules come first.
    """
    folder = job.parent
    importlib.invalidate_caches()
    kept = _folders.get(folder)
    if kept is None:
        kept = frozenset(name for name in list(sys.modules) if "." not in name and _is_from(name, folder))
    own = _own_imports(job, folder, kept)
    for name in sorted(own):
        foreign = _foreign(name, folder)
        if foreign is not None:
            raise InputError(
                f"expected '{job}' to import its own module '{name}', '{_place(name, folder)}', got the one that this "
                f"process uses, {foreign}; read the job in a process of its own, or rename one of the modules"
            )
    _folders.setdefault(folder, kept)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end, where its modules cannot replace installed packages
    again = {name for name in own if _is_from(name, folder)}
    for name in list(sys.modules):
        if name.partition(".")[0] in again:
            del sys.modules[name]
    importlib.invalidate_caches()


def _own_imports(path: Path, folder: Path, kept: frozenset[str]) -> set[str]:
    """Return the names of the folder's modules that a file imports, and those that they import."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        for name in _imported(waiting.pop()):
            if name in found or name in kept or (place := _place(name, folder)) is None or _is_installed(name):
                continue
            package = place.parent if place.name == "__init__.py" else place
            files = list(package.rglob("*.py")) if package.is_dir() else [place]
            if files:  # a folder without any is one of data, and no package
                found.add(name)
                waiting += files
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


def _place(name: str, folder: Path) -> Path | None:
    """Return the file of a module in a folder, or the folder of a package without ``__init__.py``; None without one."""
    spec = PathFinder.find_spec(name, [str(folder)])
    if spec is None:
        return None
    return Path(spec.origin) if spec.has_location and spec.origin else folder / name


def _places(name: str) -> tuple[Path, ...] | None:
    """Return the file of the module that the process has or finds, or the folders of a package without one.

    None without a module; () for a module without a file, as Python's built-in ones.
    """
    module = sys.modules.get(name)
    if module is not None:
        file, folders = getattr(module, "__file__", None), getattr(module, "__path__", ())
    else:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec is None:
            return None
        file, folders = spec.origin if spec.has_location else None, spec.submodule_search_locations or ()
    return tuple(Path(place).resolve() for place in ([file] if file is not None else folders))


def _foreign(name: str, folder: Path) -> str | None:
    """Return the place of a module that the process has, or finds first, in place of the folder's; None without one.

    The folders of a package without ``__init__.py`` are searched together: folders without Python files, as of
    data, replace nothing.
    """
    place, places = _place(name, folder), _places(name)
    if place is None or places is None:
        return None
    others = [other for other in places if other != place.resolve()]
    if name not in sys.modules and not place.is_dir():
        others = [other for other in others if not other.is_dir()]  # a file of this name goes before such folders
    others = [other for other in others if not other.is_dir() or next(other.rglob("*.py"), None) is not None]
    if others:
        return f"'{others[0]}'"
    return None if places else "which has no file"


def _is_installed(name: str) -> bool:
    """Return whether the process has this module from an installed package or from Python itself."""
    places = _places(name) or ()
    return name in sys.stdlib_module_names or any(INSTALLED & set(place.parts) for place in places)


def _is_from(name: str, folder: Path) -> bool:
    """Return whether the module that the process has imported by this name is the one in the folder."""
    place = _place(name, folder) if sys.modules.get(name) is not None else None
    return place is not None and place.resolve() in (_places(name) or ())
