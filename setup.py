"""Builds delfast: the CPU kernels with their own instruction-set flags, then the extension that links them.

Environment:
  DELFAST_NATIVE=auto|0|1  auto (the default) installs without the extension if it cannot be built, and says so; 1 fails
                           instead; 0 does not try.
  DELFAST_CUDA=auto|0|1    auto builds the CUDA kernels too if torch is a CUDA build and a toolkit of the same major
                           version is found (no GPU is needed), and says why not; 1 fails instead; 0 does not try.
  TORCH_CUDA_ARCH_LIST     the architectures to build for, as for torch: setup_cuda.py has the default.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()

sys.path.insert(0, str(ROOT))  # pip's isolated front end leaves it out
import setup_cuda  # noqa: E402
from setup_cuda import CudaUnavailable, Toolkit  # noqa: E402

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "delfast's build needs the torch it will run with: install torch, then `pip install --no-build-isolation .`"
    )

# One instruction set a line: the name that its sources end with, and their flags. CMakeLists.txt reads it too.
ISA_FLAGS = {
    line.split()[0]: line.split()[1:] for line in (ROOT / "csrc/isa_flags.txt").read_text(encoding="utf-8").splitlines()
}
# -ffp-contract=off: no FMA, so that all instruction sets agree to the bit
KERNEL_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]


def kernel_sources() -> list[Path]:
    """csrc/cpu/*.cpp, without the instruction sets of another architecture."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [
        path for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if x86 or not path.stem.endswith(tuple(ISA_FLAGS))
    ]


class Build(BuildExtension):
    """Compiles the torch-free kernels one by one, with per-file flags; BuildExtension does the rest."""

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
            if not shutil.which(_compiler()):
                raise RuntimeError(
                    f"no C++ compiler: '{_compiler()}' is not there (set CXX, or install g++ 11 or newer)"
                )
            self.info = {
                "torch": torch.__version__,
                "compiler": _first_line([_compiler(), "--version"]),
                "cuda": None,
            }
            objects = Path(self.build_temp).resolve() / "kernels"
            objects.mkdir(parents=True, exist_ok=True)
            toolkit = self._toolkit()
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                kernels = [pool.submit(self._compile_kernel, source, objects) for source in kernel_sources()]
                cuda_kernels = [] if toolkit is None else self._compile_cuda(pool, objects, toolkit)
                self.extensions[0].extra_objects = [kernel.result() for kernel in kernels] + cuda_kernels
            super().build_extensions()
        except Exception as error:  # distutils, subprocess and torch raise unrelated kinds
            if os.environ.get("DELFAST_NATIVE", "auto") == "1" or os.environ.get("DELFAST_CUDA") == "1":
                raise
            self.info = {"failure": (str(error).strip() or type(error).__name__).splitlines()[0]}
            print(
                f"\n*** delfast: NO NATIVE KERNELS, the slow PyTorch twins will run: {self.info['failure']}\n",
                file=sys.stderr,
            )
            self.extensions = []

    def _toolkit(self) -> Toolkit | None:
        """That of DELFAST_CUDA, sought before anything is compiled; None where the CUDA kernels are left out."""
        wanted = os.environ.get("DELFAST_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            sys.exit(f"expected DELFAST_CUDA to be auto, 0 or 1, got '{wanted}'; set one or unset it")
        try:
            if wanted == "0":
                raise CudaUnavailable("DELFAST_CUDA=0 at install")
            if not torch.version.cuda:
                raise CudaUnavailable(f"expected a CUDA build of torch, this is {torch.__version__}; install one")
            setup_cuda.architectures()  # says at once what it does not understand
            return setup_cuda.find_toolkit(torch.version.cuda.split(".")[0])
        except CudaUnavailable as error:
            self._leave_cuda_out(error)
            return None

    def _leave_cuda_out(self, error: CudaUnavailable) -> None:
        if os.environ.get("DELFAST_CUDA") == "1":
            sys.exit(f"DELFAST_CUDA=1, but {error}")
        self.info["cuda_failure"] = str(error)
        print(f"\n*** delfast: no CUDA kernels: {error}\n", file=sys.stderr)

    def _compile_cuda(self, pool: ThreadPoolExecutor, objects: Path, toolkit: Toolkit) -> list[str]:
        """The CUDA kernels' objects, with the extension told of them; none, and why, if they cannot be built."""
        try:
            jobs = [pool.submit(setup_cuda.compile_object, toolkit, source, objects) for source in setup_cuda.SOURCES]
            compiled, libraries = [job.result() for job in jobs], str(toolkit.libraries)
        except CudaUnavailable as error:
            self._leave_cuda_out(error)
            return []
        extension = self.extensions[0]
        extension.sources += [
            str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/bindings/cuda").glob("*.cpp"))
        ]
        extension.include_dirs.append(str(toolkit.include))
        extension.library_dirs.append(libraries)
        extension.libraries += ["c10_cuda", "cudart"]
        self.info["cuda"] = {"toolkit": toolkit.version, "architectures": setup_cuda.architectures()}
        return compiled

    def _compile_kernel(self, source: Path, objects: Path) -> str:
        flags = next((flags for isa, flags in ISA_FLAGS.items() if source.stem.endswith(isa)), [])
        target = objects / f"{source.stem}.o"
        command = [
            _compiler(),
            *KERNEL_FLAGS,
            *flags,
            f"-I{ROOT / 'csrc'}",
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.stderr.write(result.stderr)
            raise RuntimeError(f"{_compiler()} could not compile {source.name}")
        return str(target)


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


setup(
    ext_modules=[
        CppExtension(
            "delfast._C",
            [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/bindings").glob("*.cpp"))],
            include_dirs=[str(ROOT / "csrc")],
            # at::parallel_for is serial unless it is told of OpenMP
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
