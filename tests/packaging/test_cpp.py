"""The C++ tests of the kernels (csrc/tests), as the extension has them and under sanitizers, and the objects' symbols.

The CUDA kernels are among them: they are compiled by the C++ compiler and run on the CPU."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from build_support import kernels

ROOT = kernels.ROOT
VARIANTS = ["release", "address", "thread"]  # csrc/tests/CMakeLists.txt defines them
FULL = [pytest.param(f"{sanitizer}_full", marks=pytest.mark.slow) for sanitizer in ("address", "thread")]
ISAS = re.findall(
    r'"(\w+)"', re.search(r"kIsaNames\[\] = {(.*?)}", (ROOT / "csrc/delfast/cpu_dispatch.h").read_text())[1]
)

pytestmark = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "c++")),
    reason="no C++ compiler: install g++ or clang++, or set CXX",
)
x86_only = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the fibers that run CUDA kernels on the CPU are for x86-64"
)


def run(tool: str, *arguments: str) -> str:
    """Return a program's output; if it fails, that is the test's failure."""
    executable = shutil.which(tool, path=kernels.tools_path())
    assert executable, f"expected {tool} in this Python environment or on PATH; pip install -r requirements-dev.txt"
    result = subprocess.run(
        [executable, *arguments],
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},  # as in csrc/tests/CMakeLists.txt
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        pytest.fail(f"{tool} {' '.join(arguments)} exited with {result.returncode}:\n{result.stdout}", pytrace=False)
    return result.stdout


def build(variant: str) -> Path:
    """Build a variant's tests beside the extension's kernels; return the folder of its programs."""
    with kernels.locked():  # another worker of pytest may build here too
        try:
            kernels.configure()
            kernels.build(f"tests_{variant}")
        except kernels.BuildError as error:
            pytest.fail(str(error), pytrace=False)
    return kernels.FOLDER / "tests" / variant


@pytest.mark.parametrize("variant", [*VARIANTS, *FULL])
def test_kernels_without_torch(variant: str) -> None:
    build(variant)
    chosen = ["--test-dir", str(kernels.FOLDER), "--label-regex", f"^{variant}$", "--no-tests=error"]
    output = run("ctest", *chosen, "--parallel", str(os.cpu_count()), "--output-on-failure")
    print(output)  # names the instruction sets that this CPU made it skip
    assert "100% tests passed" in output


# the variant that must find a bug planted in a small CUDA kernel, whatever the schedule, and its message
CAUGHT = [
    ("missing-syncthreads", "thread", "data race"),
    ("missing-syncwarp", "thread", "data race"),
    ("shared-reuse", "thread", "data race"),
    ("out-of-bounds-static", "address", "out of bounds"),
    ("out-of-bounds-dynamic", "address", "use-after-poison"),
    ("divergent-barrier", "release", "divergent __syncthreads"),
    ("missing-wait", "release", "whose asynchronous copy was not waited for"),
    ("missing-barrier-after-wait", "thread", "data race"),
    ("wrong-swizzle", "release", "bank conflicts"),
    ("stale-accumulator", "release", "wrong results"),
]


def run_planted(folder: Path, bug: str, seed: int) -> subprocess.CompletedProcess[str]:
    program = folder / "cuda" / "planted_bugs"
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, bug, str(seed)], capture_output=True, text=True, env=environment)


@x86_only
@pytest.mark.parametrize(("bug", "variant", "message"), CAUGHT)
def test_bugs_planted_in_cuda_kernels_are_caught(bug: str, variant: str, message: str) -> None:
    folder = build(variant)
    for seed in range(6):
        result = run_planted(folder, bug, seed)
        assert result.returncode != 0
        assert message in result.stdout + result.stderr
        assert "planted_bugs.cpp:" in result.stdout + result.stderr  # names the line


@x86_only
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_caught_where_there_is_no_bug(variant: str) -> None:
    folder = build(variant)
    for seed in range(6):
        result = run_planted(folder, "none", seed)
        assert (result.returncode, result.stdout, result.stderr) == (0, "right results\n", "")


@x86_only
@pytest.mark.slow
def test_cuda_kernels_touch_few_sectors() -> None:
    """Run the program that counts memory sectors on ResNet-18 and holds them to bounds."""
    print(run(str(build("release") / "cuda" / "test_sectors")))


@x86_only
@pytest.mark.slow
@pytest.mark.parametrize("family", ["criticality", "selection", "masked_update", "per_example", "per_example_segments"])
def test_cuda_kernels_under_many_schedules(family: str) -> None:
    print(run(str(build("release") / "cuda" / f"test_{family}"), *map(str, range(2, 40))))
    print(run(str(build("address_full") / "cuda" / f"test_{family}"), "0", "1", "2"))
    print(run(str(build("thread_full") / "cuda" / f"test_{family}"), "0", "1", "2"))


@pytest.mark.parametrize("library", ["delfast_cpu", "tests/delfast_cpu_address"])  # the less inlined, the more defined
def test_wide_objects_define_no_function_that_others_share(library: str) -> None:
    """The linker keeps one of the weak functions that several objects define, and every CPU runs that one.

    A function compiled for AVX-512 must therefore have the instruction set in its name.
    """
    build("address" if "address" in library else "release")
    archive = kernels.FOLDER / "csrc" / library
    objects = archive.parent / "CMakeFiles" / f"{archive.name}.dir"
    assert ISAS[0] == "scalar" and len(ISAS) > 1
    for isa in ISAS[1:]:
        files = sorted(objects.rglob(f"*_{isa}.cpp.o"))
        assert bool(files) == (platform.machine() in ("x86_64", "AMD64"))
        for file in files:
            lines = run("nm", "--extern-only", "--defined-only", "--format=posix", str(file)).splitlines()
            types = {line.split()[0]: line.split()[1] for line in lines}
            namespace = f"7delfast3cpu{len(isa)}{isa}"  # as mangled
            assert any(namespace in symbol for symbol in types), f"{file.name} lacks its table of kernels"
            # data (types D, B, R, V) is the same for every CPU
            foreign = [symbol for symbol, type_ in types.items() if namespace not in symbol and type_ not in "DBRV"]
            assert foreign == [], f"{file.name} defines {', '.join(foreign)}; mark these DELFAST_INLINE"


def test_a_changed_source_rebuilds_only_the_objects_that_include_it() -> None:
    build("release")
    objects: dict[str, set[str]] = {}
    for block in run("ninja", "-C", str(kernels.FOLDER), "-t", "deps").split("\n\n"):
        target, *included = block.splitlines() or [""]
        name = target.split(":")[0]
        if "/tests/" not in name and name.endswith(".o"):
            for path in included:
                objects.setdefault(path.strip(), set()).add(Path(name).name)
    isas = [isa for isa in ISAS if (ROOT / f"csrc/cpu/criticality_{isa}.cpp").exists()]
    if platform.machine() not in ("x86_64", "AMD64"):
        isas = ["scalar"]
    assert objects[str(ROOT / "csrc/cpu/criticality.inl")] == {f"criticality_{isa}.cpp.o" for isa in isas}
    if (kernels.FOLDER / "csrc/libdelfast_cuda.a").exists():
        assert objects[str(ROOT / "csrc/cuda/masked_update.cu")] == {"masked_update.cu.o"}
        assert objects[str(ROOT / "csrc/cuda/selection.cuh")] == {"selection.cu.o"}
