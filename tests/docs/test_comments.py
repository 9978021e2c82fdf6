"""Comments and docstrings open with no fragment, and those of C++ and CUDA sources describe no code as a person."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests import ROOT

SUFFIXES = {".h", ".cpp", ".inl", ".cu", ".cuh"}
FRAGMENT = re.compile(r"(Of|What|Those|Such|That of|How|Whether|Which|Who|Whose)\b", re.IGNORECASE)
PERSON = re.compile(
    r"\b(asks?|asked|hears?|knows?|known|learns?|nobody|notices?|noticed|sees|seen|says?|tells?|told|unasked|wants?)\b",
    re.IGNORECASE,
)
PYTHON = sorted(path for name in ("tests", "benchmarks", "build_support") for path in (ROOT / name).rglob("*.py"))
OPENING = re.compile(rf'[ur]?"""(?:{FRAGMENT.pattern}|The same\b)|#\W*{FRAGMENT.pattern}', re.IGNORECASE)
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES)


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every comment; the lines of a block are one comment."""
    block: list[str] = []
    first = 0
    for number, line in enumerate([*text.splitlines(), ""], 1):
        code, mark, comment = line.partition("//")
        if mark and not code.strip():
            first = first if block else number
            block.append(comment.strip())
            continue
        if block:
            yield first, " ".join(block)
            block = []
        if mark and code.count('"') % 2 == 0:  # not inside a string
            yield number, comment.strip()


def problems(text: str) -> list[str]:
    """Return a line for each comment that opens with a fragment or describes code as a person."""
    found = []
    for number, comment in comments(text):
        if FRAGMENT.match(comment):
            found.append(f"{number}: expected a noun or a verb at the start of '{comment[:60]}'")
        if person := PERSON.search(comment):
            found.append(f"{number}: expected a word for code, got '{person.group()}' in '{comment[:60]}'")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "csrc")))
def test_comments_are_plain(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


def test_a_bad_comment_is_refused() -> None:
    source = "\n".join(
        [
            "// Of the rows.",
            "int rows;  // what a block takes",
            "// The kernel asks",
            "// of a row,",
            "// nothing.",
            'print("// What");',
            "int count;  // number of rows",
        ]
    )
    assert [problem.partition(":")[0] for problem in problems(source)] == ["1", "2", "3"]


def fragments(text: str) -> list[int]:
    """Return the numbers of the lines at which a docstring, or a comment of whole lines, opens with a fragment."""
    lines = ["", *(line.strip() for line in text.splitlines())]
    return [
        number
        for number, (before, line) in enumerate(pairwise(lines), 1)
        if OPENING.match(line) and not (line.startswith("#") and before.startswith("#"))
    ]


def test_docstrings_and_comments_of_tests_and_benchmarks_open_with_no_fragment() -> None:
    found = {str(path.relative_to(ROOT)): fragments(path.read_text(encoding="utf-8")) for path in PYTHON}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_bad_docstring_is_refused() -> None:
    lines = ['"""What nvcc makes."""', '    """The same network."""', "# of a row", "# A comment", "# of two lines"]
    assert fragments("\n".join([*lines, '"""Whatever."""', "x = 1  # of the panels"])) == [1, 2, 3]


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 100 and len(PYTHON) > 200


KERNELS = [path for path in SOURCES if "__global__ void" in path.read_text(encoding="utf-8") and path.suffix == ".cuh"]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_a_kernel_file_opens_with_mapping_memory_and_numerics(path: Path) -> None:
    head = path.read_text(encoding="utf-8").partition("#pragma once")[0]
    assert re.findall(r"^// (Mapping|Memory|Numerics)[.:]", head, re.MULTILINE) == ["Mapping", "Memory", "Numerics"]


@pytest.mark.parametrize(
    ("launcher", "files"), [("criticality", "criticality"), ("per_example", "per_example|channel")]
)
def test_a_launcher_lists_all_kernels_of_its_family(launcher: str, files: str) -> None:
    head = (ROOT / "csrc" / "cuda" / f"{launcher}.cu").read_text(encoding="utf-8").partition("#include")[0]
    text = "".join(path.read_text(encoding="utf-8") for path in KERNELS if re.match(files, path.name))
    names = re.findall(r"__global__ void __launch_bounds__\([^()]*\)\s+(\w+)\(", text)
    assert len(names) == text.count("__global__ void") > 5
    assert [name for name in names if not re.search(rf"^//   {name} ", head, re.MULTILINE)] == []
