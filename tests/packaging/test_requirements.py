"""Everything that pyproject.toml declares is pinned in requirements-dev.txt, and `make help` prints the targets."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from delfast.cli.doctor import EXPERIMENTS
from tests import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = [
    Requirement(line.partition("#")[0])
    for line in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    if line.partition("#")[0].strip()
]
VERSIONS = [
    name.rpartition(" ")[2]
    for name in PROJECT["project"]["classifiers"]
    if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", name)
]


def declared() -> Iterator[Requirement]:
    """Yield what the build, the library and its extras need."""
    project = PROJECT["project"]
    lists = [PROJECT["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    for requirements in lists:
        yield from map(Requirement, requirements)


def environment(version: str) -> dict[str, str]:
    return {"python_version": version, "sys_platform": "linux", "platform_machine": "x86_64"}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_declared_is_pinned_once_to_a_version_that_is_allowed(version: str) -> None:
    pins: dict[str, str] = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(environment(version)):
            name = canonicalize_name(pin.name)
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and name not in pins, pin
            pins[name] = specifier.version
    for each in declared():
        if each.marker is None or each.marker.evaluate(environment(version)):
            pinned = pins.get(canonicalize_name(each.name))
            assert pinned is not None, f"{each.name} is not pinned for Python {version}"
            assert each.specifier.contains(pinned), f"{each} is pinned to {pinned}"


def test_every_pin_is_declared() -> None:
    assert {canonicalize_name(pin.name) for pin in PINS} <= {canonicalize_name(each.name) for each in declared()}


def test_the_keywords_are_those_of_the_citation() -> None:
    yaml = pytest.importorskip("yaml", reason="pyyaml is missing: pip install -r requirements-dev.txt")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["project"]["keywords"] == citation["keywords"]
    assert PROJECT["project"]["authors"] == [{"name": author["name"]} for author in citation["authors"]]
    for record in (
        citation,
        *citation["references"],
    ):  # CFF 1.2.0 has no "et al.": an export would list it as an author
        assert not [author for author in record["authors"] if "et al" in str(author)]


def test_make_help_prints_the_targets() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    named = re.findall(r"^make ([\w-]+) ", done.stdout, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert targets is not None and {"help", "demo", "check", "test", "docs"} <= set(named) <= set(targets[1].split())
    assert done.stdout == "".join(
        line.removeprefix("# ") for line in makefile.splitlines(keepends=True)[: len(done.stdout.splitlines())]
    )


def test_doctor_looks_for_what_the_extra_of_the_experiments_requires() -> None:
    needed = map(Requirement, PROJECT["project"]["optional-dependencies"]["experiments"])
    names = {each.name for each in needed if each.marker is None or each.marker.evaluate()}
    assert set(EXPERIMENTS) == names
