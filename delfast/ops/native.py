"""Load the compiled extension, or give in one line the reason why the PyTorch reference implementations run instead."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import mmap
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from delfast.ops.schemas import DIGEST

BUILD_INFO = Path(__file__).parent.parent / "_build_info.json"  # written by setup.py beside the extension
LIBRARY = BUILD_INFO.with_name("libdelfast_ops.so")
OLDEST_TORCH = (2, 10)  # whose stable interface has all that the library calls
REBUILD = "install again with `pip install --force-reinstall --no-deps delfast` (from a clone: `.`)"


@dataclass(frozen=True)
class Backend:
    """The code that runs the ops: ``name`` is "native" or "torch"; ``reason`` is why, in one line."""

    name: str
    reason: str
    module: ModuleType | None = None
    devices: tuple[str, ...] = ()
    build_info: dict[str, Any] = field(default_factory=dict)


def load_backend() -> Backend:
    """Choose the backend once, at import.

    DELFAST_BACKEND=native raises ImportError if the extension cannot be used, and so does a DELFAST_FORCE_ISA that
    this machine lacks. DELFAST_BACKEND=torch does not load the extension. Unset: the extension if it can be used, else
    the PyTorch reference implementations, with one warning that gives the reason.
    """
    wanted = os.environ.get("DELFAST_BACKEND", "")
    if wanted not in ("", "native", "torch"):
        raise ImportError(f"expected DELFAST_BACKEND to be 'native' or 'torch', got '{wanted}'; set one or unset it")
    if wanted == "torch" and os.environ.get("DELFAST_FORCE_ISA"):
        raise ImportError("DELFAST_FORCE_ISA needs native kernels, DELFAST_BACKEND=torch excludes them; unset one")
    if wanted == "torch":
        return Backend("torch", "chosen by DELFAST_BACKEND=torch")
    try:
        module, build_info = _load_extension()
    except ImportError as error:
        reason = str(error).splitlines()[0]
        if wanted == "native" or os.environ.get("DELFAST_FORCE_ISA"):
            raise ImportError(f"native kernels are required, but {reason}") from error
        warnings.warn(
            f"delfast runs on its PyTorch reference implementations (correct, but slow): {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return Backend("torch", reason)
    devices = ("CPU", "CUDA") if build_info["cuda"] else ("CPU",)
    return Backend("native", "the compiled extension loaded", module, devices, build_info)


def _load_extension() -> tuple[ModuleType, dict[str, Any]]:
    """Load the library of the ops and ``_C`` beside it, if they are this package's and this torch is new enough."""
    build_info = read_build_info()
    if not build_info:
        raise ImportError(_why_unbuilt())
    if "torch" not in build_info:
        raise ImportError(f"the extension was not built: {build_info['failure']}; {REBUILD}")
    if _release(torch.__version__) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"the extension needs torch {oldest} or newer, this is {torch.__version__}; upgrade torch")
    try:
        if not _is_of_these_schemas():  # to be known first: loading it registers its kernels
            raise ImportError(f"{LIBRARY.name} was built for other schemas than these ops have")
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
        return _load_module(), build_info
    except (ImportError, OSError, ValueError) as error:
        if "DELFAST_FORCE_ISA" in str(error):
            raise
        raise ImportError(f"the extension does not load: {str(error).splitlines()[0]}; {REBUILD}") from error


def _why_unbuilt() -> str:
    """Return the reason for a package without a build record; a source folder is named, and where delfast is installed.

    Python searches the working folder before the installed packages, so that in the root of a clone it imports the
    sources, also after a successful `pip install .`, which builds elsewhere.
    """
    package = BUILD_INFO.parent
    if not (package.parent / "pyproject.toml").is_file():
        return f"the extension was not built (no C++20 compiler at install?); {REBUILD}"
    source = f"this is the source folder '{package.parent}', in which the extension was never built"
    advice = "leave the folder, or build in place with `make`"
    installed = _installed_elsewhere(package)
    if installed is None:
        return f"{source}; install it (`pip install .`) and {advice}"
    return f"{source}, and not the delfast that is installed in '{installed}'; {advice}"


def _installed_elsewhere(package: Path) -> Path | None:
    """Return the folder of another installed delfast than ``package``; None if there is none."""
    for distribution in importlib.metadata.distributions(name="delfast"):
        other = Path(str(distribution.locate_file("delfast")))
        if (other / "__init__.py").is_file() and not other.samefile(package):
            return other.parent
    return None


def _is_of_these_schemas() -> bool:
    """Look for the digest in the library's file; an empty one is a ValueError."""
    with LIBRARY.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(DIGEST.encode()) >= 0


def _load_module() -> ModuleType:
    """Load ``_C`` from the library's folder; an import by name may find another installation's."""
    spec = importlib.machinery.PathFinder.find_spec("delfast._C", [str(LIBRARY.parent)])
    if spec is None or spec.loader is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise ImportError(f"no module _C for Python {version} lies beside {LIBRARY.name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module
    return module


def read_build_info() -> dict[str, Any]:
    """Return what setup.py wrote of the build; empty if there was none."""
    if not BUILD_INFO.is_file():
        return {}
    info: dict[str, Any] = json.loads(BUILD_INFO.read_text(encoding="utf-8"))
    return info


def _release(version: str) -> tuple[int, ...]:
    """Return (2, 14) for "2.14.1+cu130"."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])
