"""The end of commands: by Ctrl-C, SIGTERM and SIGKILL; no worker process outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from delfast.cli import main
from delfast.experiments.interrupts import Stopped, stopping
from delfast.files import write_atomically

GRID = """
seeds = [0, 1]
[train]
data = "digits"
epochs = 500
train_examples = 300
test_examples = 100
[settings.iid]
forget = "iid"
[[compare]]
"""
ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated"), signal.SIGKILL: (-9, None)}
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the processes of Linux from /proc")


def until(true: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def descendants(process: int) -> set[int]:
    """All processes that a process has begun, and those that they have."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
    return {found for child in map(int, children) for found in {child, *descendants(child)}}


def is_alive(process: int) -> bool:
    """Return whether the process exists and is no zombie, whose parent has not read its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Command:
    """A command in a process group of its own: a new Python, or (sooner there) a fork of this one."""

    def __init__(self, arguments: list[str], errors: Path, fork: bool) -> None:
        self.errors = errors
        if not fork:
            with open(errors, "wb") as stream:
                command = [sys.executable, "-m", "delfast", *arguments]
                self.process = subprocess.Popen(command, start_new_session=True, stderr=stream).pid
            return
        self.process = os.fork()
        if not self.process:
            try:
                os.setsid()
                os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)  # not pytest's
                code = main(arguments)
                sys.stderr.flush()
                os._exit(code)
            finally:
                os._exit(99)

    def end(self, number: signal.Signals, everyone: bool = False) -> list[str]:
        """Stop it by a signal; the lines it printed. It and all processes that it began are gone in seconds."""
        workers = descendants(self.process)
        assert workers
        (os.killpg if everyone else os.kill)(self.process, number)
        _, status = os.waitpid(self.process, 0)
        assert os.waitstatus_to_exitcode(status) == ENDS[number][0]
        until(lambda: not any(map(is_alive, workers)), 15)
        return self.errors.read_text(encoding="utf-8").splitlines()


@contextmanager
def running(*arguments: object, errors: Path, fork: bool) -> Iterator[Command]:
    command = Command([str(argument) for argument in arguments], errors, fork)
    try:
        yield command
    finally:
        if is_alive(command.process):
            os.killpg(command.process, signal.SIGKILL)
            os.waitpid(command.process, 0)


def check_end(number: signal.Signals, tmp_path: Path, *, workers: int, fork: bool, everyone: bool = False) -> None:
    (tmp_path / "grid.toml").write_text(GRID, encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["compare", tmp_path / "grid.toml", "--output-dir", out, "--workers", workers]
    with running(*arguments, errors=tmp_path / "errors", fork=fork) as command:
        until(lambda: len(list(out.glob("networks/.*"))) == workers, 120)  # each trains a network
        lines = command.end(number, everyone)
    word = ENDS[number][1]
    progress = ("delfast: networks", "delfast: train", "delfast: oracle")
    left = [line for line in lines if not line.startswith(progress)]
    if number == signal.SIGKILL:  # multiprocessing's own process says what it removes
        left = [line for line in left if "resource_tracker" not in line and "warnings.warn" not in line]
    assert left == ([] if word is None else [f"delfast: error: {word}"]), left


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_grid_that_began_them(number: signal.Signals, tmp_path: Path) -> None:
    check_end(number, tmp_path, workers=1, fork=True)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("everyone", [False, True])  # a terminal sends Ctrl-C to the whole group, systemd SIGTERM
def test_two_workers_end_too_where_all_get_the_signal(number: signal.Signals, everyone: bool, tmp_path: Path) -> None:
    check_end(number, tmp_path, workers=2, fork=False, everyone=everyone)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS)
def test_a_grid_may_be_stopped_while_its_workers_start(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID, encoding="utf-8")
    arguments = ["compare", tmp_path / "grid.toml", "--output-dir", tmp_path / "out", "--workers", 2]
    with running(*arguments, errors=tmp_path / "errors", fork=False) as command:
        until(lambda: len(descendants(command.process)) == 3, 120)  # with multiprocessing's own
        lines = command.end(number, everyone=number == signal.SIGINT)
    assert "Traceback" not in "".join(lines), lines


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS)
def test_a_stage_that_is_timed_ends_with_bench(number: signal.Signals, tmp_path: Path) -> None:
    arguments = ["bench", "--model", "resnet18", "--repeats", 1000, "--output-dir", tmp_path / "out"]
    with running(*arguments, errors=tmp_path / "errors", fork=False) as command:
        until(lambda: descendants(command.process), 120)
        time.sleep(5)  # its imports
        command.end(number)


# ---- in one process


COMMANDS: dict[str, list[str]] = {
    "train": ["train"],
    "oracle": ["oracle", "run"],
    "localize": ["localize", "run"],
    "unlearn": ["unlearn", "run"],
    "evaluate": ["evaluate", "run"],
    "verify": ["verify", "a", "b", "c"],
    "compare": ["compare", "grid.toml"],
    "bench": ["bench", "run"],
    "doctor": ["doctor"],
    "demo": ["demo"],
}
FIRST = {  # what each calls of its own
    **dict.fromkeys(("train", "demo"), "delfast.experiments.pipeline.output_directory"),
    **dict.fromkeys(("oracle", "localize", "unlearn", "evaluate", "bench"), "delfast.experiments.run.read_summary"),
    "verify": "delfast.experiments.verification.load_network",
    "compare": "delfast.experiments.grid.read_grid",
    "doctor": "delfast.cli.doctor.examine",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_command_ends_with_the_signals_code_and_its_word(
    command: str,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FIRST[command], lambda *_, **__: (os.kill(os.getpid(), number), time.sleep(30)))
    output_dir = [] if command in ("evaluate", "verify", "doctor") else ["--output-dir", "out"]
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    code, word = ENDS[number]
    assert main([*COMMANDS[command], *output_dir]) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"delfast: error: {word}"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_interrupt_in_another_thread_ends_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("delfast.cli.doctor.examine", interrupt)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["doctor"])))
    thread.start()
    thread.join()
    assert codes == [130] and capsys.readouterr().err == "delfast: error: interrupted\n"


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="interrupted"), stopping():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_written_when_the_signal_comes_is_removed(tmp_path: Path) -> None:
    def write(partial: Path) -> None:
        partial.write_text("half of")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    with pytest.raises(Stopped, match="terminated"), stopping():
        write_atomically(tmp_path / "a", write)
    assert not list(tmp_path.iterdir())
