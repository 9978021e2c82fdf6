"""The facts that `delfast doctor` reports about an installation, and its advice."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from delfast.backend import driver_cuda, driver_is_too_old, status
from delfast.ops.native import read_build_info

# what the extra `experiments` requires; a test compares it with pyproject.toml
EXPERIMENTS = [
    *("jinja2", "matplotlib", "rich", "scikit-learn", "scipy", "torchvision", "typer", "vit-pytorch"),
    *(("tomli",) if sys.version_info < (3, 11) else ()),
]
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "amx_tile", "amx_bf16")


def examine() -> dict[str, Any]:
    """Return ``{"facts": ..., "advice": [...]}``, ready for JSON, with one line of advice for each problem."""
    facts: dict[str, Any] = {
        **status(),
        "installed_as": _kind(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cpu_flags": _cpu_flags(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch_cuda": torch.version.cuda,
        "driver_cuda": ".".join(map(str, driver_cuda() or ())) or None,
        "compilers": {name: _first_line(name) for name in ("c++", "nvcc", "ninja")},
        "experiments": {name: _version(name) for name in EXPERIMENTS},
    }
    return {"facts": facts, "advice": _advise(facts)}


def flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(name, value)`` pairs for a table; names of nested facts are joined by a dot."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", " ".join(map(str, value)) if isinstance(value, list) else value


def _advise(facts: Mapping[str, Any]) -> list[str]:
    advice = []
    if facts["backend"] != "native":
        advice.append(f"the native kernels are not in use: {facts['reason']}")
        if facts["compilers"]["c++"] is None:
            advice.append("there is no C++ compiler: install one with C++20 (Debian: apt install g++), then reinstall")
    if facts["cuda_available"] and "cuda" not in facts["devices"]:
        advice.append("there is a CUDA device and no native kernels for it: it runs on PyTorch's own operations")
    if driver_is_too_old():
        built = facts["cuda"].partition(";")[0]
        advice.append(
            f"the driver supports CUDA {facts['driver_cuda']} at most, and the kernels were {built}: upgrade the "
            "driver, or install a build for that version"
        )
    missing = [name for name, found in facts["experiments"].items() if found is None]
    if missing:
        advice.append(f"not installed: {', '.join(missing)}; pip install 'delfast[experiments]'")
    return advice


def _kind() -> str:
    """Return what was installed: a wheel and what it is for, or what was compiled here."""
    info = read_build_info()
    if "torch" not in info:
        return "without native kernels"
    return f"a wheel for {info['wheel']}" if info.get("wheel") else "compiled from source"


def _cpu_flags() -> list[str]:
    """The instruction sets of this CPU that the kernels can use; empty where /proc/cpuinfo does not list them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((line.split() for line in lines if line.startswith("flags")), [])
    except OSError:
        return []
    return [flag for flag in CPU_FLAGS if flag in flags]


def _first_line(tool: str) -> str | None:
    """The line of a tool's ``--version`` that names its version; None if the tool is not on PATH."""
    path = shutil.which(tool)
    if path is None:
        return None
    printed = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
    text = (printed.stdout or printed.stderr).strip()
    lines = text.splitlines()
    # nvcc prints its release in a later line, which holds the word "release"
    return next((line for line in lines if "release" in line), lines[0] if lines else path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
