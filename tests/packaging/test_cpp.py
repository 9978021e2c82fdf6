"""The C++ tests of the kernels (csrc/tests), with sanitizers and optimized like the wheel, and the objects' symbols.

The CUDA kernels are among them: they are compiled by the C++ compiler and run on the CPU."""

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

SANITIZERS = {"release": "", "address": "address", "thread": "thread"}  # by kind of build
KINDS = list(SANITIZERS)
COMPILERS = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)),
    reason=f"no C++ compiler: none of {', '.join(COMPILERS)} found; install g++ or clang++, or set CXX",
)
x86_only = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the fibers that run CUDA kernels on the CPU are for x86-64"
)


def run(tool: str, *arguments: str) -> str:
    """Output of a tool of this Python environment, or else of PATH; if it fails, that is the test's failure."""
    beside_python = Path(sys.executable).parent
    path = f"{beside_python}{os.pathsep}{os.environ['PATH']}"
    executable = shutil.which(tool, path=path)
    assert executable, f"expected {tool} beside {sys.executable} or on PATH; pip install -r requirements-dev.txt"
    # cmake finds ninja by PATH; of leaks see CMakeLists.txt
    result = subprocess.run(
        [executable, *arguments],
        env=os.environ | {"PATH": path, "ASAN_OPTIONS": "detect_leaks=0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        pytest.fail(f"{tool} {' '.join(arguments)} exited with {result.returncode}:\n{result.stdout}", pytrace=False)
    return result.stdout


def build(kind: str) -> Path:
    """build/cpp-KIND, which stays: a second run compiles only what has changed."""
    folder = ROOT / "build" / f"cpp-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of pytest may build here too
        run("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DDELFAST_SANITIZE={SANITIZERS[kind]}")
        run("cmake", "--build", str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_without_torch(kind: str) -> None:
    folder = build(kind)
    jobs = str(os.cpu_count())
    output = run("ctest", "--test-dir", str(folder), "--parallel", jobs, "--output-on-failure", "--no-tests=error")
    print(output)  # names the instruction sets that this CPU made it skip
    assert "100% tests passed" in output


# which build must notice a bug that is planted in a small CUDA kernel, whatever the schedule, and what it then says
CAUGHT = [
    ("missing-syncthreads", "thread", "data race"),
    ("missing-syncwarp", "thread", "data race"),
    ("shared-reuse", "thread", "data race"),
    ("out-of-bounds-static", "address", "out of bounds"),
    ("out-of-bounds-dynamic", "address", "use-after-poison"),
    ("divergent-barrier", "release", "divergent __syncthreads"),
]


def run_planted(kind: str, bug: str, seed: int) -> subprocess.CompletedProcess[str]:
    program = build(kind) / "planted_bugs"
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, bug, str(seed)], capture_output=True, text=True, env=environment)


@x86_only
@pytest.mark.parametrize(("bug", "kind", "said"), CAUGHT)
def test_bugs_planted_in_cuda_kernels_are_caught(bug: str, kind: str, said: str) -> None:
    for seed in range(6):
        result = run_planted(kind, bug, seed)
        assert result.returncode != 0
        assert said in result.stdout + result.stderr
        assert "planted_bugs.cpp:" in result.stdout + result.stderr  # names the line


@x86_only
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_caught_where_there_is_no_bug(kind: str) -> None:
    for seed in range(6):
        result = run_planted(kind, "none", seed)
        assert (result.returncode, result.stdout, result.stderr) == (0, "right results\n", "")


@x86_only
@pytest.mark.slow
@pytest.mark.parametrize("family", ["criticality", "selection", "masked_update", "per_example"])
def test_cuda_kernels_under_many_schedules(family: str) -> None:
    print(run(str(build("release") / f"test_cuda_{family}"), *map(str, range(3, 40))))
    print(run(str(build("address") / f"test_cuda_{family}"), "0", "1", "2"))
    print(run(str(build("thread") / f"test_cuda_{family}"), "0", "1", "2"))


@pytest.mark.parametrize("kind", ["release", "address"])  # the less is inlined, the more is defined
def test_wide_objects_define_no_function_that_others_share(kind: str) -> None:
    """Of a weak function that several objects define the linker keeps one. Were it one compiled for AVX-512, every CPU
    would run that. So whatever code these objects define outwardly must carry their instruction set in its name."""
    objects = build(kind) / "CMakeFiles" / "delfast_cpu.dir"
    isas = [line.split()[0] for line in (ROOT / "csrc" / "isa_flags.txt").read_text().splitlines()]
    for isa in isas:
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
