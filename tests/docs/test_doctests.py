"""The examples in the package's docstrings run as they stand, and leave no file behind."""

import doctest
import importlib
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "delfast"
PATHS = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]


def run_examples(module: object, name: str) -> tuple[int, list[str]]:
    """Return the number of examples in a module's docstrings, and doctest's report of each one that failed."""
    failures: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test, out=failures.append)
    return runner.tries, failures


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_in_docstrings(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    count, failures = run_examples(importlib.import_module(name), name)
    assert count and not failures, "".join(failures)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_example_fails() -> None:
    class Wrong:
        """Compute.

        >>> 1 + 1
        3
        """

    Wrong.__module__ = __name__
    count, failures = run_examples(Wrong, "Wrong")
    assert count == 1 and "Expected:\n    3\nGot:\n    2" in "".join(failures)
