"""The workflow of the public CI: it runs make targets that exist, with Pythons that the package supports."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from build_support.wheels import PYTHONS
from tests import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

yaml = pytest.importorskip("yaml", reason="PyYAML is missing: pip install -r requirements-dev.txt")

WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
JOBS: dict[str, Any] = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMED = "Programming Language :: Python :: "


def versions() -> set[str]:
    """Return every version of Python that a job names."""
    found = {each for job in JOBS.values() for each in job.get("strategy", {}).get("matrix", {}).get("python", [])}
    for step in STEPS:
        found |= set(str(step.get("with", {}).get("python-version", "")).split())
    return {version for version in found if re.match(r"\d", version)}


def test_every_command_is_a_make_target_that_exists() -> None:
    commands = [step["run"] for step in STEPS if "run" in step]
    assert all(re.fullmatch(r"make [a-z-]+", command) for command in commands), commands
    targets = {command.removeprefix("make ") for command in commands}
    assert targets == {"test", "docs", "wheels", "release-check"} == set(JOBS)
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_every_python_is_one_that_the_package_supports() -> None:
    classifiers = [each.removeprefix(NAMED) for each in PROJECT["classifiers"] if each.startswith(NAMED)]
    assert classifiers == list(PYTHONS)
    assert {"3.10", PYTHONS[-1]} <= versions() <= set(PYTHONS)
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(version in supported for version in versions())


def test_it_may_only_read_and_names_each_action_by_its_major_version() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in JOBS.values())
    actions = [step["uses"] for step in STEPS if "uses" in step]
    assert len(actions) >= 8 and all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions), actions
