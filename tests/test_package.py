"""The names of the package ``delfast``, which are imported when they are first used."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys

import pytest

import delfast
from tests import ROOT

# the packages of the API reference
PACKAGES = re.findall(r"^   delfast\.(\w+)$", (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8"), re.M)


def names_for_type_checkers() -> set[str]:
    """The names that ``delfast/__init__.py`` imports, at once or for type checkers."""
    tree = ast.parse((ROOT / "delfast" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    return {alias.name for node in imports for alias in node.names}


def test_every_public_name_can_be_used_and_is_known_to_type_checkers() -> None:
    assert names_for_type_checkers() == {*delfast.__all__, *PACKAGES}
    for name in delfast.__all__:
        assert getattr(delfast, name) is getattr(delfast, name)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_of_the_api_reference_is_an_attribute(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"delfast.{package}")
    monkeypatch.delattr(delfast, package)  # as before the first import of the package
    assert getattr(delfast, package) is module


def test_dir_lists_the_public_names_alone() -> None:
    importlib.import_module("delfast.mask")  # an attribute of delfast from now on, and not public
    assert {"jobs", "ledger"} <= set(PACKAGES)
    shown = {name for name in dir(delfast) if not name.startswith("__")}
    assert shown | {"__version__"} == {*delfast.__all__, *PACKAGES}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'delfast' has no attribute 'forget'"):
        delfast.forget  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'forget'"):
        from delfast import forget  # noqa: F401


IN_A_NEW_PROCESS = """
import sys
import delfast
assert not {"torch", "numpy"} & set(sys.modules)
assert delfast.ledger.Ledger and delfast.jobs.read_job
import delfast.ops
import torch
torch.ops.delfast.criticality
assert issubclass(delfast.unlearning.Diverged, RuntimeError)
from delfast import *
assert callable(localize) and optim.MaskedSGD
"""


def test_names_are_imported_when_they_are_first_used() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["compact", "evaluate", "localize", "status", "unlearn"])
def test_no_module_has_the_name_of_a_public_function(name: str) -> None:
    """A package of that name would hide the function, or the function the package."""
    assert importlib.util.find_spec(f"delfast.{name}") is None and callable(getattr(delfast, name))
