"""The files that CONTRIBUTING.md, the README and the docs name exist, and hold the names that follow them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^(?:\d\.|-) (.*?)(?=^\d\. |^- |^$|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
PATH = re.compile(r"[\w.]+/[\w./{},]*\w(?:\.\w+)?/?")
FAMILIES, ISAS = ("criticality", "selection", "masked_update", "per_example"), ("scalar", "avx2", "avx512")


def expand(path: str) -> list[str]:
    """Return the paths that ``path`` stands for: ``{a,b}`` are alternatives, FAMILY is each family, ISA each set."""
    for word, values in (("FAMILY", FAMILIES), ("ISA", ISAS)):
        if word in path:
            return [each for value in values for each in expand(path.replace(word, value, 1))]
    group = re.search(r"{([^}]*)}", path)
    if group is None:
        return [path]
    return [each for value in group[1].split(",") for each in expand(path.replace(group[0], value, 1))]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def named() -> Iterator[tuple[str, str]]:
    """Yield (file, name) for every name in code that follows a file in one step."""
    for step in STEPS:
        file = None
        for span in code(step):
            if PATH.fullmatch(span):
                file = span if Path(span).suffix and expand(span) == [span] else None
            elif file is not None and re.fullmatch(r"[A-Za-z_]\w*(::\w+)?", span):
                yield file, span.rpartition("::")[2]


def test_no_line_is_too_long() -> None:
    assert max(map(len, TEXT.splitlines())) <= 160


def test_every_file_that_it_names_exists() -> None:
    paths = {each for span in code(TEXT) if PATH.fullmatch(span) for each in expand(span)}
    assert len(paths) > 60
    kept_out = {"build/kernels/", "experiments/results/NAME"}
    assert [path for path in sorted(paths - kept_out) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_every_path_of_the_repository_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = {each for span in code(text) if PATH.fullmatch(span) for each in expand(span)}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build"}  # other paths are the user's
    inside = sorted(path for path in paths if path.partition("/")[0] in folders)
    assert [path for path in inside if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("file, name", sorted(set(named())))
def test_the_file_holds_the_name(file: str, name: str) -> None:
    text = Path(ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"\b{name}\b", text), f"CONTRIBUTING.md names {name} in {file}"
