"""The public docstrings: numpydoc's checks accept them. test_doctests.py runs their examples."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import delfast
from delfast.ledger import Ledger
from tests import ROOT

validate = pytest.importorskip("numpydoc.validate", reason="numpydoc is missing: pip install -r requirements-dev.txt")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = ("", ".localization", ".compaction", ".unlearning", ".evaluation", ".jobs", ".ledger")
OPTIMIZERS = ("delfast.optim.MaskedSGD", "delfast.optim.MaskedAdamW")
WITH_METHODS = {"delfast.Mask": delfast.Mask, "delfast.ledger.Ledger": Ledger}
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["numpydoc_validation"]


def public_objects() -> Iterator[tuple[str, Any]]:
    """Yield path and object of every public function and class, and of the members of ``WITH_METHODS``."""
    seen: set[int] = set()
    for package in PACKAGES:
        module = importlib.import_module(f"delfast{package}")
        for name in module.__all__:
            value = getattr(module, name)
            own = getattr(value, "__module__", "").startswith("delfast")  # not an alias such as Literal["a", "b"]
            if own and callable(value) and id(value) not in seen:
                seen.add(id(value))
                yield f"{module.__name__}.{name}", value
    for path in OPTIMIZERS:
        yield path, getattr(delfast.optim, path.rpartition(".")[2])
    for path, owner in WITH_METHODS.items():
        for name in dir(owner):  # inherited ones too
            if not name.startswith("_"):
                yield f"{path}.{name}", inspect.getattr_static(owner, name)


OBJECTS = dict(sorted(public_objects()))
# literals, lines of code, the names of *arguments and **keywords, and strong text
MARKED = r"``.*?``|^ *(>>>|\.\.\.) .*$|^ *\*{1,2}\w+( : .*)?$|\*\*[\w :.]+\*\*|\\\*|\d\*\*\d|\(\*, "


def problems(path: str, value: Any) -> list[str]:
    """Return what numpydoc finds in the docstring of ``value``, without the checks that pyproject.toml leaves out.

    Functions and classes of a package need an example; methods, properties and exceptions do not.
    """
    is_method = path.rpartition(".")[0] in WITH_METHODS
    is_exception = inspect.isclass(value) and issubclass(value, BaseException)
    left_out = set(CONFIGURATION["checks"]) - (set() if is_method or is_exception else {"EX01"})
    return [f"{code}: {text}" for code, text in validate.validate(path)["errors"] if code not in left_out]


@pytest.mark.parametrize("path", OBJECTS)
def test_numpydoc_accepts(path: str) -> None:
    assert problems(path, OBJECTS[path]) == []


def test_the_public_objects_are_found() -> None:
    wanted = {"delfast.localize", "delfast.unlearn", "delfast.Mask", "delfast.Mask.save", "delfast.compaction.Compact"}
    assert wanted <= set(OBJECTS) and len(OBJECTS) > 50 and "all" in CONFIGURATION["checks"]


def test_a_bad_docstring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(x: int) -> int:
        """Returns half"""
        return x // 2

    monkeypatch.setattr(delfast, "half", half, raising=False)
    assert {"SS03", "SS05", "PR01", "RT01", "EX01"} <= {problem[:4] for problem in problems("delfast.half", half)}


@pytest.mark.parametrize("path", OBJECTS)
def test_no_star_is_taken_for_emphasis(path: str) -> None:
    """The site would print a glob pattern without its stars."""
    left = re.sub(MARKED, "", inspect.getdoc(OBJECTS[path]) or "", flags=re.MULTILINE)
    assert "*" not in left, [line for line in left.splitlines() if "*" in line]


def test_a_pattern_outside_of_a_literal_is_found() -> None:
    assert "*" in re.sub(MARKED, "", 'such as "*.mlp.*"; see', flags=re.MULTILINE)
    assert "*" not in re.sub(MARKED, "", 'such as ``"*.mlp.*"``\n*layers : str\n**options', flags=re.MULTILINE)
