"""The test suite: no test module imports another, so that splitting one touches no other; heavy files exist."""

import ast

import pytest

from tests import ROOT
from tests.conftest import HEAVY


def imported_tests(source: str) -> list[str]:
    """Return the imported names with a part that names a test module, relative imports included."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return [name for name in names if any(part.startswith("test_") for part in name.split("."))]


def test_no_module_imports_a_test_module() -> None:
    paths = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): imported_tests(path.read_text()) for path in paths}
    assert len(found) > 50 and {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from tests.ops.test_ops import HYPER", ["tests.ops.test_ops.HYPER"]),
        ("def f():\n    import tests.test_batches as b", ["tests.test_batches"]),
        ("from tests.ops import test_ops, calls", ["tests.ops.test_ops"]),
        ("from . import test_ops", [".test_ops"]),
        ("from .test_ops import HYPER", ["test_ops.HYPER"]),
        ("from tests.ops.calls import HYPER\nfrom torch.testing import assert_close", []),
    ],
)
def test_imported_tests_are_found(source: str, found: list[str]) -> None:
    assert imported_tests(source) == found


def test_heavy_files_exist() -> None:
    assert [name for name in HEAVY if not (ROOT / "tests" / name).is_file()] == []
