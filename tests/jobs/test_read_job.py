"""Reading a job file: what it defines, its constants, and errors that name file and line."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from delfast import InputError
from delfast.jobs import Accept, Training, read_job
from tests.jobs.files import DATA, HEAD, MODEL, WHOLE, job_of, line_of, write_job


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_job(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults(tmp_path: Path) -> None:
    path = write_job(tmp_path)
    job = read_job(path)
    assert (job.path, job.name, job.batch_size) == (path, "job", 128)
    assert job.training == Training(30, 0.1, 0.0) and job.accept == Accept(2.0, 0.25, 1.5)
    assert job.settings == ({"method": "del", "budget": 0.3},) and job.loss_fn is None
    assert job.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_constants(tmp_path: Path) -> None:
    more = """
batch_size = 16
training = {"epochs": 3, "weight_decay": 0.01}
accept = {"test_drop": 1}
settings = [{"method": "del", "budget": 0.2, "epochs": 4, "lr": 0.02}, {"method": "finetune", "batch_size": 8}]
def loss_fn(model, batch):
    return model(batch[0]).sum(1)
"""
    job = job_of(tmp_path, more)
    assert job.batch_size == 16 and job.training == Training(3, 0.1, 0.01)
    assert job.accept == Accept(test_drop=1.0, attack_advantage=None, relearn_ratio=None)
    assert [setting["method"] for setting in job.settings] == ["del", "finetune"] and job.loss_fn is not None


def test_a_link_and_a_relative_path_are_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_job(tmp_path)
    (tmp_path / "link.py").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    assert read_job("link.py").path == read_job("job.py").path == path.resolve()


def test_modules_beside_the_file_can_be_imported_and_replace_no_package(tmp_path: Path) -> None:
    (tmp_path / "beside_the_job.py").write_text("SIZE = 4\n")
    (tmp_path / "torch.py").write_text("raise RuntimeError('not torch')\n")
    job = job_of(tmp_path, "\nfrom beside_the_job import SIZE\nbatch_size = SIZE\n")
    assert job.batch_size == 4
    sys.path.remove(str(tmp_path))


def test_a_dataclass_of_the_file_works(tmp_path: Path) -> None:
    more = "\nfrom dataclasses import dataclass\n@dataclass\nclass Size:\n    n: 'int' = 6\nbatch_size = Size().n\n"
    assert job_of(tmp_path, more).batch_size == 6


def test_no_bytecode_is_written_and_a_changed_file_is_another_job(tmp_path: Path) -> None:
    first = job_of(tmp_path)
    second = job_of(tmp_path, "\nbatch_size = 2\n")
    assert first.digest != second.digest and (first.batch_size, second.batch_size) == (128, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["job.py"]


@pytest.mark.parametrize(
    ("text", "at", "message"),
    [
        (HEAD + "def model(:\n", "def model(:", "invalid syntax"),
        (HEAD + "x = (\n", "x = (", "'(' was never closed"),
        (WHOLE + "import no_such_module_of_that_name\n", "no_such_module", "ModuleNotFoundError: No module named"),
        (WHOLE + "1 / 0  # here\n", "# here", "ZeroDivisionError: division by zero"),
        (WHOLE + "raise SystemExit  # here\n", "# here", "SystemExit"),
        (WHOLE + "def f():\n    return {}['a']  # here\nf()\n", "# here", "KeyError: 'a'"),
        (WHOLE + "nn.Linear(-1)  # here\n", "# here", "TypeError: "),
        (WHOLE + "batch_size = 0\n", "batch_size", "batch_size to be a count of at least 1, got 0"),
        (WHOLE + "batch_size = True\n", "batch_size", "got True"),
        (WHOLE + "training = 3\n", "training", "training to be a dict, got 3"),
        (WHOLE + "training = {'epoch': 3}\n", "training", "unknown key 'epoch'; expected epochs, lr, weight_decay"),
        (WHOLE + "training = {'epochs': 0}\n", "training", "epochs of training to be a count of at least 1, got 0"),
        (WHOLE + "training = {'lr': 0}\n", "training", "lr of training above 0, got 0"),
        (WHOLE + "training = {'lr': float('nan')}\n", "training", "lr of training above 0, got nan"),
        (WHOLE + "training = {'weight_decay': -1}\n", "training", "weight_decay of training of 0 or more, got -1"),
        (WHOLE + "accept = {'drop': 1}\n", "accept", "unknown key 'drop'"),
        (WHOLE + "accept = {'attack_advantage': 10}\n", "accept", "attack_advantage of accept from 0 to 1, got 10"),
        (WHOLE + "accept = {}\n", "accept", "at least one of test_drop, attack_advantage, relearn_ratio"),
        (WHOLE + "settings = []\n", "settings", "a list of dicts, at least one"),
        (WHOLE + "settings = [{'budget': 0.3}]\n", "settings", "a setting to have 'method'"),
        (WHOLE + "settings = [{'method': 'del', 'budget': 2}]\n", "settings", "budget"),
        (WHOLE + "settings = [{'method': 'del', 'speed': 2}]\n", "settings", "no hyperparameter 'speed'"),
        (WHOLE + "settings = [{'method': 'retrain', 'budget': 0.3}]\n", "settings", "no budget for 'retrain'"),
        (WHOLE + "loss_fn = print\nsettings = [{'method': 'scrub'}]\n", "settings", "a job without a loss_fn"),
        (WHOLE + "settings = [{'method': 'del', 'strategy': 'best'}]\n", "settings", "strategy of a setting among del"),
        (WHOLE + "loss_fn = 3\n", "loss_fn", "loss_fn to be a function, got 3"),
        (WHOLE + "load = torch.load\n", "load", "expected save() beside load()"),
    ],
)
def test_errors_name_file_and_line(text: str, at: str, message: str, tmp_path: Path) -> None:
    path = write_job(tmp_path, text)
    shown = refusal(path)
    assert shown.startswith(f"'{path}', line {line_of(path, at)}: ") and message in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + DATA, "to define a function model(), it does not"),
        (HEAD + MODEL, "to define a function train_set(), it does not"),
        ("a\0b", "null"),
        ("(" * 5000, ""),
    ],
)
def test_what_no_job_can_be_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = write_job(tmp_path, text)
    shown = refusal(path)
    assert str(path) in shown and message in shown


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "there is none; `delfast init-job` writes one" in refusal(tmp_path / "none.py")
    assert "there is none" in refusal(tmp_path)


def test_a_failed_file_leaves_no_module(tmp_path: Path) -> None:
    before = set(sys.modules)
    refusal(write_job(tmp_path, "1 / 0\n"))
    assert set(sys.modules) == before
