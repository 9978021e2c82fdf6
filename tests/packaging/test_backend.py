"""The backend that runs and the reason that it reports; installing with and without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import delfast
from build_support import kernels
from build_support.toolkit import CudaUnavailable, Toolkit, architectures, find_toolkit, generate_flags
from delfast.backend import _runs_on
from delfast.ops import BACKEND, OPS
from delfast.ops.native import LIBRARY
from delfast.ops.schemas import DIGEST
from tests import ROOT

needs_native = pytest.mark.skipif(BACKEND.module is None, reason=f"no native kernels: {BACKEND.reason}")


def python(
    code: str, path: Path | None = None, argument: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process; ``path`` shadows the installed package, ``argument`` is ``sys.argv[1]``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("DELFAST_")} | environment
    if path:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code, *([] if argument is None else [str(argument)])]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")


def copied_package(tmp_path: Path, build_info: dict[str, object] | None) -> Path:
    shutil.copytree(ROOT / "delfast", tmp_path / "delfast", ignore=shutil.ignore_patterns("__pycache__"))
    info = tmp_path / "delfast/_build_info.json"
    info.unlink(missing_ok=True)
    if build_info is not None:
        info.write_text(json.dumps(build_info))
    return tmp_path


STATUS = "import delfast, json; print(json.dumps(delfast.status()))"


def test_status_is_plain_and_complete() -> None:
    status = json.loads(json.dumps(delfast.status()))
    assert status["backend"] in ("native", "torch") and status["reason"]
    assert status["torch"] == torch.__version__ and status["threads"] == torch.get_num_threads()
    if status["backend"] == "native":
        assert status["isa"] in status["isas"] and status["built_against"].startswith("2.")


def test_the_references_can_be_chosen_and_run_everything() -> None:
    code = """
import torch, delfast, json
from torch import nn
make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
torch.manual_seed(0)
model, batch = make(), [(torch.randn(6, 3, 8, 8), torch.arange(6) % 4)]
for dtype in (torch.float32, torch.float64):
    model.to(dtype)
    batch = [(batch[0][0].to(dtype), batch[0][1])]
    for granularity in ("channel", "param"):
        mask = delfast.score(model, batch).select(0.5, granularity)
        result = delfast.unlearn(model, retain=batch, mask=mask, init=lambda: make().to(dtype), epochs=1, lr=0.1)
print(json.dumps(delfast.status()), mask.digest)
"""
    result = python(code, DELFAST_BACKEND="torch")
    assert result.returncode == 0, result.stderr
    assert '"backend": "torch"' in result.stdout and "chosen by DELFAST_BACKEND=torch" in result.stdout
    assert "Warning" not in result.stderr  # chosen, so nothing to warn of


@needs_native
def test_masks_of_both_backends_are_equal() -> None:
    code = """
import torch, delfast
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.ReLU(), torch.nn.Linear(40, 5))
scores = delfast.score(model, [(torch.randn(20, 50), torch.arange(20) % 5)])
print([scores.select(0.3, granularity).digest for granularity in ("channel", "param")])
"""
    native, references = python(code, DELFAST_BACKEND="native"), python(code, DELFAST_BACKEND="torch")
    assert native.stdout == references.stdout != "", native.stderr + references.stderr


@needs_native
@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (None, "the extension was not built"),
        ({"failure": "no C++ compiler"}, r"the extension was not built: no C\+\+ compiler"),
    ],
)
def test_an_unusable_extension_warns_once_or_fails_loudly(tmp_path: Path, info: object, reason: str) -> None:
    package = copied_package(tmp_path, info)  # type: ignore[arg-type]
    result = python(STATUS, package)
    assert result.returncode == 0 and json.loads(result.stdout)["backend"] == "torch"
    warned = [line for line in result.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warned) == 1 and re.search(reason, warned[0]) and "install again with" in warned[0]
    forced = python(STATUS, package, DELFAST_BACKEND="native")
    assert forced.returncode != 0 and re.search(f"native kernels are required, but .*{reason}", forced.stderr)


@pytest.mark.long
@pytest.mark.parametrize("installed", [True, False])
def test_a_source_folder_that_was_never_built_is_named(tmp_path: Path, installed: bool) -> None:
    """Python imports a clone's own folder first where it is started in the clone's root, also after an install."""
    clone, site = copied_package(tmp_path / "clone", None), tmp_path / "site"
    (clone / "pyproject.toml").touch()
    (site / "delfast-9.dist-info").mkdir(parents=True)
    (site / "delfast-9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: delfast\nVersion: 9\n")
    (site / "delfast").mkdir()
    if installed:
        (site / "delfast/__init__.py").touch()
    result = python("import sys; sys.path.append(sys.argv[1])\n" + STATUS, clone, argument=site)
    status = json.loads(result.stdout)
    assert status["backend"] == "torch"
    assert f"this is the source folder '{clone}', in which the extension was never built" in status["reason"]
    assert status["reason"] in result.stderr and "compiler" not in status["reason"]
    assert (f"not the delfast that is installed in '{site}'; leave the folder" in status["reason"]) == installed
    assert status["reason"].endswith("build in place with `make`")


@needs_native
def test_a_torch_without_the_interface_is_named_in_one_line() -> None:
    old = "import torch; torch.__version__ = '2.9.1+cu128'\n"
    result = python(old + STATUS)
    assert json.loads(result.stdout)["backend"] == "torch"
    assert "the extension needs torch 2.10 or newer, this is 2.9.1+cu128; upgrade torch" in result.stderr
    newer = python("import torch; torch.__version__ = '3.0.0a0+git'\n" + STATUS)
    assert json.loads(newer.stdout)["backend"] == "native" and not newer.stderr


@needs_native
def test_the_library_refers_to_torchs_stable_interface_alone() -> None:
    """The names of at::, c10:: and torch:: are mangled, and change with the version of torch."""
    nm = ["nm", "--dynamic", "--undefined-only", "--format=posix", str(LIBRARY)]
    undefined = {line.split()[0] for line in subprocess.check_output(nm, text=True).splitlines()}
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert not [name for name in undefined if re.match(r"_ZN?[A-Z]*\d*(2at|3c10|5torch)", name)]
    assert BACKEND.module is not None
    listing = subprocess.check_output(["readelf", "-d", BACKEND.module.__file__], text=True)
    assert "libdelfast_ops.so" in listing and "libtorch" not in listing


@needs_native
def test_an_extension_that_does_not_load_says_why(tmp_path: Path) -> None:
    package = copied_package(tmp_path, {"torch": torch.__version__, "cuda": None})
    for name, content in (("_C*.so", b"\x7fELF, but no more"), (LIBRARY.name, DIGEST.encode()), (LIBRARY.name, b"")):
        next((package / "delfast").glob(name)).write_bytes(content)
        result = python(STATUS, package)
        assert json.loads(result.stdout)["backend"] == "torch"
        assert "the extension does not load" in result.stderr


@needs_native
def test_a_library_of_other_schemas_is_not_loaded(tmp_path: Path) -> None:
    package = copied_package(tmp_path, {"torch": torch.__version__, "cuda": None})
    library = package / "delfast" / LIBRARY.name
    content = library.read_bytes()
    assert content.count(DIGEST.encode()) == 1
    library.write_bytes(content.replace(DIGEST.encode(), b"0" * len(DIGEST)))
    code = "import warnings; warnings.simplefilter('error', UserWarning)\n"  # of kernels that replace others
    result = python(code + STATUS, package)
    assert json.loads(result.stdout)["backend"] == "torch"
    expected = f"{LIBRARY.name} was built for other schemas than these ops have; install again"
    assert expected in result.stderr
    forced = python(STATUS, package, DELFAST_BACKEND="native")
    assert forced.returncode and expected in forced.stderr


@needs_native
def test_the_module_of_another_installation_is_not_loaded(tmp_path: Path) -> None:
    """An editable install, whose finder answers for every module that the first package on the path lacks."""
    package = copied_package(tmp_path, {"torch": torch.__version__, "cuda": None})
    next((package / "delfast").glob("_C*.so")).unlink()
    finder = f"""
import importlib.machinery, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, [{str(ROOT / "delfast")!r}]) if "_C" in name else None
sys.meta_path.append(Finder())
"""
    result = python(finder + STATUS, package)
    assert json.loads(result.stdout)["backend"] == "torch"
    assert f"no module _C for Python {sys.version_info.major}.{sys.version_info.minor}" in result.stderr


@needs_native
def test_isa_can_be_forced_and_nonsense_is_refused() -> None:
    assert BACKEND.module is not None
    for isa in BACKEND.module.isas():
        assert json.loads(python(STATUS, DELFAST_FORCE_ISA=isa).stdout)["isa"] == isa
    result = python(STATUS, DELFAST_FORCE_ISA="sse9")
    assert result.returncode != 0 and "expected DELFAST_FORCE_ISA to be scalar, avx2, avx512 or amx" in result.stderr
    result = python(STATUS, DELFAST_BACKEND="gpu")
    assert result.returncode != 0 and "expected DELFAST_BACKEND to be 'native' or 'torch', got 'gpu'" in result.stderr
    twice = "import delfast\nfor _ in range(2):\n  try: delfast.localize\n  except ImportError as error: print(error)"
    lines = python(twice, DELFAST_BACKEND="gpu").stdout.splitlines()  # the second access finds a package half imported
    assert len(lines) == 2 and lines[0] == lines[1] and "expected DELFAST_BACKEND" in lines[0]
    with pytest.raises(ValueError, match="expected an instruction set of this CPU, got 'sse9'"):
        BACKEND.module.force_isa("sse9")


def test_importing_the_package_needs_no_experiment_dependency() -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torchvision", "sklearn", "matplotlib", "typer", "rich", "vit_pytorch"}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import delfast, torch
from delfast import *
delfast.localize(torch.nn.Linear(8, 4), [(torch.randn(3, 8), torch.tensor([0, 1, 2]))], budget=0.6)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_kernels_know_no_torch() -> None:
    for path in [path for name in ("cpu", "cuda", "delfast", "tests") for path in (ROOT / "csrc" / name).rglob("*.*")]:
        assert not re.search(r"#include *[<\"](torch|ATen|c10)/", path.read_text(encoding="utf-8")), path
    for path in (ROOT / "csrc/bindings").rglob("*.*"):
        included = re.findall(r"#include *[<\"]((?:torch|ATen|c10)/[^>\"]*)", path.read_text(encoding="utf-8"))
        assert all(name.startswith(("torch/csrc/stable/", "torch/headeronly/")) for name in included), path


def install(tmp_path: Path, **environment: str) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Build the wheel from a copy of the sources, install it alone into a directory, and ask it for its status."""
    source, target = tmp_path / "source", tmp_path / "site"
    folders = ["delfast", "csrc", "build_support"]
    names = [*folders, "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    for name in names:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
            shutil.copytree(ROOT / name, source / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, source / name)
    built = source / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/delfast"
    built.mkdir(parents=True)
    (built / "removed_since.py").touch()
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target"]
    result = subprocess.run(
        [*pip, str(target), str(source)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert not (target / "delfast/removed_since.py").exists() and "removed_since" not in result.stdout
    return result.stdout + result.stderr, python(STATUS, target)


def test_without_a_compiler_it_installs_and_says_so(tmp_path: Path) -> None:
    _, result = install(tmp_path, CXX="no-such-compiler")
    assert json.loads(result.stdout)["backend"] == "torch"
    assert "no C++ compiler: 'no-such-compiler' is not there" in result.stderr


def test_without_cmake_it_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = f"expected cmake beside {tmp_path}/python or on PATH, found none; pip install cmake ninja"
    with pytest.raises(kernels.BuildError, match=f"^{re.escape(expected)}$"):
        kernels.find_tool("cmake")


@pytest.mark.parametrize(("source", "by"), [("bad.cu", "nvcc "), ("bad.cpp", "")])
def test_what_cannot_be_compiled_is_named_in_one_line(
    source: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "message.txt").write_text(f"In file included from {source}:1:\n{source}(3): error: no such kernel\n")
    (tmp_path / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.25)
        project(kernels LANGUAGES NONE)
        add_custom_command(OUTPUT {source}.o COMMAND cat ${{CMAKE_SOURCE_DIR}}/message.txt COMMAND false)
        add_custom_target(delfast_ops_cuda DEPENDS {source}.o)
    """)
    monkeypatch.setattr(kernels, "ROOT", tmp_path)
    monkeypatch.setattr(kernels, "FOLDER", tmp_path / "build")
    toolkit = fake_toolkit(tmp_path / "cuda")
    expected = f"{by}could not build {source}: {source}(3): error: no such kernel"
    with pytest.raises(CudaUnavailable, match=f"^{re.escape(expected)}$"):
        kernels.build_ops(tmp_path, Toolkit(toolkit, "13.2"))
    (tmp_path / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 99.0)")
    with pytest.raises(
        kernels.BuildError, match=r"^cmake could not configure the kernels: CMake 99.0 or higher is required"
    ):
        kernels.build_ops(tmp_path, None)


@pytest.mark.slow
def test_the_wheel_holds_the_native_kernels(tmp_path: Path) -> None:
    _, result = install(tmp_path, DELFAST_NATIVE="1", DELFAST_CUDA="0")
    status = json.loads(result.stdout)
    assert status["backend"] == "native" and status["built_against"] == torch.__version__ and not result.stderr
    assert status["devices"] == ["cpu"] and status["cuda"].startswith("not built: DELFAST_CUDA=0 at install")


# the CUDA side of the build


def build_ext(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def fake_toolkit(root: Path, version: int = 13020) -> Path:
    """Write the files by which a toolkit is recognized."""
    for name, text in {
        "include/cuda_runtime.h": "",
        "include/cuda_runtime_api.h": f"#define CUDART_VERSION  {version}\n",
        "bin/nvcc": "#!/bin/sh\n",
        "lib64/libcudart_static.a": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "bin/nvcc").chmod(0o755)
    return root


def test_cuda_that_is_asked_for_and_not_there_fails_in_one_line(tmp_path: Path) -> None:
    result = build_ext(tmp_path, DELFAST_CUDA="yes")
    assert result.returncode != 0 and "expected DELFAST_CUDA to be auto, 0 or 1, got 'yes'" in result.stderr
    result = build_ext(tmp_path, DELFAST_CUDA="1", CUDA_HOME=str(tmp_path / "nowhere"))
    expected = "expected a toolkit of CUDA" if torch.version.cuda else "expected a CUDA toolkit"
    assert result.returncode != 0 and f"DELFAST_CUDA=1, but {expected}" in result.stderr
    result = build_ext(tmp_path, DELFAST_CUDA="1", CXX="no-such-compiler")
    assert result.returncode != 0 and "no C++ compiler: 'no-such-compiler' is not there" in result.stderr


def test_a_wheel_holds_what_its_name_says_or_is_not_built(tmp_path: Path) -> None:
    result = build_ext(tmp_path, DELFAST_WHEEL="gpu")
    assert result.returncode != 0 and "expected DELFAST_WHEEL to be cpu, or cu and a number, got 'gpu'" in result.stderr
    result = build_ext(tmp_path, DELFAST_WHEEL="cu13", DELFAST_CUDA="0", CUDA_HOME=str(tmp_path / "nowhere"))
    assert result.returncode != 0 and "DELFAST_CUDA=1, but expected a toolkit of CUDA 13" in result.stderr
    result = build_ext(tmp_path, DELFAST_WHEEL="cpu", DELFAST_NATIVE="0", CXX="no-such-compiler")
    assert result.returncode != 0 and "no C++ compiler: 'no-such-compiler' is not there" in result.stderr


def test_torch_is_needed_for_native_kernels_alone(tmp_path: Path) -> None:
    result = build_ext(tmp_path, DELFAST_TORCH=str(tmp_path))
    expected = f"expected DELFAST_TORCH to be the folder of a torch package, got '{tmp_path}'; correct or unset it"
    assert result.returncode != 0 and result.stderr.splitlines()[-1] == expected
    code = f"""
import runpy, sys
sys.modules["torch"] = None  # is not there
sys.argv = ["setup.py", "build_ext", "--build-temp", {str(tmp_path)!r}, "--build-lib", {str(tmp_path)!r}]
runpy.run_path({str(ROOT / "setup.py")!r})
"""
    result = python(code, DELFAST_NATIVE="0")
    assert result.returncode == 0 and "NO NATIVE KERNELS" in result.stderr, result.stderr
    result = python(code)
    assert result.returncode != 0 and result.stderr.startswith("delfast's build needs torch 2.10 or newer")


def test_a_toolkit_is_found_behind_a_wrapper_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = fake_toolkit(tmp_path / "opt/cuda")
    wrapper = tmp_path / "bin/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    wrapper.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    found = find_toolkit("13")
    assert (found.root, found.version) == (toolkit.resolve(), "13.2")
    assert found.nvcc.is_file() and found.libraries == toolkit.resolve() / "lib64"


def test_a_toolkit_of_another_major_version_is_named_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path, 12090)))
    with pytest.raises(CudaUnavailable, match=r"expected a toolkit of CUDA 13, .*\(CUDA 12\.9\)"):
        find_toolkit("13")


def test_architectures_are_torchs_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert architectures() == ["8.0", "9.0", "10.0", "12.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    flags = ["arch=compute_86,code=sm_86", "arch=compute_90a,code=sm_90a", "arch=compute_90a,code=compute_90a"]
    assert generate_flags(architectures())[1::2] == flags
    for bad in ("7.5", "8.0 Hopper"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", bad)
        with pytest.raises(CudaUnavailable, match="expected TORCH_CUDA_ARCH_LIST like"):
            architectures()


@needs_native
def test_status_says_what_becomes_of_tensors_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    status = delfast.status()
    assert ("cuda" in status["devices"]) == status["cuda"].startswith("built with CUDA")
    if status["cuda"].startswith("built") and not torch.cuda.is_available():
        assert "no CUDA device is here, so the CPU kernels run" in status["cuda"]
    monkeypatch.setitem(BACKEND.build_info, "cuda", None)
    monkeypatch.setitem(BACKEND.build_info, "cuda_failure", "DELFAST_CUDA=0 at install")
    expected = "not built: DELFAST_CUDA=0 at install; on a GPU the reference implementations run"
    assert delfast.status()["cuda"] == expected


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),  # machine code: of its major version
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.0+PTX", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 0)]),  # PTX: on all later ones
        ("9.0a", [(9, 0)], [(8, 0), (10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(12, 0)]),
        ("10.0f+PTX", [(10, 0), (10, 3)], [(12, 0)]),
    ],
)
def test_which_cards_an_architecture_runs_on(
    architecture: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(_runs_on(architecture, capability) for capability in runs)
    assert not any(_runs_on(architecture, capability) for capability in does_not)


@needs_native
@pytest.mark.skipif(not BACKEND.build_info.get("cuda"), reason="the extension was built without CUDA")
def test_an_extension_with_cuda_kernels_needs_no_driver() -> None:
    assert "libcud" not in subprocess.check_output(["readelf", "-d", str(LIBRARY)], text=True)
    kernels = [torch._C._dispatch_has_kernel_for_dispatch_key(f"delfast::{op.name}", "CUDA") for op in OPS]
    assert all(kernels)


@pytest.mark.slow
@pytest.mark.skipif(not BACKEND.build_info.get("cuda"), reason="the extension was built without CUDA")
def test_a_tree_can_be_built_again_with_cuda_and_without(tmp_path: Path) -> None:
    """Nothing of the build before may remain: setuptools compares the times of sources alone."""
    listed = subprocess.check_output(
        ["git", "ls-files", "csrc", "delfast", "build_support", "*.*"], cwd=ROOT, text=True
    )
    for name in {line for line in listed.splitlines() if not line.startswith(("tests/", "docs/", "experiments/"))}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    for cuda, devices in (("0", ["cpu"]), ("1", ["cpu", "cuda"]), ("0", ["cpu"])):
        chosen = {"DELFAST_NATIVE": "1", "DELFAST_CUDA": cuda, "TORCH_CUDA_ARCH_LIST": "9.0"}
        subprocess.run(command, cwd=tmp_path, env={**os.environ, **chosen}, check=True, capture_output=True)
        status = python(STATUS, tmp_path)
        assert json.loads(status.stdout)["devices"] == devices, status.stderr
