"""The work of a step without files: which sets a method's batches are checked of, progress, names of strategies."""

from __future__ import annotations

import logging
import subprocess
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from delfast.errors import InputError
from delfast.experiments import localizing, pipeline
from delfast.experiments import run as runs
from delfast.experiments.grid import workers
from delfast.experiments.run import Config, Run, start
from delfast.unlearning import METHODS, make_method
from delfast.unlearning.steps import Steps

BATCH = 4


@pytest.fixture(scope="module")
def run() -> Run:
    """30 images to forget and 170 to retain."""
    config = Config("digits", "resnet18-thin", "iid", 0.15, 1, 0.1, BATCH, train_examples=200, test_examples=20)
    return start(config, torch.device("cpu"))


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that reach ``delfast.unlearn``, which is not run."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(pipeline, "unlearn_model", lambda model, **given: arguments.update(given))
    return arguments


def run_method(run: Run, method: str, batch_size: int = 64, **options: Any) -> None:
    chosen = make_method(method, {})
    pipeline.run_method(run, torch.nn.Identity(), None, method=chosen, batch_size=batch_size, seed=0, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name, batch_size", [("retain", 13), ("forget", 29)])
def test_a_batch_of_one_is_refused_of_the_sets_that_a_method_trains_on(
    run: Run, passed: dict[str, Any], method: str, name: str, batch_size: int
) -> None:
    assert (len(run.forget.retain), len(run.forget.indices)) == (170, 30)
    chosen = make_method(method, {})
    if not chosen.epochs or name not in Steps(chosen.step_plan, [0], [0]).sets:
        run_method(run, method, batch_size)
        return
    with pytest.raises(InputError, match=r"leave a batch of one, .*; choose another batch_size of the grid$"):
        run_method(run, method, batch_size, remedy="another batch_size of the grid")
    with pytest.raises(InputError, match=r"; choose another --batch-size, or --batchnorm frozen$"):
        run_method(run, method, batch_size)
    assert not passed
    run_method(run, method, batch_size, batchnorm="frozen")


@pytest.mark.parametrize("method", ["finetune", "ssd", "influence"])
def test_every_method_logs_its_title_once_unless_nothing_is_to_be_shown(
    run: Run, passed: dict[str, Any], method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="delfast"):
        run_method(run, method, progress=False)
        assert passed["training"].progress is None and not caplog.records
        run_method(run, method)
        for _ in range(2):
            list(passed["training"].progress([1], "epoch", 1))
    titles = [record.getMessage() for record in caplog.records]
    assert len(titles) == 1 and titles[0].startswith(f"unlearn: {method} on 170 examples to retain")


def test_an_unknown_strategy_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match=r"expected strategy to be one of del, .*; got 'magic'"):
        localizing.find_mask(run, run.factory(), budget=0.3, batch_size=64, seed=0, strategy="magic")


def test_the_commit_is_read_before_the_work_and_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def described(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, f"{len(commands):040}\n")

    monkeypatch.setattr(runs.Path, "exists", lambda _: True)  # also outside a clone
    monkeypatch.setattr(runs.shutil, "which", lambda name: name)
    monkeypatch.setattr(runs.subprocess, "run", described)
    monkeypatch.setattr(workers, "exit_after", lambda _: None)
    ours, theirs = Pipe()
    for begin in (
        lambda: start(run.config, run.device, lambda *_: run.data),
        lambda: runs.open_run(Path("nowhere"), run.device),
        lambda: workers._start_worker(torch.get_num_threads(), theirs),
    ):
        runs.commit.cache_clear()
        commands.clear()
        with suppress(InputError):
            begin()
        assert len(commands) == 1 and runs.commit() == f"{1:040}" and len(commands) == 1
    runs.commit.cache_clear()
    ours.close()
    theirs.close()
