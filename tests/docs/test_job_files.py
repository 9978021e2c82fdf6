"""docs/job_files.md: its commands run one after another, its job file is one, and its tables name what exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from delfast.cli import main
from delfast.jobs import read_job
from delfast.jobs.job import OPTIONAL, REQUIRED
from delfast.jobs.values import RANGES
from tests import ROOT

PAGE = (ROOT / "docs" / "job_files.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.long
def test_the_commands_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in "".join(blocks("sh")).splitlines():
        arguments = shlex.split(line, comments=True)[1:]
        if arguments[0] == "train" and "--trained" not in arguments:
            arguments += ["--epochs", "2"]
        if arguments[0] == "unlearn":
            arguments[arguments.index("--epochs") + 1] = "1"
        assert main(arguments) == 0, f"{line}\n{capsys.readouterr().err}"
        ran.append(arguments[0])
    assert ran == ["init-job", "train", "oracle", "unlearn", "evaluate", "verify", "train"]
    assert "kept to the mask" in capsys.readouterr().out


def test_the_job_file_of_the_page_is_one(tmp_path: Path) -> None:
    path = tmp_path / "job.py"
    path.write_text(blocks("python")[0], encoding="utf-8")
    job = read_job(path)
    assert job.count == 500 and len(job.test_set) == 100 and job.targets() is not None
    (inputs, _), *_ = job.batches(torch.arange(8))
    assert job.model()(inputs).shape == (8, 3)


def test_the_table_names_all_that_a_job_file_may_define() -> None:
    table = "".join(line for line in PAGE.splitlines(keepends=True) if line.startswith("| `"))
    names = re.findall(r"`([a-z_]+)(?:\(|`)", table)
    assert {*REQUIRED, *OPTIONAL, "batch_size", "training", "accept", "settings", *RANGES} <= set(names)
