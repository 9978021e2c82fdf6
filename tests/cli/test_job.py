"""--job: the commands on a user's own network and data, and what they refuse."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from delfast.cli import main
from delfast.files import load_state, save_state
from delfast.jobs import read_job
from tests.jobs.files import WHOLE, line_of, network, points, write_job

SHORT = '\nbatch_size = 8\ntraining = {"epochs": 4, "lr": 0.2}\n'
NAMED = "\ndef example_ids():\n    return [f'p {i:02}' for i in range(40)]\n"
OFFSET = """
given = train_set
def train_set():
    inputs, targets = given().tensors
    from pathlib import Path
    return torch.utils.data.TensorDataset(inputs + float(Path(__file__).with_name("offset.txt").read_text()), targets)
"""
LOSS = "\ndef loss_fn(model, batch):\n    return (model(batch[0]) - batch[0][:, :3]).square().sum(1)\n"


def run(*arguments: object, code: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == code


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the error of a refused command; a line of the log may stand before it."""
    capsys.readouterr()
    run(*arguments, code=2)
    *logged, error = capsys.readouterr().err.splitlines()
    assert error.startswith("delfast: error: ") and all("executing" in line or "train" in line for line in logged)
    return error.removeprefix("delfast: error: ")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the whole way: train, oracle, localize, unlearn, evaluate."""
    path = tmp_path_factory.mktemp("job")
    job = write_job(path, WHOLE + SHORT + NAMED)
    own = ["--job", job]
    run("train", *own, "--forget-ratio", 0.2, "--output-dir", path / "run")
    run("oracle", path / "run", *own, "--output-dir", path / "oracle")
    run("localize", path / "run", *own, "--budget", 0.5, "--output-dir", path / "mask")
    mask = path / "mask" / "mask.safetensors"
    run("unlearn", path / "run", *own, "--mask", mask, "--epochs", 2, "--lr", 0.05, "--output-dir", path / "del")
    found = ["--model-from", path / "del", "--oracle", path / "oracle", "--output-dir", path / "metrics"]
    run("evaluate", path / "run", *own, *found)
    return path


def test_the_way_through(root: Path) -> None:
    summary, job = read(root / "run" / "summary.json"), read_job(root / "job.py")
    config = summary["config"]
    assert (config["data"], config["model"]) == (f"job:{job.path}", f"job:{job.digest}")
    assert (config["epochs"], config["lr"], config["batch_size"], config["forget"]) == (4, 0.2, 8, "iid")
    assert summary["digests"]["job"] == job.digest and summary["digests"]["data"] == job.data_digest()
    assert summary["forget"]["examples"] == 8 and summary["metrics"]["retain_acc"] > 50
    assert read(root / "run" / "forget.json")["labels"] is None
    metrics = read(root / "metrics" / "summary.json")["methods"]
    assert metrics["oracle"]["delta_test"] == 0 and len(metrics) == 2
    run("verify", root / "run", root / "del", root / "del" / "mask.safetensors")
    job.model().load_state_dict(load_state(root / "del" / "model.safetensors"))


def test_the_job_is_the_job_of_python(root: Path) -> None:
    """The file of a run is what the job's own loop gives."""
    from delfast.seeding import seeded
    from delfast.unlearning import train

    job = read_job(root / "job.py")
    with seeded(0):
        model = job.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    train(model, job.batches(torch.arange(40), shuffle=True, seed=0), optimizer, epochs=4)
    kept = load_state(root / "run" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_nothing_of_a_run_directory_is_executed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --job the path that the directory records is named in the error, and not followed."""
    shutil.copytree(root / "run", tmp_path / "run")
    trap = write_job(tmp_path, f"open({str(tmp_path / 'executed')!r}, 'w')\n", "trap.py")
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(summary.read_text().replace(f"job:{root / 'job.py'}", f"job:{trap}"))
    for command in ("oracle", "localize", "evaluate", "unlearn"):
        error = refusal(capsys, command, tmp_path / "run", "--output-dir", tmp_path / "out")
        assert f"expected the job file '{trap}' as --job" in error and "it is executed" in error
    run("oracle", tmp_path / "run", "--job", root / "job.py", "--output-dir", tmp_path / "oracle")
    run("verify", root / "oracle", tmp_path / "oracle", root / "mask" / "mask.safetensors")
    error = refusal(capsys, "train", "--data", f"job:{trap}", "--output-dir", tmp_path / "out")
    assert "as --job" in error
    error = refusal(capsys, "bench", tmp_path / "run", "--output-dir", tmp_path / "out")
    assert "as --job" in error and not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_another_job_file_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_job(tmp_path, WHOLE + SHORT + NAMED + "# changed\n")
    error = refusal(capsys, "oracle", root / "run", "--job", other, "--output-dir", tmp_path / "out")
    assert f"the job file '{other}' is not the one that was used before: its content differs" in error
    moved = write_job(tmp_path, (root / "job.py").read_text(), "moved.py")
    run("oracle", root / "run", "--job", moved, "--output-dir", tmp_path / "oracle")
    assert read(tmp_path / "oracle" / "summary.json")["config"]["data"] == f"job:{moved}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "digits"], "expected --job without --data, got both"),
        (["--model", "vit"], "expected --job without --model, got both"),
        (["--data-dir", "."], "expected --job without --data-dir, got both"),
        (["--train-examples", "3"], "expected --job without --train-examples, got both"),
        (["--forget", "non-iid:7"], "expected classes 0 to 2 in 'non-iid:7', got 7"),
        (["--forget-ratio", "0.001"], "is empty"),
        (["--epochs", "0"], "at least 1 epoch, got 0"),
        (["--lr", "0"], "learning rate above 0"),
        (["--trained", "none.pt"], "expected a state file at 'none.pt', there is none"),
    ],
)
def test_train_refuses(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, WHOLE + SHORT)
    assert message in refusal(capsys, "train", "--job", job, *options, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_job_and_a_run_of_pictures_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--train-examples", 60, "--test-examples", 20, "--epochs", 1, "--forget", "iid", "--batch-size", 16]
    run("train", *few, "--output-dir", tmp_path / "run")
    job = write_job(tmp_path, WHOLE)
    error = refusal(capsys, "oracle", tmp_path / "run", "--job", job, "--output-dir", tmp_path / "out")
    assert "was made with --data digits, not with a job; leave --job out" in error
    assert "--trained with --job" in refusal(capsys, "train", "--trained", job, "--output-dir", tmp_path / "out")


# forget sets


def test_a_file_lists_identifiers_one_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, WHOLE + SHORT + NAMED)
    (tmp_path / "ids.txt").write_text("p 30\n\n p 02 \r\np 11")
    train = ["train", "--job", job, "--epochs", 1, "--forget", f"file:{tmp_path / 'ids.txt'}", "--output-dir"]
    run(*train, tmp_path / "run")
    assert read(tmp_path / "run" / "forget.json")["indices"] == [2, 11, 30]
    for text, message in (("p 30\np 40", "'p 40'"), ("p 30\np 30", "'p 30' is there twice"), ("", "is empty")):
        (tmp_path / "ids.txt").write_text(text)
        assert message in refusal(capsys, *train, tmp_path / "out")


def test_a_file_lists_indices_without_identifiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, WHOLE + SHORT)
    (tmp_path / "ids.txt").write_text("30 2\n11")
    train = ["train", "--job", job, "--epochs", 1, "--forget", f"file:{tmp_path / 'ids.txt'}", "--output-dir"]
    run(*train, tmp_path / "run")
    assert read(tmp_path / "run" / "forget.json")["indices"] == [2, 11, 30]
    (tmp_path / "ids.txt").write_text("40")
    assert "to list indices from 0 to 39, got '40'" in refusal(capsys, *train, tmp_path / "out")


def test_classes_and_wrong_labels(tmp_path: Path) -> None:
    job = write_job(tmp_path, WHOLE + SHORT)
    targets = points(40, 0).tensors[1]
    run("train", "--job", job, "--forget", "non-iid:1", "--output-dir", tmp_path / "class")
    kept = read(tmp_path / "class" / "forget.json")
    assert kept["labels"] == [1] * 4 and (targets[kept["indices"]] == 1).all()
    train = ["train", "--job", job, "--forget", "mislabelled", "--forget-ratio", 0.2, "--epochs", 200]
    run(*train, "--output-dir", tmp_path / "wrong")
    kept = read(tmp_path / "wrong" / "forget.json")
    assert all(label != targets[index] for index, label in zip(kept["indices"], kept["labels"], strict=True))
    assert read(tmp_path / "wrong" / "summary.json")["metrics"]["forget_acc"] > 50  # of the wrong labels: learned
    finetune = ["--method", "finetune", "--epochs", 1]
    run("unlearn", tmp_path / "wrong", "--job", job, *finetune, "--output-dir", tmp_path / "tuned")
    assert read(tmp_path / "tuned" / "forget.json")["labels"] == kept["labels"]


def test_classes_need_integer_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "\ndef train_set():\n    return TensorDataset(*points(40, 0).tensors[:1] * 2)\ntest_set = train_set\n"
    job = write_job(tmp_path, WHOLE + SHORT + LOSS + more)
    for spec in ("non-iid:1", "mislabelled"):
        error = refusal(capsys, "train", "--job", job, "--forget", spec, "--output-dir", tmp_path / "out")
        assert f"expected integer class targets in the job's training set for the forget set '{spec}'" in error
    run("train", "--job", job, "--output-dir", tmp_path / "run")


# losses, trained networks, errors in the file


def test_a_loss_of_its_own_is_measured_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, WHOLE + SHORT.replace("0.2", "0.01") + LOSS)
    run("train", "--job", job, "--output-dir", tmp_path / "run")
    run("oracle", tmp_path / "run", "--job", job, "--output-dir", tmp_path / "oracle")
    run("localize", tmp_path / "run", "--job", job, "--stop-when-stable", 0.9, "--output-dir", tmp_path / "mask")
    mask = ["--mask", tmp_path / "mask" / "mask.safetensors"]
    run("unlearn", tmp_path / "run", "--job", job, *mask, "--lr", 0.01, "--epochs", 1, "--output-dir", tmp_path / "del")
    found = ["--model-from", tmp_path / "del", "--oracle", tmp_path / "oracle", "--output-dir", tmp_path / "metrics"]
    capsys.readouterr()
    run("evaluate", tmp_path / "run", "--job", job, *found)
    shown = capsys.readouterr().out
    metrics = read(tmp_path / "run" / "summary.json")["metrics"]
    of_oracle = read(tmp_path / "metrics" / "summary.json")["methods"]["oracle"]
    assert "forget loss" in shown and "forget acc" not in shown
    assert all(f"{of_oracle[name]:.4g}" in shown for name in metrics)
    assert metrics.keys() == {"forget_loss", "retain_loss", "test_loss"}
    model, (inputs, _) = network(), points(12, 1).tensors
    model.load_state_dict(load_state(tmp_path / "run" / "model.safetensors"))
    wanted = (model(inputs) - inputs[:, :3]).square().sum(1).mean()
    assert metrics["test_loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert read(tmp_path / "metrics" / "summary.json")["methods"]["oracle"].keys() == metrics.keys()


def test_a_network_that_is_trained_already(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, model = root / "job.py", network()
    save_state(tmp_path / "own.safetensors", model.state_dict())
    train = ["train", "--job", job, "--trained", tmp_path / "own.safetensors"]
    run(*train, "--output-dir", tmp_path / "run")
    kept, summary = load_state(tmp_path / "run" / "model.safetensors"), read(tmp_path / "run" / "summary.json")
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert summary["losses"] == [] and summary["seconds"] == {}
    run("localize", tmp_path / "run", "--job", job, "--output-dir", tmp_path / "mask")
    error = refusal(capsys, *train, "--forget", "mislabelled", "--output-dir", tmp_path / "out")
    assert "expected a forget set with the data's own labels" in error
    save_state(tmp_path / "own.safetensors", torch.nn.Linear(3, 3).state_dict())
    assert "does not fit model()" in refusal(capsys, *train, "--output-dir", tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "at"),
    [
        ("1 / 0  # here", "# here"),
        ("def model(:", "def model(:"),
        ("def model():\n    return 3  # here", "def model():"),
        ("def train_set():\n    raise OSError(2, 'gone')  # here", "# here"),
        ("def preprocess(batch):\n    return batch.images  # here", "# here"),
        ("class Net(nn.Linear):\n    def forward(self, x):\n        return x.shape.y  # here\n"
         "def model():\n    return Net(4, 3)", "# here"),
        ("def loss_fn(model, batch):\n    return model(batch)  # here", "# here"),
        ("def loss_fn(model, batch):\n    return model(batch[0])", "def loss_fn"),
        ("def loss_fn(model, batch):\n    return 1.0", "def loss_fn"),
    ],
)  # fmt: skip
def test_errors_name_file_and_line(more: str, at: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, f"{WHOLE}\n{more}\n")
    error = refusal(capsys, "train", "--job", job, "--output-dir", tmp_path / "run")
    assert error.startswith(f"'{job}', line {line_of(job, at)}: ") and not (tmp_path / "run").exists()


def test_a_test_set_that_cannot_be_measured_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = '\ntraining = {"epochs": 10**9}\ndef test_set():\n    return [points(3, 1).tensors[0]] * 3\n'
    error = refusal(capsys, "train", "--job", write_job(tmp_path, WHOLE + more), "--output-dir", tmp_path / "run")
    assert "expected batches (input, target)" in error and not (tmp_path / "run").exists()


# init-job and compare


def test_init_job_writes_a_file_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("init-job", tmp_path / "mine.py")
    assert "mine.py" in capsys.readouterr().out
    job = read_job(tmp_path / "mine.py")
    assert job.count == 1400 and job.ids[3] == "image-0003" and len(job.data_digest()) == 64
    assert len(job.settings) == 2 and job.accept.relearn_ratio == 1.5
    run("train", "--job", tmp_path / "mine.py", "--epochs", 2, "--output-dir", tmp_path / "run")
    assert read(tmp_path / "run" / "summary.json")["metrics"]["test_acc"] > 60
    assert "exists; choose another" in refusal(capsys, "init-job", tmp_path / "mine.py")


GRID = """
job = "job.py"
[train]
epochs = 2
[settings.iid]
forget = "iid"
forget_ratio = 0.2
[unlearn]
epochs = 1
[[compare]]
strategies = ["del"]
[[compare]]
methods = ["retrain"]
strategies = ["everything"]
"""


def test_compare_takes_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_job(tmp_path, WHOLE + SHORT)
    (tmp_path / "grid.toml").write_text(GRID)
    grid = ["compare", tmp_path / "grid.toml", "--workers", 1, "--output-dir", tmp_path / "out"]
    run(*grid)
    with open(tmp_path / "out" / "results.csv", encoding="utf-8", newline="") as stream:
        rows = {row["method"]: row for row in csv.DictReader(stream)}
    assert rows.keys() == {"original", "oracle", "del", "retrain"}
    assert rows["retrain"]["epochs"] == rows["original"]["epochs"] == "2" and rows["retrain"]["lr"] == "0.2"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    moved = write_job(tmp_path, WHOLE + SHORT, "moved.py")
    run(*grid, "--job", tmp_path / "job.py")  # the same job: nothing runs again
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    refused = [*grid[:-1], tmp_path / "other", "--job", moved, "--report-only"]
    assert "it holds none; run it first" in refusal(capsys, *refused)
    write_job(tmp_path, WHOLE + SHORT + "# changed\n")
    assert "it holds 2 cells of other settings" in refusal(capsys, *grid, "--report-only")


@pytest.mark.long
def test_compare_refuses_a_job_whose_data_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, offset in (("a", "0"), ("b", "5")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "offset.txt").write_text(offset)
        write_job(tmp_path / name, WHOLE + SHORT + OFFSET)
    (tmp_path / "grid.toml").write_text(GRID.replace("job.py", "a/job.py"))
    grid = ["compare", tmp_path / "grid.toml", "--workers", 1, "--output-dir", tmp_path / "out"]
    run(*grid)
    run(*grid, "--report-only")
    message = "expected 'job.py' to hold the data that"
    for options in ([], ["--report-only"]):
        assert message in refusal(capsys, *grid, "--job", tmp_path / "b" / "job.py", *options)
    (tmp_path / "a" / "offset.txt").write_text("5")  # the same path
    for options in ([], ["--report-only"]):
        assert message in refusal(capsys, *grid, *options)


@pytest.mark.parametrize(
    ("grid", "job", "message"),
    [
        (GRID.replace("epochs = 2", "data = 'digits'"), WHOLE, "a grid with a job to have no data in [train]"),
        (GRID, WHOLE + LOSS, "expected a job without loss_fn, whose accuracies can be compared"),
        (GRID.replace("job.py", "none.py"), WHOLE, "none.py', there is none"),
        (GRID.replace('job = "job.py"', "").replace("epochs = 2", "data = 'job:job.py'"), WHOLE, "above [train]"),
        (GRID, "1 / 0\n", "line 1: ZeroDivisionError"),
    ],
)
def test_grids_refuse(grid: str, job: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_job(tmp_path, job)
    (tmp_path / "grid.toml").write_text(grid)
    error = refusal(capsys, "compare", tmp_path / "grid.toml", "--output-dir", tmp_path / "out")
    assert message in error and not (tmp_path / "out").exists()
