"""The README: its form, its figures, its code, and what it names."""

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
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import delfast
from benchmarks import tables
from delfast.cli import main as delfast_command
from delfast.files import read_json
from tests import ROOT

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PAGES = ("README", "BENCHMARKS", "RESULTS", "LANGUAGE_MODELS", "LEDGER_PAGE")
KEPT = ("CPU", "STEPS", "JOB", "MEMORY", "GPU", "DEMO", "SECTORS", "CIFAR10", "CAUSAL_LM", "LEDGER")


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def named(tool: str) -> set[str]:
    """Return the X of every `tool X` in the README's code, inline or in a block."""
    code = "\n".join([*blocks("sh"), *re.findall(r"`([^`\n]+)`", TEXT)])
    return set(re.findall(rf"^{tool} ([a-z][a-z-]*)", code, flags=re.MULTILINE))


# The form


def test_it_is_short() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 160


# The figures


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let benchmarks.tables work on copies of the pages, the figure and the kept results."""
    for name in (*PAGES, "FIGURE", *KEPT):
        source = getattr(tables, name)
        (tmp_path / source.name).write_bytes(source.read_bytes())
        monkeypatch.setattr(tables, name, tmp_path / source.name)
    return tmp_path


def test_the_tables_are_those_of_the_kept_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().err
    benchmarks, results = (page.read_text(encoding="utf-8") for page in (tables.BENCHMARKS, tables.RESULTS))
    kept = [read_json(path) for path in (tables.CPU, tables.STEPS, tables.JOB, tables.MEMORY)]
    for benchmark in (benchmark for result in kept for benchmark in result["benchmarks"]):
        assert benchmark["extra_info"]["measured"] in benchmarks and benchmark["extra_info"]["target"] in benchmarks
    assert read_json(tables.CPU)["machine_info"]["cpu"]["brand_raw"] in benchmarks
    for scenario in read_json(tables.DEMO)["scenarios"].values():
        for values in scenario["methods"].values():
            assert f"| {values['forget_acc']:.2f} | {values['retain_acc']:.2f} | {values['test_acc']:.2f} |" in results
    rows = list(csv.DictReader(tables.CIFAR10.open(encoding="utf-8")))
    for setting in {row["setting"] for row in rows}:
        oracles = [float(r["forget_acc"]) for r in rows if (r["setting"], r["method"]) == (setting, "oracle")]
        found = re.search(rf"\| {setting} \| oracle \| everything \| (\d+) \| ([\d.]+) ", results)
        assert found and int(found[1]) == len(oracles)
        assert abs(float(found[2]) - sum(oracles) / len(oracles)) < 0.0051


def test_the_readme_has_five_rows_of_speed_the_slower_ones_too() -> None:
    rows = re.search(r"<!-- speed -->\n(.*?)<!-- /speed -->", TEXT, flags=re.DOTALL)
    assert rows is not None
    lines = rows[1].splitlines()[2:]
    slower = [line for line in lines if "**slower:**" in line]
    assert len(lines) == 5 and len(slower) == 2
    assert all(float(re.search(r"([\d.]+) x the time", line)[1]) > 1 for line in slower)  # type: ignore[index]


def test_the_page_of_benchmarks_opens_with_its_answer_and_has_a_row_for_each_result() -> None:
    text = tables.BENCHMARKS.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[2] == "<!-- answer -->" and lines[8] == "<!-- /answer -->"
    heads = ("Faster on a CPU", "Slower on a CPU", "Faster on a GPU", "Slower on a GPU", "Not measured")
    for line, head in zip(lines[3:8], heads, strict=True):
        assert line.startswith(f"- **{head}"), line
        ratios = [float(number) for number in re.findall(r"([\d.]+) x ", line)]
        if head != "Not measured":
            assert len(ratios) >= 2 and all((ratio < 1) == (head == "Slower on a CPU") for ratio in ratios), line
    assert "<br>" not in text
    count = sum(len(read_json(path)["benchmarks"]) for path in (tables.CPU, tables.STEPS, tables.JOB, tables.MEMORY))
    blocks = re.findall(r"<!-- (?:measured|steps|job|memory) -->\n.*?\n\n(.*?)<!-- /", text, flags=re.DOTALL)
    assert sum(len(block.splitlines()) - 2 for block in blocks) == count


def test_the_figure_of_the_readme_begins_with_the_mislabelled_images(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    tables.draw(read_json(tables.DEMO), tables.FIGURE)
    first, second = drawn[0].axes
    drawn[0].draw_without_rendering()
    assert first.get_title() == "144 images with wrong labels" and second.get_title() == "144 images of two classes"
    assert first.get_position().width > 1.5 * second.get_position().width
    assert [label.get_text() for label in first.get_xticklabels()] == ["before", "delfast", "oracle\n(retrained)"]


def test_check_finds_a_changed_figure_and_writing_restores_it(copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = read_json(tables.CPU)["benchmarks"][0]["extra_info"]["measured"]
    before = {path: path.read_bytes() for path in copies.iterdir()}
    page = copies / "benchmarks.md"
    page.write_text(page.read_text(encoding="utf-8").replace(figure, "1000 x faster"), encoding="utf-8")
    (copies / "demo.png").unlink()
    changed = page.read_bytes()
    assert tables.main(["--check"]) == 1
    message = capsys.readouterr().err
    assert "benchmarks.md, demo.png differ" in message and "run `python -m benchmarks.tables`" in message
    assert page.read_bytes() == changed and not (copies / "demo.png").exists()  # a check writes nothing
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0
    assert {path: path.read_bytes() for path in before if path.suffix != ".png"} == {
        path: content for path, content in before.items() if path.suffix != ".png"
    }


NAMES = [getattr(tables, name).name for name in (*PAGES, *KEPT)]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(name: str, copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copies / name).unlink()
    before = {path: path.read_bytes() for path in copies.iterdir()}
    for arguments in ([], ["--check"]):
        assert tables.main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("tables: error: ") and name in lines[0]
    assert before == {path: path.read_bytes() for path in copies.iterdir()}


def test_unfit_results_and_lost_markers_are_refused(copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> str:
        assert tables.main([]) == 2
        return capsys.readouterr().err

    results, summary = read_json(copies / "cpu.json"), read_json(copies / "demo.json")
    failed = {**results["benchmarks"][0], "extra_info": {}}
    for benchmarks, message in (([failed], "no figure for"), ([], "no figure for test_")):
        (copies / "cpu.json").write_text(json.dumps({**results, "benchmarks": benchmarks}), encoding="utf-8")
        assert message in refused()
    (copies / "cpu.json").write_text(json.dumps(results), encoding="utf-8")
    steps = read_json(copies / "steps.json")
    for benchmarks, message in (([failed], "has no figure for test_"), ([], "holds no benchmark")):
        (copies / "steps.json").write_text(json.dumps({**steps, "benchmarks": benchmarks}), encoding="utf-8")
        assert message in refused()
    (copies / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    (copies / "demo.json").write_text(json.dumps({**summary, "quick": True}), encoding="utf-8")
    assert "delfast demo --quick" in refused()
    (copies / "demo.json").write_text(json.dumps(summary), encoding="utf-8")
    card = read_json(copies / "gpu.json")
    for changes, message in (({"failures": ["masked AdamW: off"]}, "is of a run that failed"), ({"results": []}, "no")):
        (copies / "gpu.json").write_text(json.dumps({**card, **changes}), encoding="utf-8")
        assert message in refused()
    (copies / "gpu.json").write_text(json.dumps(card), encoding="utf-8")
    report = (copies / "sectors.md").read_text(encoding="utf-8")
    (copies / "sectors.md").write_text(report.replace("| apart, SGD", "| elsewhere, SGD"), encoding="utf-8")
    assert tables.main([]) == 0  # there is still a figure of each kind
    (copies / "sectors.md").write_text(report.replace("| apart", "| elsewhere"), encoding="utf-8")
    assert "has no figure for criticality" in refused()
    (copies / "sectors.md").write_text(report, encoding="utf-8")
    rows = (copies / "results.csv").read_text(encoding="utf-8")
    (copies / "results.csv").write_text(rows.splitlines()[0] + "\n", encoding="utf-8")
    assert "holds no results" in refused()
    (copies / "results.csv").write_text(rows, encoding="utf-8")
    (copies / "README.md").write_text(TEXT.replace("<!-- /speed -->", ""), encoding="utf-8")
    assert "expected one pair of markers '<!-- speed -->'" in refused()


# The code


def make_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


@pytest.fixture
def job() -> dict[str, Any]:
    """Return what the README's code takes from the job that it is put into."""
    torch.manual_seed(0)

    def data_set(count: int) -> TensorDataset:
        return TensorDataset(torch.randn(count, 1, 8, 8), torch.arange(count) % 4)

    return {
        "model": make_model(),
        "make_model": make_model,
        "forget_set": data_set(12),
        "retain_set": data_set(24),
        "test_set": data_set(12),
    }


def test_the_first_block_runs_as_pasted(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in job["model"].named_parameters()}
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(code, job)
    assert re.fullmatch(r"accuracy on the forget set: [\d.]+ % before, [\d.]+ % after\n", capsys.readouterr().out)
    mask = delfast.Mask.load(tmp_path / "mask.safetensors")
    assert mask.to_dense()["4.weight"].all() and 0 < mask.fraction < 1  # the head, in full
    _assert_kept_to(mask, before, torch.load(tmp_path / "unlearned.pt"))


def test_the_training_loop_runs_and_keeps_to_its_mask(job: dict[str, Any]) -> None:
    loop = blocks("python")[1]
    assert len(blocks("python")) == 2
    job |= {"forget": DataLoader(job["forget_set"], 8), "retain": DataLoader(job["retain_set"], 8)}
    before = {name: parameter.detach().clone() for name, parameter in job["model"].named_parameters()}
    exec(loop, job)
    assert isinstance(job["optimizer"], torch.optim.AdamW)
    assert job["mask"].selected <= 0.3 * job["mask"].total
    _assert_kept_to(job["mask"], before, job["model"].state_dict())


def _assert_kept_to(mask: delfast.Mask, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Nothing outside the mask changed, and most of what is inside did."""
    for name, chosen in mask.to_dense().items():
        assert torch.equal(after[name][~chosen], before[name][~chosen]), name
    changed = sum(int((after[name] != value).sum()) for name, value in before.items())
    assert 0.9 * mask.selected < changed <= mask.selected


# The commands


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: those of a network this small wait for one another more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_command_lines_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the commands of docs/experiments.md as they stand there, except that every training takes one epoch."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
    lines = [line for block in blocks("sh", page) for line in block.splitlines() if line.startswith("delfast ")]
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
    assert {"demo", "test", "check"} <= targets
    assert targets <= set(
        re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )


PAGES_WITH_LINKS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


@pytest.mark.parametrize("page", PAGES_WITH_LINKS, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_variable_that_the_docs_name_is_read_somewhere() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES_WITH_LINKS)
    variables = set(re.findall(r"DELFAST_[A-Z]+(?:_[A-Z]+)*", pages))
    suffixes = {".py", ".cpp", ".txt", ".cmake"}
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "delfast").rglob("*"), *(ROOT / "csrc").rglob("*")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.suffix in suffixes)
    assert len(variables) >= 5 and [name for name in variables if name not in code] == []
