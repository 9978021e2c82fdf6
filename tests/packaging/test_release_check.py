"""`make release-check`: each check holds for a tree that is ready, and fails for one that lacks a thing, by name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="PyYAML is missing: pip install -r requirements-dev.txt")

from build_support import licences, release_check
from build_support.release_check import CHECKS, Failure
from tests import ROOT

VERSION = "7.8.9"
FILES = {
    "delfast/_version.py": f'__version__ = "{VERSION}"\n',
    "delfast/__init__.py": "",
    "delfast/py.typed": "",
    "delfast/pages/templates/page.html": "<p>{{ x }}</p>\n",
    "pyproject.toml": """[build-system]
requires = []

[project]
name = "delfast"
license = "MIT"
dynamic = ["version"]
dependencies = ["plain>=1"]

[project.optional-dependencies]
dev = ["old>=1; python_version < '3'", "both"]
""",
    "CHANGELOG.md": f"# Changelog\n\n## {VERSION} - 2026-11-28\n\n- A thing.\n\n## 7.0.0 - 2026-01-01\n\n- Older.\n",
    "CITATION.cff": f"""cff-version: 1.2.0
message: please cite
title: delfast
version: {VERSION}
date-released: 2026-11-28
license: MIT
authors: [{{name: people}}]
references:
  - {{type: article, title: a paper, authors: [{{family-names: Person}}]}}
""",
    "build/docs/changelog.html": f"<title>Changelog - delfast {VERSION}</title><h2>{VERSION} - 2026-11-28</h2>",
    "benchmarks/__init__.py": "",
    "benchmarks/tables.py": "",
}
WHEEL = f"delfast-{VERSION}+cpu-cp311-cp311-manylinux_2_34_x86_64.whl"
INFO = f"delfast-{VERSION}+cpu.dist-info"
CONTENT = {
    **{name: text for name, text in FILES.items() if name.startswith("delfast/")},
    "delfast/_C.cpython-311-x86_64-linux-gnu.so": "",
    "delfast/libdelfast_ops.so": "",
    "delfast/_build_info.json": "{}",
    f"{INFO}/METADATA": f"Metadata-Version: 2.4\nName: delfast\nVersion: {VERSION}+cpu\nLicense-Expression: MIT\n",
    f"{INFO}/licenses/LICENSE": "MIT License",
}
PACKAGES = {
    "plain": "License-Expression: MIT AND BSD-3-Clause",
    "both": "Classifier: License :: OSI Approved :: MIT License",
}


def pack(tree: Path, name: str = WHEEL, **changes: str | None) -> None:
    """Write a wheel to dist/; ``changes``: other contents by path, None for a file to leave out."""
    (tree / "dist").mkdir(exist_ok=True)
    with zipfile.ZipFile(tree / "dist" / name, "w") as archive:
        for path, text in {**CONTENT, **changes}.items():
            if text is not None:
                archive.writestr(path, text)


def install(tree: Path, name: str, fields: str) -> None:
    """Make a package that importlib.metadata finds."""
    folder = tree / f"site/{name}-1.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{fields}\n", encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tree for which all checks hold."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    pack(tmp_path)
    for name, fields in PACKAGES.items():
        install(tmp_path, name, fields)
    monkeypatch.syspath_prepend(tmp_path / "site")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "a commit")
    return tmp_path


def git(tree: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    subprocess.run(["git", *identity, *arguments], cwd=tree, check=True, capture_output=True)


def replace(name: str, old: str, new: str) -> Callable[[Path], object]:
    """Return a change of a file of the tree."""

    def change(tree: Path) -> None:
        text = (tree / name).read_text(encoding="utf-8")
        assert old in text
        (tree / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def keep(tree: Path, name: str, text: str) -> None:
    """Write a kept result into the tree."""
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text(text, encoding="utf-8")


def remove(name: str) -> Callable[[Path], object]:
    return lambda tree: (tree / name).unlink()


def repack(**changes: str | None) -> Callable[[Path], object]:
    return lambda tree: pack(tree, **changes)


METADATA = CONTENT[f"{INFO}/METADATA"]
SECTION = f"## {VERSION} - 2026-11-28"
# check, what is changed in the tree, words of the message
WRONG: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "version",
        replace("delfast/_version.py", VERSION, "7.8.10"),
        "has 7.8.10, CITATION.cff has 7.8.9; make them equal",
    ),
    ("version", replace("CHANGELOG.md", SECTION, "## Unreleased"), "the newest section of CHANGELOG.md has Unreleased"),
    ("version", replace("pyproject.toml", 'dynamic = ["version"]', 'version = "1.0"'), "pyproject.toml has 1.0"),
    ("version", lambda tree: git(tree, "tag", "v7.8.8"), "HEAD has the tag v7.8.8, the version is 7.8.9"),
    ("version", lambda tree: shutil.rmtree(tree / ".git"), "git cannot list the tags of HEAD"),
    ("changelog", replace("CHANGELOG.md", SECTION, "## Unreleased"), "'Unreleased' without a date"),
    ("changelog", replace("CHANGELOG.md", SECTION, f"## {VERSION}"), "'7.8.9' without a date"),
    ("changelog", replace("CHANGELOG.md", "2026-11-28", "28 November"), "'28 November'; write YYYY-MM-DD"),
    (
        "changelog",
        replace("CHANGELOG.md", "2026-11-28", "2026-11-27"),
        "CITATION.cff has date-released 2026-11-28; make them equal",
    ),
    ("changelog", replace("CHANGELOG.md", "- A thing.", ""), "lists nothing"),
    ("changelog", lambda tree: (tree / "CHANGELOG.md").write_text("# Changelog\n"), "no heading '## VERSION - DATE'"),
    ("changelog", remove("CHANGELOG.md"), "cannot read CHANGELOG.md"),
    ("citation", replace("CITATION.cff", "1.2.0", "1.1.0"), "write 1.2.0"),
    ("citation", replace("CITATION.cff", "message: please cite", ""), "CITATION.cff has no message"),
    ("citation", replace("CITATION.cff", "title: a paper, ", ""), "a reference of CITATION.cff has no title"),
    ("citation", replace("CITATION.cff", "{name: people}", "people"), "an author without name or family-names"),
    ("citation", replace("CITATION.cff", "family-names", "family"), "an author without name or family-names"),
    ("citation", replace("CITATION.cff", "MIT", "BSD-3-Clause"), "BSD-3-Clause, pyproject.toml MIT"),
    ("citation", replace("CITATION.cff", "authors: [", "authors: ["[:-1]), "CITATION.cff is no YAML"),
    ("citation", lambda tree: (tree / "CITATION.cff").write_text("- a"), "CITATION.cff is no mapping"),
    ("wheels", remove(f"dist/{WHEEL}"), "dist/ has no wheel; run make wheels"),
    ("wheels", lambda tree: pack(tree, WHEEL.replace(VERSION, "7.8.8")), "delfast-7.8.8+cpu-cp311"),
    ("wheels", lambda tree: (tree / "dist/delfast.whl").write_text(""), "delfast.whl is no wheel"),
    ("wheels", lambda tree: (tree / "dist" / WHEEL).write_text("x"), "is no wheel (File is not a zip file)"),
    *[("wheels", repack(**{name: None}), f"lacks {name}") for name in FILES if name.startswith("delfast/")],
    ("wheels", repack(**{"delfast/libdelfast_ops.so": None}), "lacks delfast/libdelfast_ops.so"),
    ("wheels", repack(**{"delfast/_C.cpython-311-x86_64-linux-gnu.so": None}), "lacks delfast/_C.*.so"),
    ("wheels", repack(**{f"{INFO}/licenses/LICENSE": None}), "lacks delfast-*.dist-info/licenses/LICENSE"),
    ("wheels", repack(**{"delfast/__init__.py": "x = 1"}), "holds another delfast/__init__.py than the tree"),
    ("wheels", repack(**{"delfast/old/gone.py": ""}), "holds delfast/old/gone.py, which the tree does not have"),
    ("wheels", repack(**{f"{INFO}/METADATA": METADATA.replace("MIT", "of ours")}), "has invalid metadata ('of ours'"),
    ("wheels", repack(**{f"{INFO}/METADATA": METADATA.replace("+cpu", "+cu13")}), "has metadata of version 7.8.9+cu13"),
    ("docs", remove("build/docs/changelog.html"), "run make docs"),
    ("docs", replace("build/docs/changelog.html", f"delfast {VERSION}", "delfast 7.0.0"), "is not of version 7.8.9"),
    ("docs", replace("build/docs/changelog.html", f"<h2>{VERSION}", "<h2>Unreleased"), "is not of version 7.8.9"),
    (
        "figures",
        lambda tree: (tree / "benchmarks/tables.py").write_text("import sys\nsys.exit('tables: README.md differ')\n"),
        "README.md differ",
    ),
    ("figures", lambda tree: (tree / "benchmarks/tables.py").write_text("raise SystemExit(2)\n"), "exit code 2"),
    ("figures", lambda tree: keep(tree, "benchmarks/results/gpu.json", "{"), "results/gpu.json has bad content"),
    ("licences", lambda tree: install(tree, "plain", "License-Expression: GPL-3.0-only"), "plain (GPL-3.0-only)"),
    ("licences", lambda tree: install(tree, "plain", "License-Expression: MIT AND GPL-3.0-only"), "plain (MIT AND GPL"),
    ("licences", lambda tree: install(tree, "both", ""), "both (none)"),
    (
        "licences",
        lambda tree: install(tree, "both", "License: like MIT, with a clause"),
        "both (like MIT, with a clause)",
    ),
    (
        "licences",
        lambda tree: install(tree, "both", PACKAGES["both"] + "\nClassifier: License :: Other/Proprietary License"),
        "both (License :: Other/Proprietary License, MIT License)",
    ),
    ("licences", replace("pyproject.toml", "both", "missing-package"), "missing-package (not installed)"),
]


@pytest.mark.parametrize(
    "check, change, message", WRONG, ids=[f"{check}-{position}" for position, (check, _, _) in enumerate(WRONG)]
)
def test_a_check_names_what_is_wrong(check: str, change: Callable[[Path], object], message: str, tree: Path) -> None:
    CHECKS[check](tree)
    change(tree)
    with pytest.raises(Failure, match=re.escape(message)) as caught:
        CHECKS[check](tree)
    assert len(str(caught.value).splitlines()) == 1


def test_every_check_has_a_case_that_fails() -> None:
    assert {check for check, _, _ in WRONG} == CHECKS.keys()


def test_a_line_is_printed_for_each_check(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert release_check.main(["--root", str(tree)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "version: ok: 7.8.9, HEAD has no tag yet",
        "changelog: ok: 7.8.9 of 2026-11-28, 1 entries",
        "citation: ok: CFF 1.2.0, 1 reference",
        "wheels: ok: cp311+cpu",
        "docs: ok: build/docs, 7.8.9",
        "figures: ok: the tables are those of the kept results",
        "licences: ok: 2 packages, decided: none; not for this Python or system: old",
    ]
    git(tree, "tag", "v7.8.9")
    (tree / "CITATION.cff").unlink()
    assert release_check.main(["--root", str(tree)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS) and all(": ok: " in line for line in lines[3:])
    assert lines[0] == "version: cannot read CITATION.cff (FileNotFoundError); restore it"


def test_results_of_an_older_version_are_named_and_accepted(tree: Path) -> None:
    keep(tree, "benchmarks/results/gpu.json", '{"provenance": {"delfast": "7.8.8", "backend": {"delfast": "7.8.8"}}}')
    keep(tree, "benchmarks/results/cpu.json", '{"commit_info": {"id": "abc"}, "delfast": {"no": "version"}}')
    keep(tree, "benchmarks/results/new.json", f'[{{"delfast": "{VERSION}"}}]')
    keep(
        tree,
        "experiments/results/grid/cells.jsonl",
        '{"delfast": "7.8.9"}\n{"delfast": "7.10.0"}\n{"delfast": "7.8.0"}\n',
    )
    assert CHECKS["figures"](tree) == (
        "the tables are those of the kept results; of an older delfast: "
        "benchmarks/results/gpu.json (7.8.8), experiments/results/grid/cells.jsonl (7.8.0)"
    )


def test_a_decided_licence_is_accepted_while_the_package_keeps_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(licences.DECIDED, "plain", ("GPL-3.0-only", "a program that tests run"))
    install(tree, "plain", "License-Expression: GPL-3.0-only")
    assert "decided: plain" in CHECKS["licences"](tree)
    install(tree, "plain", "License-Expression: GPL-2.0-only")
    with pytest.raises(Failure, match=re.escape("plain (GPL-2.0-only)")):
        CHECKS["licences"](tree)


@pytest.mark.parametrize(
    "expression, expected",
    [("MIT OR GPL-3.0-only", True), ("Apache-2.0 WITH LLVM-exception AND MIT", True), ("GPL-3.0-only WITH X", False)],
)
def test_an_expression_is_permissive_if_one_alternative_is(expression: str, expected: bool, tree: Path) -> None:
    install(tree, "plain", f"License-Expression: {expression}")
    if expected:
        CHECKS["licences"](tree)
    else:
        with pytest.raises(Failure, match="plain"):
            CHECKS["licences"](tree)


def test_this_tree_has_a_valid_citation() -> None:
    """The other checks of this tree hold at a release alone."""
    assert release_check.check_citation(ROOT) == "CFF 1.2.0, 1 reference"


def test_the_licences_of_this_tree_are_permissive_or_decided() -> None:
    try:
        found = release_check.check_licences(ROOT)
    except Failure as failure:
        if missing := re.findall(r"(\S+) \(not installed\)", str(failure)):
            pytest.skip(f"{', '.join(missing)} not installed: pip install -r requirements-dev.txt")
        raise
    decided = re.search("decided: ([^;]*)", found)
    assert decided is not None and set(decided[1].split(", ")) <= set(licences.DECIDED)


def test_make_builds_the_docs_before_it_checks() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(
        r"^release-check: docs\n\t\$\(BIN\)/python -m build_support\.release_check$", makefile, re.MULTILINE
    )
    result = subprocess.run(
        [sys.executable, "-m", "build_support.release_check", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and "before it is released" in result.stdout
