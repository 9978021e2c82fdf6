"""The kernels on another architecture: compiled for aarch64, their C++ tests run by an emulator of its CPU."""

import shutil
import subprocess

import pytest

from build_support import kernels

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_kernels_compile_and_pass_their_tests_on_aarch64(tmp_path):
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CROSSCOMPILING_EMULATOR": f"{EMULATOR};-L;/usr/aarch64-linux-gnu",
        "CMAKE_MAKE_PROGRAM": kernels.find_tool("ninja"),
    }
    cmake, build = kernels.find_tool("cmake"), str(tmp_path)
    settings = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run([cmake, "-S", str(kernels.ROOT), "-B", build, "-G", "Ninja", *settings], check=True)
    subprocess.run([cmake, "--build", build, "--target", "tests_release"], check=True)
    chosen = ["--test-dir", build, "--label-regex", "^release$", "--no-tests=error", "--output-on-failure"]
    found = subprocess.run([kernels.find_tool("ctest"), *chosen], capture_output=True, text=True)
    print(found.stdout)
    assert found.returncode == 0, found.stdout
    assert "release.cpu.criticality.scalar" in found.stdout
