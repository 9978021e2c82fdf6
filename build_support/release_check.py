"""Checks a tree before it is released: ``python -m build_support.release_check``, or ``make release-check``.

Prints one line for each check: "ok" and what was found, or what is wrong and what to do. Exit code 1 if one fails. The
wheels in dist/ and the site in build/docs must have been made before: ``make wheels docs``.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import re
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from packaging.metadata import ExceptionGroup, Metadata
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version

from build_support.licences import NotPermissive, describe_licences

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1].resolve()
HEADING = re.compile(r"^## (\S+)(?: - (.+))?$", re.MULTILINE)
NEEDED = (  # of a wheel, beside what _packed yields
    "delfast/_C.*.so",
    "delfast/libdelfast_ops.so",
    "delfast/_build_info.json",
    "delfast-*.dist-info/METADATA",
    "delfast-*.dist-info/licenses/LICENSE",
)
# Required keys: https://github.com/citation-file-format/citation-file-format/blob/1.2.0/schema.json
CITED = ("authors", "cff-version", "message", "title")
REFERENCED = ("authors", "title", "type")


class Failure(Exception):
    """An error in one line: the fault, and the remedy."""


def _read(root: Path, name: str) -> str:
    try:
        return (root / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read {name} ({type(error).__name__}); restore it") from None


def _configuration(root: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_read(root, "pyproject.toml"))
    except tomllib.TOMLDecodeError as error:
        raise Failure(f"pyproject.toml is no TOML ({error}); correct it") from None


def _version(root: Path) -> str:
    return str(runpy.run_path(str(root / "delfast/_version.py"))["__version__"])


def _newest_section(root: Path) -> tuple[str, str | None, str]:
    """Return version, date and content of the first section of the changelog."""
    text = _read(root, "CHANGELOG.md")
    found = HEADING.search(text)
    if found is None:
        raise Failure("CHANGELOG.md has no heading '## VERSION - DATE'; write the section of this release")
    return found[1], found[2], HEADING.split(text[found.end() :])[0]


def _citation(root: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(_read(root, "CITATION.cff"))
    except yaml.YAMLError as error:
        raise Failure(f"CITATION.cff is no YAML ({str(error).splitlines()[0]}); correct it") from None
    if not isinstance(read, dict):
        raise Failure("CITATION.cff is no mapping; write the keys of CFF 1.2.0")
    return read


def check_version(root: Path) -> str:
    """Compare the version of the package with every other place that names one, and with the tag of HEAD."""
    version = _version(root)
    project = _configuration(root)["project"]
    stated = {
        "pyproject.toml": project.get("version", version),  # dynamic: setup.py reads delfast/_version.py
        "CITATION.cff": _citation(root).get("version"),
        "the newest section of CHANGELOG.md": _newest_section(root)[0],
    }
    for place, other in stated.items():
        if other != version:
            raise Failure(f"delfast/_version.py has {version}, {place} has {other}; make them equal")
    listed = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        raise Failure(f"git cannot list the tags of HEAD ({listed.stderr.strip()}); run this in a clone")
    tags = [tag for tag in listed.stdout.split() if re.match(r"v\d", tag)]
    if tags and tags != [f"v{version}"]:
        raise Failure(f"HEAD has the tag {', '.join(tags)}, the version is {version}; move the tag, or the version")
    return f"{version}, {'tagged' if tags else 'HEAD has no tag yet'}"


def check_changelog(root: Path) -> str:
    """Require that the newest section is dated, as in CITATION.cff, and lists something."""
    version, date, content = _newest_section(root)
    if version == "Unreleased" or date is None:
        raise Failure(f"the newest section of CHANGELOG.md is '{version}' without a date; write '## VERSION - DATE'")
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise Failure(f"CHANGELOG.md dates {version} '{date}'; write YYYY-MM-DD") from None
    released = str(_citation(root).get("date-released"))
    if released != date:
        raise Failure(
            f"CHANGELOG.md dates {version} {date}, CITATION.cff has date-released {released}; make them equal"
        )
    entries = len(re.findall(r"^- ", content, re.MULTILINE))
    if not entries:
        raise Failure(f"the section {version} of CHANGELOG.md lists nothing; name what a user gets")
    return f"{version} of {date}, {entries} entries"


def check_citation(root: Path) -> str:
    """Require the keys of CFF 1.2.0, and the licence of pyproject.toml. Values of other keys are not checked."""
    cited = _citation(root)
    if str(cited.get("cff-version")) != "1.2.0":
        raise Failure(f"CITATION.cff has cff-version {cited.get('cff-version')}; write 1.2.0")
    references = cited.get("references", [])
    for record, keys in [(cited, CITED), *((each, REFERENCED) for each in references)]:
        place = "CITATION.cff" if record is cited else "a reference of CITATION.cff"
        if not isinstance(record, dict):
            raise Failure(f"{place} is no mapping; write the keys {', '.join(keys)}")
        if missing := [key for key in keys if not record.get(key)]:
            raise Failure(f"{place} has no {missing[0]}; add it")
        for author in record["authors"]:
            if not isinstance(author, dict) or not {"name", "family-names"} & author.keys():
                raise Failure(f"{place} has an author without name or family-names; add one of them")
    licence = _configuration(root)["project"].get("license")
    if cited.get("license") != licence:
        raise Failure(f"CITATION.cff has the license {cited.get('license')}, pyproject.toml {licence}; make them equal")
    return f"CFF 1.2.0, {len(references)} reference{'s' * (len(references) != 1)}"


def check_wheels(root: Path) -> str:
    """Require that every wheel in dist/ is of this version and whole, with this tree's Python and templates.

    Whether its compiled kernels are those of this tree's sources cannot be seen in it.
    """
    wheels = sorted((root / "dist").glob("*.whl"))
    if not wheels:
        raise Failure("dist/ has no wheel; run make wheels")
    packed = {path.relative_to(root).as_posix(): path for path in _packed(root)}
    found = []
    for wheel in wheels:
        try:
            found.append(_check_wheel(wheel, _version(root), packed))
        except (InvalidWheelFilename, zipfile.BadZipFile) as error:
            raise Failure(f"{wheel.name} is no wheel ({error}); delete it, and run make wheels") from None
        except Failure as failure:
            raise Failure(f"{wheel.name} {failure}; delete it, and run make wheels") from None
    return ", ".join(found)


def _packed(root: Path) -> Iterator[Path]:
    """Yield the tree's files that every wheel holds: the modules, and the package data of pyproject.toml."""
    for pattern in ("*.py", "py.typed", "templates/*"):
        yield from (root / "delfast").rglob(pattern)


def _check_wheel(wheel: Path, version: str, packed: dict[str, Path]) -> str:
    """Return a wheel's Python and kind. Failure with the rest of a sentence that begins with its name."""
    _, named, _, tags = parse_wheel_filename(wheel.name)
    if named.public != version:
        raise Failure(f"is not of version {version}")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for pattern in NEEDED:
            if not fnmatch.filter(names, pattern):
                raise Failure(f"lacks {pattern}")
        if missing := sorted(packed.keys() - names):
            raise Failure(f"lacks {missing[0]}")
        if removed := sorted(fnmatch.filter(names - packed.keys(), "delfast/*.py")):
            raise Failure(f"holds {removed[0]}, which the tree does not have")
        if changed := sorted(name for name, path in packed.items() if archive.read(name) != path.read_bytes()):
            raise Failure(f"holds another {changed[0]} than the tree")
        metadata = _metadata(archive.read(fnmatch.filter(names, "delfast-*.dist-info/METADATA")[0]))
    if metadata.version != named:
        raise Failure(f"has metadata of version {metadata.version}")
    kind = f"+{named.local}" if named.local else ""
    return f"{'/'.join(sorted({tag.interpreter for tag in tags}))}{kind}"


def _metadata(content: bytes) -> Metadata:
    """Parse core metadata; Failure for what a package index would refuse."""
    try:
        return Metadata.from_email(content)
    except ExceptionGroup as group:
        raise Failure(f"has invalid metadata ({group.exceptions[0]})") from None


def check_docs(root: Path) -> str:
    """Require that the site was built from this version. ``make docs`` fails on a warning, before this check runs."""
    page = root / "build/docs/changelog.html"
    if not page.is_file():
        raise Failure("build/docs has no changelog.html; run make docs")
    text, version = page.read_text(encoding="utf-8"), _version(root)
    if f"delfast {version}" not in text or f"<h2>{version} - " not in text:
        raise Failure(f"the site in build/docs is not of version {version}; run make docs")
    return f"build/docs, {version}"


def check_figures(root: Path) -> str:
    """Require that the tables of README.md and docs/ are those of the kept results; name results of an older version.

    Older results are not refused: the figures of a GPU cannot be measured again without one.
    """
    command = [sys.executable, "-m", "benchmarks.tables", "--check"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise Failure(f"{lines[-1].removeprefix('tables: ')}")
    version = Version(_version(root))
    older = [
        f"{path.relative_to(root).as_posix()} ({', '.join(map(str, made))})"
        for path in sorted([*root.glob("benchmarks/results/*.json"), *root.glob("experiments/results/*/*.jsonl")])
        if (made := sorted(each for each in _versions_in(path, root) if each < version))
    ]
    return "the tables are those of the kept results" + (f"; of an older delfast: {', '.join(older)}" if older else "")


def _versions_in(path: Path, root: Path) -> set[Version]:
    """Return the versions of delfast that kept results name; none for the benchmarks that name a commit instead."""
    text = _read(root, path.relative_to(root).as_posix())
    found: set[Version] = set()

    def add(read: dict[str, Any]) -> dict[str, Any]:
        if isinstance(version := read.get("delfast"), str):
            found.add(Version(version))
        return read

    try:
        for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(line, object_hook=add)
    except ValueError as error:
        raise Failure(f"{path.relative_to(root).as_posix()} has bad content ({error}); restore it") from None
    return found


def check_licences(root: Path) -> str:
    """Require a permissive licence of each package that pyproject.toml names, or a decided exception."""
    configuration = _configuration(root)
    try:
        return describe_licences(configuration["project"], configuration["build-system"]["requires"])
    except NotPermissive as error:
        raise Failure(str(error)) from None


CHECKS: dict[str, Callable[[Path], str]] = {
    "version": check_version,
    "changelog": check_changelog,
    "citation": check_citation,
    "wheels": check_wheels,
    "docs": check_docs,
    "figures": check_figures,
    "licences": check_licences,
}


def main(arguments: list[str] | None = None) -> int:
    """Run all checks, print a line for each, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m build_support.release_check", description="Check a tree before it is released."
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree (default: this one)")
    root = parser.parse_args(arguments).root
    failed = False
    for name, check in CHECKS.items():
        try:
            print(f"{name}: ok: {check(root)}", flush=True)
        except Failure as failure:
            failed = True
            print(f"{name}: {failure}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
