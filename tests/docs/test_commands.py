"""The commands of the pages: each one runs in a test, or carries a printed mark of why it does not."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from delfast.cli import main as delfast_command
from tests import ROOT

MARK = re.compile(r"\b(network|hours?|minutes?|GPU|by hand)\b")  # in a comment, on the line or above it
ELSEWHERE = {  # the tests that run all commands of a page, those of a shell too
    "docs/experiments.md": "test_readme.py",
    "docs/getting_started.md": "test_pages.py",
    "docs/job_files.md": "test_job_files.py",
    "docs/ledger.md": "test_ledger_page.py",
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> list[tuple[str, bool]]:
    """Return each command of the shell blocks, without its comment, and whether it is marked."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        is_block_marked = False
        for line in block.splitlines():
            command, _, comment = line.partition("#")
            if command.strip():
                found.append((command.strip(), is_block_marked or bool(MARK.search(comment))))
            else:
                is_block_marked = bool(MARK.search(comment))
    return found


UNMARKED = {
    path.relative_to(ROOT).as_posix(): [command for command, is_marked in found if not is_marked]
    for path in PAGES
    if (found := commands(path.read_text(encoding="utf-8")))
}
OURS = {
    page: lines
    for page, found in UNMARKED.items()
    if page not in ELSEWHERE and (lines := [line for line in found if line.startswith("delfast ")])
}


def test_an_unmarked_command_is_one_that_a_test_runs() -> None:
    """Find commands that are neither delfast's, nor those of an example, nor run by a test below."""
    rest = [
        (page, line)
        for page, lines in UNMARKED.items()
        if page not in ELSEWHERE
        for line in lines
        if not line.startswith("delfast ")
    ]
    examples = re.compile(
        r"(?:python|torchrun|accelerate launch) (?:--?\S+ (?:\d+ )?)*(examples/\w+\.py)( --original \S+)?"
    )
    for page, line in rest:
        found = examples.fullmatch(line)
        assert line == ".venv/bin/pre-commit install" or (found and (ROOT / found[1]).exists()), f"{page}: {line}"
    for page, test in ELSEWHERE.items():
        assert Path(page).stem in (ROOT / "tests/docs" / test).read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("page", OURS)
def test_the_commands_of_a_page_run_one_after_another(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run them as they stand there, except that every training takes one epoch."""
    monkeypatch.chdir(tmp_path)
    for line in OURS[page]:
        assert delfast_command(shlex.split(re.sub(r"--epochs \d+", "--epochs 1", line))[1:]) == 0, line


def test_the_commit_hook_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pre_commit", reason="pre-commit is missing: pip install -r requirements-dev.txt")
    (tmp_path / ".pre-commit-config.yaml").write_bytes((ROOT / ".pre-commit-config.yaml").read_bytes())
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "pre_commit", "install"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / ".git/hooks/pre-commit").exists()


def test_every_shell_block_is_one_of_sh() -> None:
    """Other names of a shell would escape the tests above."""
    for page in PAGES:
        assert not re.findall(r"^```(?:bash|shell|console|zsh)", page.read_text(encoding="utf-8"), re.MULTILINE), page
