"""Builds delfast: CMake builds the archives of the kernels, then torch's BuildExtension the extension that links them.

Environment:
  DELFAST_NATIVE=auto|0|1  auto (the default) installs without the extension if it cannot be built, and prints why; 1
                           fails instead; 0 does not try.
  DELFAST_CUDA=auto|0|1    auto builds the CUDA kernels too if torch is a CUDA build and a toolkit of the same major
                           version is found (no GPU is needed), and prints why not; 1 fails instead; 0 does not try.
  TORCH_CUDA_ARCH_LIST     the architectures to build for, as for torch: build_support/toolkit.py has the default.
  MAX_JOBS                 the number of compilers at once, as for torch (default: one for each CPU).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()

sys.path.insert(0, str(ROOT))  # pip's isolated front end leaves it out
from build_support import kernels, toolkit  # noqa: E402
from build_support.toolkit import CudaUnavailable, Toolkit  # noqa: E402

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "delfast's build needs the torch it will run with: install torch, then `pip install --no-build-isolation .`"
    )


class Build(BuildExtension):
    """Build the kernels' archives with CMake; BuildExtension compiles the bindings and links both."""

    info: dict[str, object]

    def run(self) -> None:
        super().run()
        # run() puts `inplace` aside while it builds, so where the package lies is known only here
        package = (ROOT if self.inplace else Path(self.build_lib)) / "delfast"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(self.info) + "\n", encoding="utf-8")

    def build_extensions(self) -> None:
        try:
            if os.environ.get("DELFAST_NATIVE") == "0":
                raise RuntimeError("DELFAST_NATIVE=0 at install")
            compiler = kernels.compiler()
            self.info = {
                "torch": torch.__version__,
                "compiler": _first_line([compiler, "--version"]),
                "cuda": None,
            }
            found = self._find_toolkit()
            os.environ["PATH"] = kernels.tools_path()  # BuildExtension's ninja, too, may lie beside this Python
            self.extensions[0].extra_objects = self._build_archives(found)
            super().build_extensions()
        except Exception as error:  # distutils, subprocess and torch raise unrelated kinds
            if os.environ.get("DELFAST_NATIVE", "auto") == "1" or os.environ.get("DELFAST_CUDA") == "1":
                raise
            self.info = {"failure": (str(error).strip() or type(error).__name__).splitlines()[0]}
            print(
                f"\n*** delfast: NO NATIVE KERNELS, the slow PyTorch references will run: {self.info['failure']}\n",
                file=sys.stderr,
            )
            self.extensions = []

    def _find_toolkit(self) -> Toolkit | None:
        """Find the toolkit before anything is compiled; None where the CUDA kernels are left out."""
        wanted = os.environ.get("DELFAST_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            sys.exit(f"expected DELFAST_CUDA to be auto, 0 or 1, got '{wanted}'; set one or unset it")
        try:
            if wanted == "0":
                raise CudaUnavailable("DELFAST_CUDA=0 at install")
            if not torch.version.cuda:
                raise CudaUnavailable(f"expected a CUDA build of torch, this is {torch.__version__}; install one")
            toolkit.architectures()  # raises at once for a value of another form
            return toolkit.find_toolkit(torch.version.cuda.split(".")[0])
        except CudaUnavailable as error:
            self._leave_cuda_out(error)
            return None

    def _leave_cuda_out(self, error: CudaUnavailable) -> None:
        if os.environ.get("DELFAST_CUDA") == "1":
            sys.exit(f"DELFAST_CUDA=1, but {error}")
        self.info["cuda_failure"] = str(error)
        print(f"\n*** delfast: no CUDA kernels: {error}\n", file=sys.stderr)

    def _build_archives(self, found: Toolkit | None) -> list[str]:
        """Build the kernels, add the CUDA ones to the extension, and return the archives to link."""
        if found is None:
            return kernels.build_archives(None)
        try:
            libraries = str(found.libraries)
            archives = kernels.build_archives(found)
        except CudaUnavailable as error:
            self._leave_cuda_out(error)
            return kernels.build_archives(None)
        extension = self.extensions[0]
        extension.sources += [
            str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/bindings/cuda").glob("*.cpp"))
        ]
        extension.define_macros.append(("DELFAST_WITH_CUDA", None))
        extension.include_dirs.append(str(found.include))
        extension.library_dirs.append(libraries)
        extension.libraries += ["c10_cuda", "cudart"]
        self.info["cuda"] = {"toolkit": found.version, "architectures": toolkit.architectures()}
        return archives


def _first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


setup(
    ext_modules=[
        CppExtension(
            "delfast._C",
            [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/bindings").glob("*.cpp"))],
            include_dirs=[str(ROOT / "csrc")],
            # at::parallel_for is serial without this macro
            extra_compile_args=[
                "-std=c++20",
                "-O2",
                "-fopenmp",
                "-DAT_PARALLEL_OPENMP=1",
                "-fvisibility=hidden",
                "-g0",  # some Pythons ask for debug symbols, eight times the size
            ],
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": Build},
)
