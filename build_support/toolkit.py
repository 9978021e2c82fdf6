"""Finds the CUDA toolkit and reads which architectures are wanted. Needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = "8.0 9.0 10.0 12.0+PTX"


class CudaUnavailable(Exception):
    """Why the CUDA kernels cannot be built, in one line."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: ``version`` is like "13.0"."""

    root: Path
    version: str

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def libraries(self) -> Path:
        """The folder of libcudart_static.a."""
        folders = [self.root / "lib64", self.root / "lib", *self.root.glob("targets/*/lib"), *self.root.glob("lib/*")]
        for folder in folders:
            if (folder / "libcudart_static.a").exists():
                return folder
        raise CudaUnavailable(f"the CUDA toolkit in {self.root} has no libcudart_static.a; install its runtime")


def find_toolkit(wanted_major: str | None = None) -> Toolkit:
    """Return the first toolkit found, of CUDA ``wanted_major`` if given. CudaUnavailable lists the places searched.

    CUDA_HOME or CUDA_PATH, if set, is the only place. A toolkit is where include/cuda_runtime.h and bin/nvcc are; the
    `nvcc` on PATH may be a wrapper that lies elsewhere, so its dry run is read.
    """
    seen = []
    for root in _candidates():
        header = root / "include" / "cuda_runtime_api.h"
        if not (root / "include" / "cuda_runtime.h").is_file() or not (root / "bin" / "nvcc").is_file():
            seen.append(str(root))
            continue
        number = int(re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(encoding="utf-8"))[1])  # type: ignore[index]
        toolkit = Toolkit(root, f"{number // 1000}.{number % 1000 // 10}")
        if wanted_major in (None, toolkit.version.split(".")[0]):
            return toolkit
        seen.append(f"{root} (CUDA {toolkit.version})")
    wanted = f"a toolkit of CUDA {wanted_major}" if wanted_major else "a CUDA toolkit"
    raise CudaUnavailable(f"expected {wanted}, found none (searched {', '.join(seen)}); install one or set CUDA_HOME")


def _candidates() -> Iterator[Path]:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        yield Path(named)
        return
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parent.parent
        dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        if top := re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE):
            yield Path(top[1]).resolve()
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)


def architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or all that the kernels are tested for: like ["8.0", "9.0+PTX"]."""
    wanted = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ARCHITECTURES)
    for architecture in wanted:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", architecture)
        if not match or int(match[1]) < 8:
            raise CudaUnavailable(
                f"expected TORCH_CUDA_ARCH_LIST like '8.0 9.0+PTX', of 8.0 and above, got '{architecture}' in it; "
                "change or unset it"
            )
    return wanted


def generate_flags(wanted: list[str]) -> list[str]:
    """nvcc's flags for these architectures: machine code for each, PTX too where so marked."""
    flags = []
    for architecture in wanted:
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if architecture.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags
