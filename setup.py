"""Builds delfast: CMake builds the library of the ops, setuptools the Python module beside it.

Environment:
  DELFAST_NATIVE=auto|0|1  auto (the default) installs without native kernels if they cannot be built, and prints why; 1
                           fails instead; 0 does not try.
  DELFAST_CUDA=auto|0|1    auto builds the CUDA kernels too if torch is a CUDA build and a toolkit of the same major
                           version is found (no GPU is needed), and prints why not; 1 fails instead, and takes any
                           toolkit if torch is a CPU build; 0 does not try.
  TORCH_CUDA_ARCH_LIST     the architectures to build for, as for torch: build_support/toolkit.py has the default.
  MAX_JOBS                 the number of compilers at once, as for torch (default: one for each CPU).
  DELFAST_TORCH            the folder of a torch package to take the headers of, in place of this Python's.
  DELFAST_WHEEL            what a wheel is for: cpu, or cu and a major version of CUDA, such as cu13. Its local version;
                           `delfast doctor` prints it. Decides DELFAST_NATIVE, 1, and DELFAST_CUDA, 0 or 1.
"""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()

sys.path.insert(0, str(ROOT))  # pip's isolated front end leaves it out
from build_support import kernels, toolkit  # noqa: E402
from build_support.toolkit import CudaUnavailable, Toolkit  # noqa: E402


def choice(name: str) -> str:
    """Return the value of DELFAST_NATIVE or DELFAST_CUDA."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"expected {name} to be auto, 0 or 1, got '{value}'; set one or unset it")
    return value


def find_torch() -> Path:
    """Return the folder of the torch package, which is not imported."""
    if named := os.environ.get("DELFAST_TORCH"):
        if not Path(named, "version.py").is_file():
            sys.exit(f"expected DELFAST_TORCH to be the folder of a torch package, got '{named}'; correct or unset it")
        return Path(named)
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("delfast's build needs torch 2.10 or newer: install it, or leave out --no-build-isolation")
    return Path(spec.origin).parent


NATIVE, CUDA, WHEEL = choice("DELFAST_NATIVE"), choice("DELFAST_CUDA"), os.environ.get("DELFAST_WHEEL")
if WHEEL:
    if not re.fullmatch(r"cpu|cu\d+", WHEEL):
        sys.exit(f"expected DELFAST_WHEEL to be cpu, or cu and a number, got '{WHEEL}'; correct or unset it")
    NATIVE, CUDA = "1", "0" if WHEEL == "cpu" else "1"
TORCH = find_torch() if NATIVE != "0" else None
VERSION = runpy.run_path(str(TORCH / "version.py")) if TORCH else {}  # __version__, and cuda: a version or None
if TORCH and tuple(int(part) for part in VERSION["__version__"].split("+")[0].split(".")[:2]) < (2, 10):
    sys.exit(f"delfast's build needs torch 2.10 or newer, this is {VERSION['__version__']}; upgrade torch")
LIBRARY = "libdelfast_ops.so"


class Copy(build_py):
    """Copy the modules into an empty folder: setuptools keeps build/lib, and with it modules that are no longer."""

    def run(self) -> None:
        if Path(self.build_lib).resolve() != ROOT:
            shutil.rmtree(Path(self.build_lib, "delfast"), ignore_errors=True)
        super().run()


class Build(build_ext):
    """Build the library of the ops with CMake, and the module that links it."""

    info: dict[str, object]
    library: Path | None = None

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # headers, macros and the compiler change too, and setuptools compares sources alone

    def run(self) -> None:
        super().run()
        # run() puts `inplace` aside while it builds, so where the package lies is known only here
        package = (ROOT if self.inplace else Path(self.build_lib)) / "delfast"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(self.info) + "\n", encoding="utf-8")
        for stale in [] if self.extensions else [*package.glob("_C*.so"), package / LIBRARY]:
            stale.unlink(missing_ok=True)
        if self.library:  # a process may have the former one open
            shutil.copy2(self.library, package / f".{LIBRARY}")
            (package / f".{LIBRARY}").replace(package / LIBRARY)

    def build_extensions(self) -> None:
        try:
            if TORCH is None:
                raise RuntimeError("DELFAST_NATIVE=0 at install")
            compiler = kernels.compiler()
            self.info = {
                "torch": VERSION["__version__"],
                "compiler": _first_line([compiler, "--version"]),
                "cuda": None,
                "wheel": WHEEL,
            }
            self.library = self._build_library(TORCH)
            self.extensions[0].extra_objects = [str(self.library)]
            if self.info["cuda"]:
                self.extensions[0].define_macros = [("DELFAST_WITH_CUDA", None)]
            super().build_extensions()
        except Exception as error:  # setuptools and subprocess raise unrelated kinds
            if "1" in (NATIVE, CUDA):
                raise
            self.info = {"failure": (str(error).strip() or type(error).__name__).splitlines()[0]}
            print(
                f"\n*** delfast: NO NATIVE KERNELS, the slow PyTorch references will run: {self.info['failure']}\n",
                file=sys.stderr,
            )
            self.extensions, self.library = [], None

    def _find_toolkit(self) -> Toolkit | None:
        """Find the toolkit before anything is compiled; None where the CUDA kernels are left out."""
        try:
            if CUDA == "0":
                raise CudaUnavailable("DELFAST_CUDA=0 at install")
            if not VERSION["cuda"] and CUDA == "auto":
                raise CudaUnavailable(
                    f"torch {VERSION['__version__']} is a CPU build; DELFAST_CUDA=1 builds them anyway"
                )
            toolkit.architectures()  # raises at once for a value of another form
            found = toolkit.find_toolkit(WHEEL.removeprefix("cu") if WHEEL else _major(VERSION["cuda"]))
            _ = found.libraries  # raises where the toolkit lacks what is linked
            return found
        except CudaUnavailable as error:
            self._leave_cuda_out(error)
            return None

    def _leave_cuda_out(self, error: CudaUnavailable) -> None:
        if CUDA == "1":
            sys.exit(f"DELFAST_CUDA=1, but {error}")
        self.info["cuda_failure"] = str(error)
        print(f"\n*** delfast: no CUDA kernels: {error}\n", file=sys.stderr)

    def _build_library(self, torch: Path) -> Path:
        """Build the library of the ops, with the CUDA kernels if they can be."""
        found = self._find_toolkit()
        if found is None:
            return kernels.build_ops(torch, None)
        try:
            library = kernels.build_ops(torch, found)
        except CudaUnavailable as error:
            self._leave_cuda_out(error)
            return kernels.build_ops(torch, None)
        self.info["cuda"] = {"toolkit": found.version, "architectures": toolkit.architectures()}
        return library


def _major(version: str | None) -> str | None:
    return version.split(".")[0] if version else None


def _first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


setup(
    version=runpy.run_path(str(ROOT / "delfast/_version.py"))["__version__"] + (f"+{WHEEL}" if WHEEL else ""),
    ext_modules=[
        Extension(
            "delfast._C",
            ["csrc/bindings/module.cpp"],
            include_dirs=[str(ROOT / "csrc"), *([str(TORCH / "include")] if TORCH else [])],  # the latter for pybind11
            # -g0: the flags of some Pythons include debug symbols, which make it eight times as large
            extra_compile_args=["-std=c++20", "-O2", "-fvisibility=hidden", "-g0"],
            extra_link_args=["-Wl,-rpath,$ORIGIN"],  # where libdelfast_ops.so lies
        )
    ],
    cmdclass={"build_py": Copy, "build_ext": Build},
)
