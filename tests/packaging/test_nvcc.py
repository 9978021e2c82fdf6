"""The code that nvcc makes of the CUDA kernels, on every architecture they are built for; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import ptxas
from build_support import nvcc
from build_support.toolkit import CudaUnavailable, find_toolkit, generate_flags

try:
    TOOLKIT = find_toolkit()
except CudaUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def compiled() -> list[ptxas.Compiled]:
    return ptxas.compile_all(TOOLKIT)


def kernels(compiled: list[ptxas.Compiled], names: object = None) -> list[ptxas.Kernel]:
    return [k for unit in compiled for k in unit.kernels if names is None or k.name in names]  # type: ignore[operator]


def test_every_source_compiles_quickly(compiled: list[ptxas.Compiled]) -> None:
    assert {unit.source for unit in compiled} == {path.name for path in ptxas.SOURCES} != set()
    assert {unit.architecture for unit in compiled} == set(ptxas.ARCHITECTURES)
    for unit in compiled:
        message = f"{unit.source} took {unit.seconds:.0f} s of CPU time; touch it and try again if the machine was busy"
        assert unit.seconds < 20 * len(ptxas.ARCHITECTURES), message


def test_no_torch_header_reaches_nvcc(compiled: list[ptxas.Compiled]) -> None:
    for unit in compiled:
        assert "csrc/delfast/params.h" in unit.dependencies
        foreign = [
            path for path in unit.dependencies.split() if any(f"/{name}/" in path for name in ("torch", "ATen", "c10"))
        ]
        assert foreign == []


def test_no_kernel_spills_or_has_a_stack_frame(compiled: list[ptxas.Compiled]) -> None:
    assert kernels(compiled)
    for kernel in kernels(compiled):
        assert (kernel.spills, kernel.stack) == (0, 0) or kernel.name in ptxas.ALLOWED, kernel


def test_streaming_loops_load_128_bits(compiled: list[ptxas.Compiled]) -> None:
    streaming = kernels(compiled, ptxas.STREAMING)
    assert {kernel.name for kernel in streaming} == set(ptxas.STREAMING)
    for kernel in streaming:
        assert kernel.wide_loads >= ptxas.least_wide_loads(kernel.name), kernel


def test_enough_of_hoppers_warps_fit(compiled: list[ptxas.Compiled]) -> None:
    for kernel in kernels(compiled, ptxas.STREAMING):
        if kernel.architecture == "90":
            assert min(ptxas.occupancies(kernel)) >= ptxas.least_occupancy(kernel.name), kernel


def test_multiplying_loops_load_128_bits(compiled: list[ptxas.Compiled]) -> None:
    multiplying = kernels(compiled, ptxas.MULTIPLYING)
    assert {kernel.name for kernel in multiplying} == set(ptxas.MULTIPLYING)
    for kernel in multiplying:
        operands = 1 if "_add_" in kernel.name else 2
        assert kernel.wide_loads >= operands, kernel


def test_twelve_multiplying_warps_fit_on_hopper(compiled: list[ptxas.Compiled]) -> None:
    for kernel in kernels(compiled, ptxas.MULTIPLYING):
        if kernel.architecture == "90":
            assert 64 * min(ptxas.occupancies(kernel)) >= 12, kernel


def test_loops_that_copy_ahead_copy_128_bits(compiled: list[ptxas.Compiled]) -> None:
    copying = kernels(compiled, ptxas.COPYING)
    assert {kernel.name for kernel in copying} == set(ptxas.COPYING)
    for kernel in copying:
        assert kernel.wide_loads >= 2, kernel


def test_as_many_warps_that_copy_ahead_fit_on_hopper_as_their_registers_allow(compiled: list[ptxas.Compiled]) -> None:
    for kernel in kernels(compiled, ptxas.COPYING):
        if kernel.architecture == "90":
            assert 64 * min(ptxas.occupancies(kernel)) >= (12 if "192" in kernel.name else 8), kernel


ROUNDING = """
#include "cuda/ptx.cuh"
__global__ void round(unsigned* bits) { *bits = delfast::cuda::round_to_tf32(*bits); }
"""


@pytest.mark.parametrize("architecture", ptxas.ARCHITECTURES)
def test_rounding_to_tf32_keeps_nans_of_both_signs(architecture: str, tmp_path: Path) -> None:
    """By a signed and an unsigned maximum, which no compiler may take for superfluous."""
    source, cubin = tmp_path / "round.cu", tmp_path / "round.cubin"
    source.write_text(ROUNDING, encoding="utf-8")
    command = [str(TOOLKIT.nvcc), *ptxas.FLAGS, "-cubin", f"-arch=sm_{architecture}", "-o", cubin, source]
    subprocess.run(command, check=True)
    maxima = re.findall(r"\b(?:VIADD|VI|I)MNMX(\.U32)?\b", ptxas.disassembled(cubin))
    assert sorted(maxima) == ["", ".U32"]


@pytest.mark.parametrize("wanted", ["9.0a", "9.0+PTX", "8.0 12.0+PTX"])
def test_machine_code_is_kept_for_each_architecture(wanted: str, tmp_path: Path) -> None:
    """A single architecture is not in the name of the file that nvcc leaves."""
    source, kept = tmp_path / "two_words.cu", tmp_path / "sm_75"
    source.write_text("__global__ void store(int* p) { *p = 1; }", encoding="utf-8")
    compiled = [
        str(TOOLKIT.nvcc),
        *generate_flags(wanted.split()),
        "-MD",
        "-MF",
        str(tmp_path / "d"),
        "-c",
        str(source),
    ]
    assert nvcc.main(kept, [*compiled, "-o", str(tmp_path / "o")]) == 0
    expected = {f"sm_{one.removesuffix('+PTX').replace('.', '')}.cubin" for one in wanted.split()}
    assert {path.name for path in kept.glob("*.cubin")} == expected


def test_the_table_in_the_repository_is_of_these_kernels(compiled: list[ptxas.Compiled]) -> None:
    version = ptxas.nvcc_version(str(TOOLKIT.nvcc))
    kept = ptxas.TABLE.read_text(encoding="utf-8")
    if f"with nvcc {version}." not in kept:
        pytest.skip(f"the table was made with another nvcc than {version}, whose register allocation may differ")
    assert kept == ptxas.table(compiled, version), "make it again: python -m benchmarks.ptxas"
