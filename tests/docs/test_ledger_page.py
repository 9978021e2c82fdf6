"""docs/ledger.md: the first ledger, from a job file to a report and a purge, and the names in the page's tables."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from delfast.cli import main
from delfast.jobs import Accept
from delfast.ledger import Ledger, events
from delfast.ledger.words import THRESHOLDS
from tests import ROOT

PAGE = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
FIRST = PAGE.split("## First ledger\n")[1].split("\n## ")[0]
RUN, LIST = re.findall(r"^```text\n(.*?)^```", FIRST, flags=re.MULTILINE | re.DOTALL)


def code_lines(text: str) -> int:
    """Return the number of lines without comments, docstrings and empty lines."""
    words: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            words.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and at not in words for at, line in lines)


@pytest.mark.long
def test_the_first_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs: dict[str, list[str]] = {}
    head = ""
    for line in re.findall(r"^```sh\n(.*?)^```", FIRST, flags=re.MULTILINE | re.DOTALL):
        for command in line.splitlines():
            if not command.startswith("delfast "):
                subprocess.run(["sh", "-c", command], check=True)
                continue
            arguments = [each.replace("HEAD", head) for each in shlex.split(command, comments=True)[1:]]
            code = main(arguments)
            printed = capsys.readouterr()
            assert code == 0, f"{command}\n{printed.out}\n{printed.err}"
            outputs.setdefault(arguments[1], []).append(printed.out)
            if arguments[1] == "report":
                check_again(tmp_path, monkeypatch, capsys)
            head = next((each[6:] for each in printed.out.splitlines() if each.startswith("head: ")), head)
    assert code_lines((tmp_path / "job.py").read_text(encoding="utf-8")) <= 60
    first = outputs["run"][0].splitlines()
    assert [line.split(":")[0] for line in first] == [line.split(":")[0] for line in RUN.splitlines()]
    assert without_times(outputs["list"][0]) == without_times(LIST)
    assert "the ledger holds, and continues the one of that head" in outputs["verify"][0]
    assert "the ledger holds" in outputs["verify"][1], "also after the purge"
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "3 forget requests: 3 accepted, 0 rejected, 0 pending." in report
    with Ledger.open("ledger", job="job.py") as ledger:
        assert ledger.holding() == []
        assert sorted(each.name for each in ledger.path.rglob("*.safetensors")) == ["model.safetensors"]


def without_times(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)


def check_again(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the commands by which the report lets its reader check each request."""
    report = (folder / "report" / "report.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", report, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    with monkeypatch.context() as patched:
        patched.chdir(folder / "ledger")
        for command in dict.fromkeys("".join(blocks).splitlines()):
            assert main(shlex.split(command)[1:]) == 0, command
    printed = capsys.readouterr().out
    assert printed.count("kept to the mask") == 3 and "continues the one of that head" in printed


def test_the_tables_name_every_event_and_threshold() -> None:
    recorded = {value for name, value in vars(events).items() if name.isupper()}
    table = PAGE.split("## What is recorded\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == recorded
    thresholds = re.findall(
        r"^\| `(\w+)` \| ([\d.]+) \|", PAGE.split("## Run\n")[1].split("\n## ")[0], flags=re.MULTILINE
    )
    assert {name: float(limit) for name, limit in thresholds} == vars(Accept())
    assert "| `earlier_attack_advantage` | that of `attack_advantage` |" in PAGE
    assert THRESHOLDS.keys() == {"outside_mask", "earlier_attack_advantage", *vars(Accept())}
