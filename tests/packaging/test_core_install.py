"""The core install: torch, numpy, safetensors, and none of the extras."""

from __future__ import annotations

import subprocess
import sys

import pytest

from delfast.extras import extra
from tests import ROOT


def test_every_public_name_works_or_names_its_extra() -> None:
    root = ROOT
    command = [sys.executable, "-m", "tests.packaging.core_install"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "public names" in done.stdout
    assert "'typer' is not installed; the command line needs: pip install 'delfast[experiments]'" in done.stderr


def test_only_missing_packages_are_explained() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"delfast\.nothing"), extra("a test"):
        import delfast.nothing  # noqa: F401
    with (
        pytest.raises(ImportError, match=r"^a test needs 'absent', which is not installed; pip .*\]', or wait$"),
        extra("a test", ", or wait"),
    ):
        import absent.inside  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name"), extra("a test"):
        from math import nothing  # noqa: F401
