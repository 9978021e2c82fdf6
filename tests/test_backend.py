"""Which backend runs, that it says why, and that nothing is silent; installing with and without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import delfast
from delfast.ops import BACKEND

ROOT = Path(__file__).parent.parent
needs_native = pytest.mark.skipif(BACKEND.module is None, reason=f"no native kernels: {BACKEND.reason}")


def python(code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process; ``path`` shadows the installed package."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("DELFAST_")} | environment
    if path:
        env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")


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


def test_the_twins_can_be_chosen_and_run_everything() -> None:
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
    native, twins = python(code, DELFAST_BACKEND="native"), python(code, DELFAST_BACKEND="torch")
    assert native.stdout == twins.stdout != "", native.stderr + twins.stderr


@needs_native
@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (None, "the extension was not built"),
        ({"failure": "no C++ compiler"}, r"the extension was not built: no C\+\+ compiler"),
        (
            {"torch": "1.13.0", "cuda": False},
            f"built against torch 1.13.0, this is torch {re.escape(torch.__version__)}",
        ),
    ],
)
def test_an_unusable_extension_warns_once_or_fails_loudly(tmp_path: Path, info: object, reason: str) -> None:
    package = copied_package(tmp_path, info)  # type: ignore[arg-type]
    result = python(STATUS, package)
    assert result.returncode == 0 and json.loads(result.stdout)["backend"] == "torch"
    warned = [line for line in result.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warned) == 1 and re.search(reason, warned[0]) and "rebuild with" in warned[0]
    forced = python(STATUS, package, DELFAST_BACKEND="native")
    assert forced.returncode != 0 and re.search(f"native kernels are asked for, but .*{reason}", forced.stderr)


@needs_native
def test_an_extension_that_does_not_load_says_why(tmp_path: Path) -> None:
    package = copied_package(tmp_path, {"torch": torch.__version__, "cuda": False})
    next((package / "delfast").glob("_C*.so")).write_bytes(b"\x7fELF, but no more")
    result = python(STATUS, package)
    assert json.loads(result.stdout)["backend"] == "torch"
    assert "the extension does not load" in result.stderr


@needs_native
def test_isa_can_be_forced_and_nonsense_is_refused() -> None:
    assert BACKEND.module is not None
    for isa in BACKEND.module.isas():
        assert json.loads(python(STATUS, DELFAST_FORCE_ISA=isa).stdout)["isa"] == isa
    result = python(STATUS, DELFAST_FORCE_ISA="sse9")
    assert result.returncode != 0 and "expected DELFAST_FORCE_ISA to be scalar, avx2 or avx512" in result.stderr
    result = python(STATUS, DELFAST_BACKEND="gpu")
    assert result.returncode != 0 and "expected DELFAST_BACKEND to be 'native' or 'torch', got 'gpu'" in result.stderr
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
delfast.localize(torch.nn.Linear(8, 4), [(torch.randn(3, 8), torch.tensor([0, 1, 2]))], budget=0.6)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_kernels_know_no_torch() -> None:
    for path in [*(ROOT / "csrc/cpu").iterdir(), *(ROOT / "csrc/delfast").iterdir(), *(ROOT / "csrc/tests").iterdir()]:
        assert not re.search(r"#include *[<\"](torch|ATen|c10)/", path.read_text(encoding="utf-8")), path
    including = [p.name for p in (ROOT / "csrc").rglob("*.*") if "<torch/extension.h>" in p.read_text(encoding="utf-8")]
    assert including == ["module.cpp"]  # it takes most of a minute to compile


def install(tmp_path: Path, **environment: str) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Build the wheel from a copy of the sources, install it alone into a directory, and ask it for its status."""
    source, target = tmp_path / "source", tmp_path / "site"
    names = ["delfast", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    for name in names:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
            shutil.copytree(ROOT / name, source / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target"]
    result = subprocess.run(
        [*pip, str(target), str(source)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr, python(STATUS, target)


def test_without_a_compiler_it_installs_and_says_so(tmp_path: Path) -> None:
    _, result = install(tmp_path, CXX="no-such-compiler")
    assert json.loads(result.stdout)["backend"] == "torch"
    assert "no C++ compiler: 'no-such-compiler' is not there" in result.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_native_kernels(tmp_path: Path) -> None:
    _, result = install(tmp_path, DELFAST_NATIVE="1")
    status = json.loads(result.stdout)
    assert status["backend"] == "native" and status["built_against"] == torch.__version__ and not result.stderr


def test_cuda_kernels_are_refused_as_long_as_there_are_none(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DELFAST_CUDA": "1"},
    )
    assert result.returncode != 0 and "this version has no CUDA kernels" in result.stderr
