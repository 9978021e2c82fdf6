"""The code that nvcc makes of CUDA kernels for architectures that no machine here has: `python -m benchmarks.ptxas`.

Reads what the build of csrc/cuda for each of them keeps (build_support/nvcc.py) and writes benchmarks/results/ptxas.md:
registers, shared memory, stack frame, spills and 128-bit global loads of every kernel, and the theoretical occupancy on
sm_90.
tests/packaging/test_nvcc.py checks the same.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_support import kernels, toolkit
from build_support.toolkit import Toolkit, find_toolkit

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = ("--options-file", ROOT / "csrc" / "cuda" / "nvcc_options.txt", f"-I{ROOT / 'csrc'}")  # as the build
TABLE = ROOT / "benchmarks" / "results" / "ptxas.md"
OWN_FOLDER = ROOT / "build" / "ptxas"
ARCHITECTURES = ("80", "90", "100", "120")  # toolkit.ARCHITECTURES

# Kernels that read parameters or gradients: threads and bytes of dynamic shared memory of a block, at the most.
# criticality_top: with rows of up to 4608 and of up to 16384 elements.
ROW, LONGEST_ROW = 4752 + 576, 16896 + 2048  # words: csrc/cuda/criticality_top.cuh
# criticality_pieces: for means 16 rows of 512 elements at a time; else whole rows, of up to 16384 elements in all.
CHUNKS, MOST_PIECES = 16 * 532, 16 * 1188  # words: csrc/cuda/criticality_pieces.cuh
TABLES = (4096, 32764)  # bytes of a kernel's arguments: csrc/cuda/common.cuh
STREAMING = {
    **{f"criticality_mean<{table}>": [(128, 0)] for table in TABLES},
    **{f"criticality_top<{table}>": [(128, ROW * 4), (128, LONGEST_ROW * 4)] for table in TABLES},
    **{f"criticality_pieces<{table}>": [(128, CHUNKS * 4), (128, MOST_PIECES * 4)] for table in TABLES},
    **{f"criticality_long_count<{table}>": [(256, 0)] for table in TABLES},
    **{f"criticality_long_sum<{table}>": [(128, 0)] for table in TABLES},
    "selection_read": [(256, 0)],
    "selection_count": [(256, 0)],
    "selection_mark": [(256, 0)],
    "selection_settle": [(256, 0)],
    "masked_update<ResetRule>": [(256, 0)],
    "masked_update<PlainSgdRule>": [(256, 0)],
    "masked_update<SgdRule>": [(256, 0)],
    "masked_update<AdamWRule>": [(256, 0)],
    "channel_dot_rows": [(256, 0)],
    "channel_dot_columns": [(256, 0)],
    "channel_sums_rows": [(256, 0)],
    "channel_sums_columns<true>": [(256, 0)],
    "channel_sums_columns<false>": [(256, 0)],
}
# The same for kernels that read activations and their gradients, many products of each. Their sums stay in registers,
# so fewer warps fit; each has as many independent products at a time as hide their own latency.
MULTIPLYING = {
    "per_example_tiles<FusedMultiplyAdd, 4>": [(128, 0)],
    "per_example_tiles<TensorCores<nvcuda::wmma::precision::tf32>, 4>": [(128, 0)],
    "per_example_tiles<TensorCores<__nv_bfloat16>, 8>": [(128, 0)],
    "per_example_tiles<TensorCores<__half>, 8>": [(128, 0)],
    "per_example_depthwise<4>": [(256, 0)],
    "per_example_add_slabs<4>": [(256, 0)],
    "per_example_add_segments<64, 64>": [(256, 0)],
    "per_example_add_segments<64, 128>": [(256, 0)],
    "per_example_add_segments<128, 128>": [(256, 0)],
    "per_example_add_segments<64, 192>": [(256, 0)],
}
# The same for kernels whose operands go to shared memory by asynchronous copies: a tile's channels, columns and the
# channels of a warp, and what a block has of both, in 4 stages of 32 positions of 16 bits or 16 of 32 bits.
COPYING = {
    f"per_example_segments<Tile<{operand}, {m}, {n}, {warp}, {direct}> >": [(m // warp * n, 4 * 32 * 2 * (m + n))]
    for operand in ("__nv_bfloat16", "__half", "nvcuda::wmma::precision::tf32")
    for m, n, warp in ((64, 64, 64), (64, 128, 64), (128, 128, 64), (64, 192, 32))
    for direct in ("false", "true")
}
READING = STREAMING | MULTIPLYING | COPYING
# Fraction of an sm_90 multiprocessor's warps that must fit: half, or less where a thread has 4 to 8 packs under way.
LEAST_OCCUPANCY = {
    "criticality_mean": 3 / 8,
    "criticality_top": 3 / 16,  # of rows of 16384 elements, which take a third of the shared memory
    "criticality_pieces": 3 / 16,
    "criticality_long_count": 3 / 8,
    "criticality_long_sum": 3 / 8,
    "masked_update": 3 / 8,
}
# A kernel may spill or have a stack frame only if it is here, with its reason.
ALLOWED: dict[str, str] = {}


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; shared memory is the static part, in bytes."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int
    wide_loads: int  # 128-bit global loads inside loops


@dataclass(frozen=True)
class Compiled:
    """One source for one architecture; ``seconds`` are the CPU's for all architectures and the host's code together.

    What else the machine does is not counted.
    """

    source: str
    architecture: str
    seconds: float
    dependencies: str
    kernels: tuple[Kernel, ...]


def compile_all(found: Toolkit) -> list[Compiled]:
    """Compile every source for every architecture; ninja compiles only what is not there or not of the present sources.

    The extension's own kernels serve, if they are for all the architectures; else there are others in OWN_FOLDER.
    """
    wanted = toolkit.ARCHITECTURES.split()
    folder = kernels.FOLDER if kernels.generates(found, wanted) else OWN_FOLDER
    with kernels.locked(folder):
        if folder == OWN_FOLDER:
            kernels.configure(toolkit=found, wanted=wanted, folder=folder)
        kernels.build("delfast_cuda", folder=folder)
    jobs = [
        (folder / "csrc" / "cuda" / source.stem, architecture) for source in SOURCES for architecture in ARCHITECTURES
    ]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: _read(*job), jobs))


def _read(folder: Path, architecture: str) -> Compiled:
    """Read what build_support/nvcc.py has kept of one source."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    loads = _wide_loads(folder / f"sm_{architecture}.cubin")
    resources = _resources(report["ptxas"], architecture)
    found = tuple(Kernel(name, architecture, *numbers, loads.get(name, 0)) for name, numbers in resources.items())
    return Compiled(f"{folder.name}.cu", architecture, report["seconds"], report["included"], found)


def _resources(log: str, architecture: str) -> dict[str, tuple[int, int, int, int]]:
    """Return registers, shared memory, stack frame and spills (in bytes) of each kernel that ptxas reports."""
    found = {}
    # each report is complete before the next one begins
    for report in re.split(r"(?=Compiling entry function)", log)[1:]:
        symbol, compiled_for = re.search(r"entry function '(\w+)' for 'sm_(\w+)'", report).groups()  # type: ignore[union-attr]
        if compiled_for != architecture:
            continue
        stack, stores, loads = (
            int(re.search(pattern, report)[1])  # type: ignore[index]
            for pattern in (r"(\d+) bytes stack frame", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
        )
        registers = int(re.search(r"Used (\d+) registers", report)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", report)
        found[demangled(symbol)] = (registers, int(shared[1]) if shared else 0, stack, stores + loads)
    return found


@functools.cache
def demangled(symbol: str) -> str:
    """Return ``masked_update<SgdRule>`` for ``_ZN7delfast4cuda13masked_updateINS0_7SgdRuleEEEv...``."""
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    match = re.match(r"(?:void )?delfast::cuda::(\w+)(?:<(.*?)>)?\(", text)
    if not match:
        raise ValueError(f"expected a kernel in delfast::cuda, got {text}")
    arguments = match[2].replace("delfast::cuda::", "") if match[2] else ""
    return f"{match[1]}<{arguments}>" if arguments else match[1]


def disassembled(cubin: Path) -> str:
    """Return the machine code; -ndf leaves out the dataflow analysis, which names no more jumps here."""
    return subprocess.run([_nvdisasm(), "-c", "-ndf", cubin], capture_output=True, text=True, check=True).stdout


def _wide_loads(cubin: Path) -> dict[str, int]:
    """Count 128-bit global loads and asynchronous copies in loops, by kernel: from a label to a later jump back.

    A pointer that a kernel reads from memory is generic to nvcc: it loads from it by LD, not by LDG.
    """
    found = {}
    for section in re.split(r"^\.text\.", disassembled(cubin), flags=re.MULTILINE)[1:]:
        symbol, lines = section.split(":", 1)[0], section.splitlines()
        labels = {match[1]: n for n, line in enumerate(lines) if (match := re.match(r"(\.L_x_\w+):", line))}
        in_loop = [False] * len(lines)
        for n, line in enumerate(lines):
            target = re.search(r"BRA.*`\((\.L_x_\w+)\)", line)
            if target and labels[target[1]] < n:
                in_loop[labels[target[1]] : n] = [True] * (n - labels[target[1]])
        wide = re.compile(r"\bLDG?\.E\.128|LDGSTS\.\S*\.128")
        found[demangled(symbol)] = sum(
            bool(wide.search(line)) for line, inside in zip(lines, in_loop, strict=True) if inside
        )
    return found


def least_wide_loads(name: str) -> int:
    """Return the minimum of 128-bit loads of a streaming kernel: two for a pair of dtypes, one if the widths differ.

    The passes that read all scores once more where the one reading failed take packs of four: 128 bits of float32.
    """
    pairs = 2 * (1 + 4) + (2 + 2)
    if name in ("selection_count", "selection_mark", "selection_settle"):
        return 2 * 3 + 1
    if not name.startswith("masked_update"):
        return pairs + 3  # and one a dtype for |g| and |theta|
    return pairs // 2 if name == "masked_update<ResetRule>" else pairs  # a reset does not read what it replaces


def _nvdisasm() -> Path:
    """Return PyPI's disassembler: not every toolkit has one, and an older one may not support the newest GPUs."""
    places = importlib.util.find_spec("nvidia")
    for folder in places.submodule_search_locations or [] if places else []:
        for program in Path(folder).glob("cu*/bin/nvdisasm"):
            return program
    raise FileNotFoundError("expected nvdisasm, found none; pip install -r requirements-dev.txt")


def occupancy(kernel: Kernel, threads: int, dynamic_shared: int) -> float:
    """Return the fraction of an sm_90 multiprocessor's 64 warps that can be resident at the same time.

    Limits of compute capability 9.0 (CUDA C++ Programming Guide, "Compute Capabilities"): 64 warps, 32 blocks, 65536
    registers given out 256 at a time to a warp, 228 KiB of shared memory. Each block takes 1 KiB more for the system.
    """
    warps = threads // 32
    registers_of_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = 65536 // registers_of_warp // warps
    shared = -(-(kernel.shared + dynamic_shared + 1024) // 128) * 128
    blocks = min(64 // warps, 32, by_registers, 228 * 1024 // shared)
    return blocks * warps / 64


def occupancies(kernel: Kernel) -> list[float]:
    return [occupancy(kernel, *shape) for shape in READING[kernel.name]]


def least_occupancy(name: str) -> float:
    return LEAST_OCCUPANCY.get(name.split("<")[0], 0.5)


def table(compiled: list[Compiled], version: str) -> str:
    lines = [
        "# What ptxas makes of the kernels",
        "",
        f"Written by `python -m benchmarks.ptxas` with nvcc {version}. Of each kernel: registers / static shared",
        "memory in bytes / stack frame and spills in bytes. Then, for the kernels that read what a model has:",
        "128-bit global loads (or asynchronous copies) inside loops and theoretical occupancy, both on sm_90 (of two,",
        "for short and long rows).",
        "",
        f"| kernel | {' | '.join(f'sm_{a}' for a in ARCHITECTURES)} | 128-bit loads | occupancy |",
        f"|---|{'---|' * len(ARCHITECTURES)}---|---|",
    ]
    kernels: dict[str, dict[str, Kernel]] = {}
    for unit in compiled:
        for kernel in unit.kernels:
            kernels.setdefault(kernel.name, {})[kernel.architecture] = kernel
    for name, by_architecture in sorted(kernels.items()):
        cells = [
            f"{k.registers} / {k.shared} / {k.stack} + {k.spills}"
            for k in (by_architecture[architecture] for architecture in ARCHITECTURES)
        ]
        hopper = by_architecture["90"]
        reads = name in READING
        cells.append(str(hopper.wide_loads) if reads else "")
        cells.append(", ".join(f"{share:.0%}" for share in occupancies(hopper)) if reads else "")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]  # type: ignore[index]


def main() -> None:
    found = find_toolkit()
    TABLE.write_text(table(compile_all(found), nvcc_version(str(found.nvcc))), encoding="utf-8")
    print(f"wrote {TABLE.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
