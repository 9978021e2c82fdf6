"""Builds the CMake project of the kernels in build/kernels, a folder that stays, so that builds are incremental.

Another ``folder`` is for kernels of other architectures than the extension's: benchmarks/ptxas.py.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from build_support.toolkit import CudaUnavailable, Toolkit, architectures, generate_flags

ROOT = Path(__file__).parents[1].resolve()
FOLDER = ROOT / "build" / "kernels"
SCHEMAS = runpy.run_path(str(ROOT / "delfast/ops/schemas.py"))  # for their DIGEST, which is compiled into the library


class BuildError(RuntimeError):
    """Why the kernels cannot be built, in one line."""


def compiler() -> str:
    """Return the path of the C++ compiler: CXX, or else ``c++``. BuildError if there is none."""
    name = os.environ.get("CXX", "c++")
    found = shutil.which(name)
    if not found:
        raise BuildError(f"no C++ compiler: '{name}' is not there (set CXX, or install g++ 11 or newer)")
    return found


def tools_path() -> str:
    """Return PATH with the programs of this Python environment first, where pip puts cmake and ninja."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def find_tool(name: str) -> str:
    """Return the path of cmake or ninja. BuildError if it is not there."""
    found = shutil.which(name, path=tools_path())
    if not found:
        raise BuildError(f"expected {name} beside {sys.executable} or on PATH, found none; pip install cmake ninja")
    return found


@contextmanager
def locked(folder: Path | None = None) -> Iterator[None]:
    """Wait until no other process holds this lock of the folder, and hold it."""
    import fcntl  # not on Windows, where setup.py reads this module too

    folder = folder or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def configure(
    torch: Path | None = None,
    toolkit: Toolkit | None = None,
    wanted: list[str] | None = None,
    folder: Path | None = None,
) -> None:
    """Configure the project: the ops by ``torch``, the CUDA kernels by ``toolkit``.

    Without either, keep what the folder was configured with.
    ``wanted``: architectures to build for, if not architectures(). Flags come from CMakeLists.txt alone: CXXFLAGS could
    break that every instruction set gives the same bits.
    """
    options = {"CMAKE_MAKE_PROGRAM": find_tool("ninja"), "CMAKE_CXX_FLAGS": "", "CMAKE_BUILD_TYPE": ""}
    if torch:
        options |= {"DELFAST_TORCH": str(torch), "DELFAST_SCHEMAS": SCHEMAS["DIGEST"]}
    if toolkit:
        host_compiler = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
        flags = [*host_compiler, *generate_flags(wanted or architectures())]
        options |= {"DELFAST_NVCC": str(toolkit.nvcc), "DELFAST_NVCC_FLAGS": ";".join(flags)}
        options |= {"DELFAST_CUDART": str(toolkit.libraries / "libcudart_static.a")}
    fixed = {"CMAKE_CXX_COMPILER": compiler()}
    folder = folder or FOLDER
    command = [find_tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    cache = _read_cache(folder)
    if cache and not cache.items() >= (fixed | {"CMAKE_HOME_DIRECTORY": str(ROOT)}).items():  # cannot change later
        command.append("--fresh")
    result = _run([*command, *(f"-D{name}={value}" for name, value in (fixed | options).items())])
    if result.returncode:
        sys.stderr.write(result.stdout)
        message = re.search(r"CMake Error[^\n]*\n\s*(.+?)(?:\n\s*\n|\Z)", result.stdout, re.DOTALL)
        reason = " ".join(message[1].split()) if message else "as printed above"
        raise BuildError(f"cmake could not configure the kernels: {reason}")


def _read_cache(folder: Path) -> dict[str, str]:
    """Return what the folder was configured with; nothing if it was not."""
    cache = folder / "CMakeCache.txt"
    if not cache.exists():
        return {}
    return dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(encoding="utf-8"), re.MULTILINE))


def generates(toolkit: Toolkit, wanted: list[str]) -> bool:
    """Return whether the extension's kernels are configured for this toolkit and, among others, these architectures."""
    cache = _read_cache(FOLDER)
    flags = cache.get("DELFAST_NVCC_FLAGS", "").split(";")
    return cache.get("DELFAST_NVCC") == str(toolkit.nvcc) and set(generate_flags(wanted)) <= set(flags)


def build(*targets: str, folder: Path | None = None) -> None:
    """Build these targets of the configured project, on MAX_JOBS processes or as many as there are CPUs."""
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    result = _run([find_tool("cmake"), "--build", str(folder or FOLDER), "--parallel", jobs, "--target", *targets])
    if result.returncode:
        sys.stderr.write(result.stdout)
        raise BuildError(_failure(result.stdout))


def _failure(log: str) -> str:
    """Return one line: the file, and the first line of its compiler's error."""
    failed = re.search(r"^FAILED: (?:\[code=\d+\] )?(\S+).*?\n(.*)", log, re.MULTILINE | re.DOTALL)
    if not failed:
        return (log.strip().splitlines() or ["no message"])[-1]
    lines = failed[2].splitlines()[1:]  # the first is the command
    message = next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1] if lines else "")
    name = Path(failed[1]).name.removesuffix(".o")
    return f"{'nvcc ' if name.endswith('.cu') else ''}could not build {name}: {message.strip()}"


def build_ops(torch: Path, toolkit: Toolkit | None) -> Path:
    """Build the library of the ops against this torch package, and return its path.

    BuildError if it cannot be built; CudaUnavailable instead if ``toolkit`` is given for CUDA kernels.
    """
    target = "delfast_ops_cuda" if toolkit else "delfast_ops"
    with locked():  # the C++ tests are built in the same folder
        configure(torch, toolkit)
        try:
            build(target)
        except BuildError as error:
            if not toolkit:
                raise
            raise CudaUnavailable(str(error)) from error
    return FOLDER / "csrc" / target / "libdelfast_ops.so"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": tools_path()}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
