"""The README: its figures are the kept results', its code runs, and what it names is there."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import delfast
from benchmarks import readme
from delfast.cli import main as delfast_command
from delfast.files import read_json
from tests import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def named(tool: str) -> set[str]:
    """The X of every `tool X` in the README's code, inline or in a block."""
    code = "\n".join([*blocks("sh"), *re.findall(r"`([^`\n]+)`", TEXT)])
    return set(re.findall(rf"^{tool} ([a-z][a-z-]*)", code, flags=re.MULTILINE))


# The figures


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """benchmarks.readme at work on copies of the README and the results."""
    for name in ("README", "CPU", "STEPS", "JOB", "MEMORY", "GPU", "DEMO", "SECTORS", "CIFAR10"):
        source = getattr(readme, name)
        (tmp_path / source.name).write_bytes(source.read_bytes())
        monkeypatch.setattr(readme, name, tmp_path / source.name)
    return tmp_path


def test_the_tables_are_those_of_the_kept_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"]) == 0, capsys.readouterr().err
    results = [read_json(path) for path in (readme.CPU, readme.STEPS, readme.JOB, readme.MEMORY)]
    for benchmark in (benchmark for result in results for benchmark in result["benchmarks"]):
        assert benchmark["extra_info"]["measured"] in TEXT and benchmark["extra_info"]["target"] in TEXT
    assert read_json(readme.CPU)["machine_info"]["cpu"]["brand_raw"] in TEXT
    for scenario in read_json(readme.DEMO)["scenarios"].values():
        for values in scenario["methods"].values():
            assert f"| {values['forget_acc']:.2f} | {values['retain_acc']:.2f} | {values['test_acc']:.2f} |" in TEXT
    rows = list(csv.DictReader(readme.CIFAR10.open(encoding="utf-8")))
    for setting in {row["setting"] for row in rows}:
        oracles = [float(r["forget_acc"]) for r in rows if (r["setting"], r["method"]) == (setting, "oracle")]
        found = re.search(rf"\| {setting} \| oracle \| everything \| (\d+) \| ([\d.]+) ", TEXT)
        assert found and int(found[1]) == len(oracles)
        assert abs(float(found[2]) - sum(oracles) / len(oracles)) < 0.0051


def test_check_sees_a_changed_figure_and_writing_mends_it(copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = read_json(readme.CPU)["benchmarks"][0]["extra_info"]["measured"]
    (copies / "README.md").write_text(TEXT.replace(figure, "1000 x faster"), encoding="utf-8")
    assert readme.main(["--check"]) == 1
    assert "run `python -m benchmarks.readme`" in capsys.readouterr().err
    assert "1000 x faster" in (copies / "README.md").read_text(encoding="utf-8")  # a check writes nothing
    assert readme.main([]) == 0
    assert (copies / "README.md").read_text(encoding="utf-8") == TEXT


RESULTS = ["cpu.json", "steps.json", "job.json", "memory.json", "gpu.json", "demo.json", "sectors.md", "results.csv"]


@pytest.mark.parametrize("name", ["README.md", *RESULTS])
def test_a_missing_file_is_named(name: str, copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copies / name).unlink()
    before = {path: path.read_bytes() for path in copies.iterdir()}
    for arguments in ([], ["--check"]):
        assert readme.main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("readme: error: ") and name in lines[0]
    assert before == {path: path.read_bytes() for path in copies.iterdir()}


def test_unfit_results_and_lost_markers_are_refused(copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> str:
        assert readme.main([]) == 2
        return capsys.readouterr().err

    results, summary = read_json(copies / "cpu.json"), read_json(copies / "demo.json")
    failed = {**results["benchmarks"][0], "extra_info": {}}
    for benchmarks, message in (([failed], "has no figure for test_"), ([], "holds no benchmark")):
        (copies / "cpu.json").write_text(json.dumps({**results, "benchmarks": benchmarks}), encoding="utf-8")
        assert message in refused()
    (copies / "cpu.json").write_text(json.dumps(results), encoding="utf-8")
    (copies / "demo.json").write_text(json.dumps({**summary, "quick": True}), encoding="utf-8")
    assert "delfast demo --quick" in refused()
    (copies / "demo.json").write_text(json.dumps(summary), encoding="utf-8")
    card = read_json(copies / "gpu.json")
    (copies / "gpu.json").write_text(json.dumps({**card, "failures": ["masked AdamW: off"]}), encoding="utf-8")
    assert "is of a run that failed" in refused()
    (copies / "gpu.json").write_text(json.dumps(card), encoding="utf-8")
    report = (copies / "sectors.md").read_text(encoding="utf-8")
    (copies / "sectors.md").write_text(report.replace("| apart, SGD", "| elsewhere, SGD"), encoding="utf-8")
    assert readme.main([]) == 0  # there is still a figure of each kind
    (copies / "sectors.md").write_text(report.replace("| apart", "| elsewhere"), encoding="utf-8")
    assert "has no figure for criticality" in refused()
    (copies / "sectors.md").write_text(report, encoding="utf-8")
    rows = (copies / "results.csv").read_text(encoding="utf-8")
    (copies / "results.csv").write_text(rows.splitlines()[0] + "\n", encoding="utf-8")
    assert "holds no results" in refused()
    (copies / "results.csv").write_text(rows, encoding="utf-8")
    (copies / "README.md").write_text(TEXT.replace("<!-- /demo -->", ""), encoding="utf-8")
    assert "expected one pair of markers '<!-- demo -->'" in refused()


# The code


def make_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


@pytest.fixture
def job() -> dict[str, Any]:
    """What the README's code takes from the job it is put into."""
    torch.manual_seed(0)

    def loader(count: int) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(TensorDataset(torch.randn(count, 1, 8, 8), torch.arange(count) % 4), batch_size=8)

    sets = {"forget_loader": loader(12), "retain_loader": loader(24), "test_loader": loader(12)}
    return {
        "torch": torch,
        "model": make_model(),
        "make_model": make_model,
        "loss": nn.functional.cross_entropy,
        "epochs": 2,
        **sets,
    }


def test_the_training_loop_runs_and_keeps_to_its_mask(job: dict[str, Any]) -> None:
    loop = blocks("python")[0]
    assert len([line for line in loop.splitlines() if line]) <= 10
    model, called = job["model"], []
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    job["loss"] = lambda logits, targets: called.append(1) or nn.functional.cross_entropy(logits, targets)
    exec(loop, job)
    assert len(called) == job["epochs"] * len(job["retain_loader"])
    assert isinstance(job["optimizer"], torch.optim.AdamW)
    for name, chosen in job["mask"].to_dense().items():
        now = dict(model.named_parameters())[name].detach()
        assert torch.equal(now[~chosen], before[name][~chosen]), name
    changed = sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    assert 0.9 * job["mask"].selected < changed <= job["mask"].selected <= 0.3 * job["mask"].total


def test_the_other_python_blocks_run(job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 3
    exec(blocks("python")[1], {**job, "delfast": delfast})
    here = {**job, "delfast": delfast}
    exec(blocks("python")[2], here)
    examples = len(job["forget_loader"].dataset)
    assert here["leaning"]["0.weight"].shape == (examples, job["model"][0].weight.shape[0])
    assert len(here["needed"]) == examples and here["mask"].metadata["stop_when_stable"] == 0.99
    mask = delfast.Mask.load(tmp_path / "mask.safetensors")
    assert mask.to_dense()["4.weight"].all() and 0 < mask.fraction < 1  # the head, in full


# The commands


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of a network this small wait for one another more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_command_lines_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand in the README, but with one epoch."""
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("delfast ")]
    ran = []
    for line in lines:
        arguments = shlex.split(re.sub(r"--epochs \d+", "--epochs 1", line), comments=True)[1:]
        assert delfast_command(arguments) == 0, f"{line}\n{capsys.readouterr().err}"
        ran.append(arguments[0])
    assert ran == ["train", "oracle", "localize", "unlearn", "evaluate", "verify"]
    assert "kept to the mask" in capsys.readouterr().out


def test_every_command_that_it_names_exists() -> None:
    commands = named("delfast")
    assert {"doctor", "train", "verify"} <= commands
    for command in commands:
        assert delfast_command([command, "--help"]) == 0, command


def test_every_make_target_that_it_names_exists() -> None:
    targets = named("make")
    assert {"demo", "test", "bench"} <= targets
    assert targets <= set(
        re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )


def test_every_path_that_it_names_exists() -> None:
    table = TEXT.partition("## Where everything is")[2].partition("## ")[0]
    paths = [path for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for path in re.findall("`(.*?)`", row)]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert len(paths) > 10 and links
    assert [path for path in paths + links if not (ROOT / path).exists()] == []


def test_every_variable_that_it_names_is_read_somewhere() -> None:
    variables = set(re.findall(r"DELFAST_[A-Z]+(?:_[A-Z]+)*", TEXT))
    sources = [ROOT / "setup.py", *(ROOT / "delfast").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert variables and all(f'"{variable}"' in code for variable in variables)
