"""The wheel: built, and run in an environment that has torch and no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from build_support import wheels
from tests import ROOT

TORCH = Path(torch.__file__).parent

CODE = """
import json, torch, delfast
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.ReLU(), torch.nn.Linear(40, 5))
scores = delfast.score(model, [(torch.randn(20, 50), torch.arange(20) % 5)])
print(json.dumps([delfast.__file__, delfast.status(), scores.select(0.3, "channel").digest]))
"""


def environment(folder: Path, wheel: Path, *, with_torch: bool) -> str:
    """Make an environment with this wheel alone, and return its Python; torch is this process's, or missing."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, env=bare())
    if with_torch:  # the folder alone: its .pth files, which may name this checkout, are not read
        (site,) = (folder / "lib").glob("python*/site-packages")
        (site / "torch_of_the_tests.pth").write_text(str(TORCH.parent) + "\n", encoding="utf-8")
    return python


def bare() -> dict[str, str]:
    """Return this process's environment without delfast's variables, and with no program on PATH."""
    unwanted = ("DELFAST_", "PYTHONPATH")
    return {k: v for k, v in os.environ.items() if not k.startswith(unwanted)} | {"PATH": "/nonexistent"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="manylinux wheels are Linux's")
def test_a_wheel_runs_where_there_is_no_compiler(tmp_path: Path) -> None:
    wheel = wheels.build(sys.executable, "cpu", TORCH, tmp_path / "dist")
    assert "manylinux" in wheel.name and "+cpu" in wheel.name
    assert wheel.stat().st_size <= wheels.LIMITS["cpu"]
    python = environment(tmp_path / "with", wheel, with_torch=True)
    result = subprocess.run([python, "-c", CODE], capture_output=True, text=True, env=bare(), cwd="/")
    assert result.returncode == 0 and not result.stderr, result.stderr
    place, status, digest = json.loads(result.stdout)
    assert place.startswith(str(tmp_path)) and status["backend"] == "native" and status["isas"]
    here = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, check=True)
    assert digest == json.loads(here.stdout)[2]
    python = environment(tmp_path / "without", wheel, with_torch=False)
    command = [python, "-c", "import delfast; delfast.status()"]
    result = subprocess.run(command, capture_output=True, text=True, env=bare())
    expected = "ImportError: delfast needs torch 2.10 or newer, and finds none; pip install torch"
    assert result.stderr.splitlines()[-1] == expected
