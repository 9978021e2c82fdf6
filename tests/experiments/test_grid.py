"""``delfast compare``: what a grid means, that nothing is run twice, and what the report holds."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from delfast.cli import main
from delfast.errors import InputError
from delfast.evaluation import logit_confidences, predictions, u_lira_leave_one_out
from delfast.experiments.data import Pictures
from delfast.experiments.datasets import pictures
from delfast.experiments.grid import HTML, MARKDOWN, RESULTS, cells
from delfast.experiments.grid.definition import read_grid
from delfast.experiments.grid.figures import STYLES, _bars
from delfast.experiments.grid.summary import _times, mean
from delfast.experiments.reports import markdown_table
from delfast.experiments.reports.pages import own_script
from delfast.experiments.run import commit, load_model, read_summary
from delfast.localization import STRATEGIES
from delfast.unlearning import METHODS
from tests import ROOT, cases
from tests.experiments.grids import HEAD, TINY, images_of, measured, write


def run(grid: Path, output_dir: Path) -> None:
    assert main(["compare", str(grid), "--output-dir", str(output_dir), "--workers", "1"]) == 0


# ---- the grid


def test_a_grid_is_a_product_and_each_cell_is_there_once(tmp_path: Path) -> None:
    grid = read_grid(write(tmp_path, TINY + '[[compare]]\nstrategies = ["del"]\nbudgets = [0.3]\n'))
    assert grid.title == "tiny" and len(grid.cells) == len({cell.key for cell in grid.cells}) == 2 * (6 + 3 + 2)
    assert len(grid.trained) == 4  # an original and an oracle of each seed
    budgets = {(c.method.name, c.strategy, c.budget) for c in grid.cells if c.method.name == "finetune"}
    assert budgets == {("finetune", "everything", None), ("finetune", "del", 0.3), ("finetune", "salloc", 0.3)}
    retrain = next(cell.method for cell in grid.cells if cell.method.name == "retrain")
    assert (retrain.epochs, retrain.lr) == (1, 0.02)  # as the original was trained
    assert {cell.method.epochs for cell in grid.cells if cell.method.name == "ssd"} == {0}


def test_hyperparameters_and_strategies_of_ones_own(tmp_path: Path) -> None:
    text = HEAD + '[methods.scrub]\nalpha = 0.5\nbatch_size = 32\n[strategies.del-h1]\ncriterion = "grad"\ntop_h = 1\n'
    grid = read_grid(write(tmp_path, text + '[[compare]]\nmethods = ["scrub"]\nstrategies = ["del-h1"]\n'))
    cell = grid.cells[0]
    assert (cell.method.alpha, cell.method.epochs, cell.batch_size) == (0.5, 1, 32)  # type: ignore[attr-defined]
    assert cell.localize == {"criterion": "grad", "top_h": 1}
    changed = read_grid(
        write(tmp_path, text.replace("0.5", "0.6") + '[[compare]]\nmethods=["scrub"]\nstrategies=["del-h1"]')
    )
    assert changed.cells[0].key != cell.key and changed.trained == grid.trained


def test_a_variant_of_a_method_stands_beside_it(tmp_path: Path) -> None:
    text = HEAD + '[methods.del-fast]\nof = "del"\nlr = 0.5\n[[compare]]\nmethods = ["del", "del-fast"]\n'
    plain, fast = (cell for cell in read_grid(write(tmp_path, text)).cells if cell.config.seed == 0)
    assert (plain.label, fast.label) == ("del", "del-fast") and fast.method == replace(plain.method, lr=0.5)
    assert plain.key != fast.key


@pytest.mark.parametrize(
    "text, message",
    [
        (HEAD + "[methods.own]\nof = 'magic'\n[[compare]]", "or of = one; got 'own'"),
        (HEAD + "[methods.oracle]\nof = 'del'\n[[compare]]", "has the name of something else"),
        (HEAD + "[methods.own]\nof = 'del'\n[[compare]]\nmethods=['del', 'own']", "'del' and 'own' are the same"),
        ("title = ", "cannot read"),
        ("[settings.a]\nforget = 'iid'", "one is missing"),
        (HEAD + "[[compare]]\nmethods = ['magic']", "expected method to be one of"),
        (HEAD + "[[compare]]\nstrategies = ['magic']", "expected strategies among"),
        (HEAD + "[[compare]]\nbudgets = [0.0]", "budget in (0, 1]"),
        (HEAD + "[[compare]]\nsettings = ['other']", "names the setting 'other', there is non-iid"),
        (HEAD + "[[compare]]\nmethod = ['del']", "unknown key 'method'"),
        (HEAD + "[[compare]]\nstrategies = ['everything']", "lists 'del' without a mask"),
        (HEAD + "[[compare]]\nmethods = ['retrain']", "pairs 'retrain' with 'del'"),
        (HEAD + "[methods.magic]\nlr = 1.0\n[[compare]]", "expected [methods.NAME] to name one of"),
        (
            HEAD + "[methods.del]\nalpha = 1.0\n[[compare]]",
            "[methods.del] has the unknown key 'alpha'; expected epochs",
        ),
        (HEAD + "[strategies.own]\ntop = 1\n[[compare]]\nstrategies = ['own']", "strategy 'own'"),
        (HEAD.replace("seeds", "shadows = 1\nseeds") + "[[compare]]", "expected shadows of at least 2"),
        (HEAD.replace("seeds", "shadows = -10\nseeds") + "[[compare]]", "expected shadows of at least 2"),
        (
            HEAD.replace("[unlearn]\nepochs", "[unlearn]\nepoch") + "[[compare]]",
            "[unlearn] has the unknown key 'epoch'",
        ),
        (HEAD.replace("[0, 1]", "3") + "[[compare]]", "to be a list, each a whole number, got 3"),
        (HEAD + "[compare]", "to be a list, each a table, got {}"),
        (HEAD + "[[compare]]\nmethods = 'del'", "expected methods of [[compare]] to be a list, each a text, got 'del'"),
        (HEAD + "[strategies]\nown = 1\n[[compare]]", "expected own of [strategies] to be a table, got 1"),
        (
            HEAD.replace("lr = 0.02", "lr = 'low'") + "[[compare]]",
            "expected lr of [train] and [settings.NAME] to be a number, got 'low'",
        ),
        (HEAD.replace('"digits"', "3") + "[[compare]]", "to be a text, got 3"),
        (HEAD.replace("[unlearn]\nepochs = 1", "[unlearn]\nepochs = 1.5") + "[[compare]]", "a whole number, got 1.5"),
        (HEAD + "[strategies.del]\nper_example = true\n[[compare]]", "[strategies.del] has the name of something else"),
        (HEAD + "[strategies.everything]\n[[compare]]", "[strategies.everything] has the name of something else"),
        (HEAD + "[strategies.'3/4']\n[[compare]]", "letters, digits and . + - _, got '3/4'; rename it"),
        (HEAD.replace("non-iid]", "'non iid']") + "[[compare]]", "expected names of [settings] of letters"),
        (HEAD.replace("[0, 1]", "[]") + "[[compare]]", "to be a list, each a whole number, got []"),
        (HEAD + "[methods.del]\nlr = 'low'\n[[compare]]", "expected lr of [methods.del] to be a number, got 'low'"),
        (HEAD.replace("forget =", "forgets =") + "[[compare]]", "unknown key 'forgets'"),
        (HEAD.replace('forget = "non-iid:2,5"', "epochs = 2") + "[[compare]]", "to have forget ="),
        (HEAD.replace("epochs = 1\nlr", "epochs = 0\nlr") + "[[compare]]", "at least 1 epoch"),
    ],
)
def test_a_bad_grid_is_refused_in_one_line(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    path, output_dir = write(tmp_path, text), tmp_path / "out"
    assert main(["compare", str(path), "--output-dir", str(output_dir)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("delfast: error: ") and not output_dir.exists()


GRIDS = [path for name in ("small", "paper") for path in sorted((ROOT / "experiments" / name).glob("*.toml"))]


@pytest.mark.parametrize("path", GRIDS, ids=str)
def test_the_grids_that_ship_can_be_read(path: Path, tmp_path: Path) -> None:
    folder = 'data = "folder:' in path.read_text(encoding="utf-8")  # the user's
    if folder:
        for part in ("train", "test"):
            (tmp_path / part).mkdir()
    assert read_grid(path, f"folder:{tmp_path}" if folder else None).cells


def test_the_small_grid_has_every_method_and_every_strategy() -> None:
    cells = read_grid(ROOT / "experiments/small/digits.toml").cells
    assert {cell.method.name for cell in cells if cell.strategy == "del"} == METHODS.keys() - {"retrain"}
    assert {cell.strategy for cell in cells if cell.method.name == "del"} == STRATEGIES.keys()


# ---- the run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compare")
    run(write(directory, TINY), directory / "out")
    return directory


def test_a_killed_run_goes_on_where_it_was_and_ends_the_same(finished: Path, tmp_path: Path) -> None:
    grid, output_dir = finished / "grid.toml", tmp_path / "out"
    command = [sys.executable, "-m", "delfast", "compare", str(grid), "--output-dir", str(output_dir), "--workers", "1"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + cases.PATIENCE
    while len(list(output_dir.glob("cells/*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*.json") if ".partial" not in path.name}
    assert len(kept) >= 3 and not (output_dir / RESULTS).exists()
    run(grid, output_dir)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # none was run again
    assert measured(output_dir) == measured(finished / "out")


def test_a_second_run_computes_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("out/*/*")}
    text = (finished / "out" / RESULTS).read_text(encoding="utf-8")
    run(finished / "grid.toml", finished / "out")
    assert text == (finished / "out" / RESULTS).read_text(encoding="utf-8")
    after = {path: path.stat().st_mtime_ns for path in finished.glob("out/*/*")}
    assert {path for path in before if after[path] != before[path]} <= set(finished.glob("out/figures/*"))


def test_rows_are_of_networks_and_cells_with_gaps_to_their_own_oracle(finished: Path) -> None:
    rows = measured(finished / "out")
    assert len(rows) == 4 + 22
    oracles = {row["seed"]: row for row in rows if row["method"] == "oracle"}
    for row in rows:
        oracle = oracles[row["seed"]]
        assert float(row["delta_forget"]) == float(oracle["forget_acc"]) - float(row["forget_acc"])
        assert 0 < float(row["changeable"]) <= 100


def test_a_cell_that_diverges_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    text = HEAD.replace("seeds = [0, 1]", "seeds = [0]") + "[methods.finetune]\nlr = 1e30\n"
    text += '[[compare]]\nmethods = ["finetune", "ssd"]\nstrategies = ["everything"]\n'
    run(write(tmp_path, text), tmp_path / "out")
    assert [row["method"] for row in measured(tmp_path / "out")] == ["original", "oracle", "ssd"]
    markdown = (tmp_path / "out" / MARKDOWN).read_text(encoding="utf-8")
    assert "## Failed" in markdown and "| finetune | everything |  | the loss of epoch 1 is nan" in markdown


def test_shadows_give_u_lira(tmp_path: Path) -> None:
    text = HEAD.replace("seeds = [0, 1]", "seeds = [0]\nshadows = 2") + '[[compare]]\nstrategies = ["random"]\n'
    path, out = write(tmp_path, text), tmp_path / "out"
    grid = read_grid(path)
    assert len(grid.trained) == 6
    run(path, out)
    rows = measured(out)
    assert [row["method"] for row in rows] == ["original", "oracle", "del"]
    assert "U-LiRA" in (out / MARKDOWN).read_text(encoding="utf-8")

    (cell,) = grid.cells
    setting = cells._run(cell.config, "cpu")
    masks, unlearned, retrained = set(), [], []
    for shadow in range(3):
        model = load_model(setting, out / "networks" / cell.original(shadow).key)
        masks.add(cells._unlearn(setting, cell, model, shadow)[0].mask.digest)
        oracle = load_model(setting, out / "networks" / cell.oracle(shadow).key)
        for network, found in ((model, unlearned), (oracle, retrained)):
            found.append(logit_confidences(*predictions(network, setting.sets()["forget"])))
    assert len(masks) == 3 and not torch.equal(unlearned[0], unlearned[1])  # a shadow's seeds are its own
    expected = u_lira_leave_one_out(torch.stack(unlearned), torch.stack(retrained), fixed_variance=True)
    assert float(rows[2]["u_lira"]) == expected.accuracy


def test_what_is_not_the_cells_fault_ends_the_run(finished: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    arguments = ["compare", str(finished / "grid.toml"), "--output-dir", str(out), "--workers", "1"]
    (missing,) = (out / "cells").glob("non-iid-1-ssd-*")
    missing.unlink()
    (network,) = (out / "networks").glob("non-iid-1-original-*")
    state = (network / "model.safetensors").read_bytes()
    (network / "model.safetensors").write_bytes(state[:-4] + b"\0\0\0\1")
    assert main(arguments) == 2 and "is not the network of" in capsys.readouterr().err.splitlines()[-1]
    assert not missing.exists()  # it is no cell that failed


def test_a_cell_measured_with_another_oracle_is_refused(finished: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    oracles = sorted((out / "networks").glob("*-oracle-*"))
    shutil.copyfile(oracles[0] / "summary.json", oracles[1] / "summary.json")
    assert main(["compare", str(finished / "grid.toml"), "--output-dir", str(out), "--report-only"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was not measured with the oracle that is there; delete it to run it again" in error


def replaced_everywhere(directory: Path, old: str, new: str) -> None:
    for path in directory.rglob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def test_a_network_that_comes_out_another_does_not_replace_the_old_one(
    finished: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    (missing,) = (out / "cells").glob("non-iid-1-ssd-*")
    missing.unlink()
    (network,) = (out / "networks").glob("non-iid-1-original-*")
    replaced_everywhere(out, read_summary(network)["digests"]["model"], "0" * 64)  # as if by another machine
    (network / "model.safetensors").unlink()
    kept = {path.name: path.read_bytes() for path in network.iterdir()}
    assert main(["compare", str(finished / "grid.toml"), "--output-dir", str(out), "--workers", "1"]) == 2
    assert "trained again, to be the network it was, it is not" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in network.iterdir()} == kept and not missing.exists()


def test_run_times_of_other_machines_are_not_compared(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    (oracle,) = (out / "networks").glob("non-iid-1-oracle-*")
    replaced_everywhere(oracle, '"isa": ', '"isa": "other", "isa_of_this": ')
    assert main(["compare", str(finished / "grid.toml"), "--output-dir", str(out), "--report-only"]) == 0
    with open(out / RESULTS, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        alone = row["seed"] == "1" and row["method"] != "oracle"
        assert (row["relative_time"] == "") == alone, row


def test_networks_of_other_data_are_refused(finished: Path) -> None:
    cell = read_grid(finished / "grid.toml").cells[0]
    setting = cells._run(cell.config, "cpu")
    images = setting.data.images
    other = replace(setting, data=Pictures(replace(images, train_images=images.train_images.flip(0))))
    with pytest.raises(InputError, match="was made with other data than 'digits' holds now; restore them"):
        load_model(other, finished / "out" / "networks" / cell.original().key)


# ---- the report


def test_networks_that_no_cell_waits_for_may_be_deleted(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    for network in (tmp_path / "out" / "networks").iterdir():
        (network / "model.safetensors").unlink()
    run(finished / "grid.toml", tmp_path / "out")
    assert measured(tmp_path / "out") == measured(finished / "out")
    assert not list((tmp_path / "out" / "networks").rglob("model.safetensors"))
    next((tmp_path / "out" / "cells").glob("non-iid-1-ssd-*")).unlink()  # it needs seed 1's
    run(finished / "grid.toml", tmp_path / "out")
    assert measured(tmp_path / "out") == measured(finished / "out")
    assert len(list((tmp_path / "out" / "networks").rglob("model.safetensors"))) == 2


def test_a_report_of_what_is_finished_runs_nothing(finished: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(finished / "out", tmp_path / "some")
    cells = sorted((tmp_path / "some" / "cells").iterdir())
    for cell in cells[1:]:
        cell.unlink()
    arguments = ["compare", str(write(tmp_path, TINY)), "--output-dir", str(tmp_path / "some"), "--report-only"]
    assert main(arguments) == 0 and len(list((tmp_path / "some" / "cells").iterdir())) == 1
    assert len(measured(tmp_path / "some")) == 3  # the cell, and the original and the oracle of its seed
    report = (tmp_path / "some" / MARKDOWN).read_text()
    assert f"1 of {len(cells)} cells" in report and "| del, 0.1 | 1 |" in report and "Table" not in report
    for summary in (tmp_path / "some" / "networks").rglob("summary.json"):
        summary.unlink()
    assert main(arguments) == 2 and "to hold summary.json and membership.json" in capsys.readouterr().err
    cells[0].unlink()
    assert main(arguments) == 2 and "hold finished cells" in capsys.readouterr().err


def test_the_kept_results_give_the_report_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the README beside the results, as it stands there, in a copy of the repository's experiments."""
    kept = Path("experiments/results/cifar10-small")
    shutil.copytree(ROOT / kept, tmp_path / kept)
    shutil.copytree(ROOT / "experiments/small", tmp_path / "experiments/small")
    for name in (RESULTS, MARKDOWN):
        (tmp_path / kept / name).unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "_path", lambda _: tmp_path / "absent")  # a report reads no images
    text = (kept / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^delfast (compare .* --report-only)$", text, re.MULTILINE)
    assert main(command.split()) == 0
    for name in (RESULTS, MARKDOWN):
        assert (kept / name).read_text(encoding="utf-8") == (ROOT / kept / name).read_text(encoding="utf-8")


def test_kept_records_name_no_path_of_the_machine_that_made_them() -> None:
    for path in (ROOT / "experiments" / "results").rglob("*.jsonl"):
        assert not re.search(r'"(folder|job):[^"]|"/|/home/|/tmp/', path.read_text(encoding="utf-8")), path


# ---- the paths of the data


def test_the_same_images_at_another_path_are_the_same_data(tmp_path: Path, capsys: Any) -> None:
    text = HEAD.replace("seeds = [0, 1]", "seeds = [0]").replace("train_examples = 300\ntest_examples = 100\n", "")
    text = text.replace("non-iid:2,5", "iid") + '[[compare]]\nmethods = ["finetune"]\nstrategies = ["everything"]\n'
    grid, out, kept = write(tmp_path, text), tmp_path / "out", tmp_path / "kept"
    first, moved, other = images_of(tmp_path / "a", 1), images_of(tmp_path / "b", 1), images_of(tmp_path / "c", 2)

    def compare(data: str, directory: Path, *options: str) -> int:
        places = ["--data", data, "--output-dir", str(directory)]
        return main(["compare", str(grid), *places, "--workers", "1", *options])

    assert compare(first, out) == 0
    rows, written = measured(out), {path: path.stat().st_mtime_ns for path in out.glob("cells/*")}
    assert compare(moved, out) == 0 and measured(out) == rows
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*")} == written  # nothing ran
    assert compare("folder:absent", out, "--report-only", "--pack", str(kept)) == 0 and measured(kept) == rows
    assert str(tmp_path) not in (kept / "networks.jsonl").read_text(encoding="utf-8")
    assert compare(moved, kept) == 0 and measured(kept) == rows
    capsys.readouterr()
    for directory in (out, kept):
        assert compare(other, directory) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "c' to hold the data that" in error and "it holds others; pass the same data" in error
        assert measured(directory) == rows
        assert compare(other, directory, "--report-only") == 2
        assert capsys.readouterr().err.splitlines()[-1] == error
        assert compare(moved, directory, "--report-only") == 0
    images_of(tmp_path / "a", 2)  # the path of the run, with other images
    capsys.readouterr()
    for options in ([], ["--report-only"]):
        assert compare(first, out, *options) == 2
        assert "a' to hold the data that" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "lr, options, message",
    [
        ("0.02", ["--data", "folder:x"], "it holds 22 cells of the data 'digits', the grid has 'folder:"),
        ("0.03", [], "it holds 22 cells of other settings; restore the grid as it was run, or run it"),
    ],
)
def test_a_report_of_no_cell_names_why(
    finished: Path, tmp_path: Path, lr: str, options: list[str], message: str, capsys: Any
) -> None:
    text = TINY.replace("lr = 0.02", f"lr = {lr}")
    for directory in (finished / "out", packed(finished, tmp_path / "kept")):
        command = ["compare", str(write(tmp_path, text)), "--output-dir", str(directory), "--report-only", *options]
        assert main(command) == 2 and message in capsys.readouterr().err.splitlines()[-1]


def packed(finished: Path, target: Path) -> Path:
    """The results of the finished grid, packed by a report."""
    command = ["compare", str(finished / "grid.toml"), "--output-dir", str(finished / "out"), "--report-only"]
    assert main([*command, "--pack", str(target)]) == 0
    return target


def test_packed_results_give_the_same_report(finished: Path, tmp_path: Path) -> None:
    kept = packed(finished, tmp_path / "kept")
    expected = {name: (kept / name).read_bytes() for name in (RESULTS, MARKDOWN)}
    assert expected == {name: (finished / "out" / name).read_bytes() for name in expected}
    names = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    figures = {f"figures/{path.name}" for path in (finished / "out" / "figures").iterdir()}
    assert names == {*expected, *figures, "cells.jsonl", "networks.jsonl"}
    for name in expected:
        (kept / name).unlink()
    assert main(["compare", str(finished / "grid.toml"), "--output-dir", str(kept), "--report-only"]) == 0
    assert expected == {name: (kept / name).read_bytes() for name in expected}
    assert not (kept / "cells").exists() and not (kept / "networks").exists()


def test_a_run_continues_from_packed_results(finished: Path, tmp_path: Path) -> None:
    kept = packed(finished, tmp_path / "kept")
    run(finished / "grid.toml", kept)
    assert measured(kept) == measured(finished / "out")
    assert not [*kept.glob("cells/*"), *kept.glob("networks/*")]  # nothing was computed
    lines = (kept / "cells.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (kept / "cells.jsonl").write_text("".join(line for line in lines if '"non-iid-1-ssd-' not in line[:40]))
    shutil.copytree(finished / "out" / "networks", kept / "networks", dirs_exist_ok=True)
    run(finished / "grid.toml", kept)
    own = [path.name for path in (kept / "cells").iterdir()]
    assert len(own) == 1 and own[0].startswith("non-iid-1-ssd-")
    assert measured(kept) == measured(finished / "out")


def test_a_file_of_ones_own_is_read_before_the_packed_record(finished: Path, tmp_path: Path, capsys: Any) -> None:
    kept = packed(finished, tmp_path / "kept")
    before, cell = measured(kept), next((finished / "out" / "cells").glob("non-iid-1-ssd-*"))
    report = ["compare", str(finished / "grid.toml"), "--output-dir", str(kept), "--report-only"]
    (kept / "cells").mkdir()
    record = json.loads(cell.read_text(encoding="utf-8"))
    record["metrics"]["forget_acc"] = 12.5
    (kept / "cells" / cell.name).write_text(json.dumps(record), encoding="utf-8")
    assert main(report) == 0
    changed = [(old, new) for old, new in zip(before, measured(kept), strict=True) if old != new]
    assert [(new["method"], new["seed"], new["forget_acc"]) for _, new in changed] == [("ssd", "1", "12.5")]
    again = [*report[:3], str(finished / "out"), "--report-only", "--pack", str(kept)]
    content = (kept / "cells.jsonl").read_bytes()
    assert main(again) == 2  # the file would be read instead of its new line
    assert "kept/cells' holds the results of a run" in capsys.readouterr().err
    (kept / "cells" / cell.name).unlink()
    (kept / "figures" / "old.png").write_bytes(b"")
    (finished / "out" / "figures" / "of another grid.png").write_bytes(b"")
    assert main(again) == 0 and (kept / "cells.jsonl").read_bytes() == content and measured(kept) == before
    (finished / "out" / "figures" / "of another grid.png").unlink()
    assert not (kept / "figures" / "of another grid.png").exists()
    assert main([*again[:-1], str(finished / "out")]) == 2
    assert "choose another --pack" in capsys.readouterr().err
    assert main(report) == 0
    lines = content.decode().replace('"oracle": "', '"oracle": "0', 1)
    (kept / "cells.jsonl").write_text(lines, encoding="utf-8")
    key = json.loads(lines.splitlines()[0])["key"]
    assert main(report) == 2
    assert f"the line '{key}' of '{kept}/cells.jsonl' was not measured with the oracle" in capsys.readouterr().err


def test_a_directory_that_cannot_be_packed_into_is_named_after_the_run(
    finished: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    command = ["compare", str(finished / "grid.toml"), "--output-dir", str(finished / "out"), "--report-only"]
    assert main([*command, "--pack", str(tmp_path / "file" / "kept")]) == 2
    assert "choose another --pack" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1]", "expected line 1 of .* to be a table with a 'key'; restore the file"),
        ('{"cell": {}}', "to be a table with a 'key'"),
        ('{"key": "../x", "cell": {}}', "to be a table with a 'key'"),
        ("{", "cells.jsonl' as JSON"),
    ],
)
def test_damaged_packed_results_are_refused(
    line: str, message: str, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "cells.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert main(["compare", str(finished / "grid.toml"), "--output-dir", str(tmp_path), "--report-only"]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["cells.jsonl"]


def test_rows_have_the_versions_and_the_machine_that_computed_them(finished: Path) -> None:
    summary = read_summary(next((finished / "out" / "networks").glob("*-oracle-*")))
    backend = summary["provenance"]["backend"]
    expected = {"delfast": backend["delfast"], "torch": torch.__version__, "commit": commit() or ""}
    expected |= {"platform": summary["provenance"]["platform"], "kernels": backend["isa"] or ""}
    for row in measured(finished / "out"):
        assert expected.items() <= row.items() and int(row["threads"]) >= 1


def test_the_keys_of_cells_are_those_of_files_that_exist(tmp_path: Path) -> None:
    text = HEAD + '[[compare]]\nstrategies = ["del", "weighted-grad-all"]\nbudgets = [0.1]\n'
    keys = [cell.key for cell in read_grid(write(tmp_path, text)).cells if cell.config.seed == 0]
    assert keys == ["non-iid-0-del-del-0.1-9251bec2eb", "non-iid-0-del-weighted-grad-all-0.1-ce4d677465"]


def test_times_are_compared_where_the_machine_is_the_same() -> None:
    backend = {"threads": 1, "isa": "avx2", "cuda": "not built"}
    origin = {"device": "cpu", "platform": "P", "torch": "2", "delfast": "0", "backend": backend}
    oracle = {"seconds": {"train": 4.0}, "provenance": origin}

    def row(**changes: Any) -> dict[str, Any]:
        own = {**origin, "backend": backend | {k: v for k, v in changes.items() if k in backend}}
        own |= {k: v for k, v in changes.items() if k not in backend}
        return _times({"seconds": {"localize": 0.5, "finetune": 0.5}, "provenance": own}, oracle)

    assert row()["relative_time"] == row(cuda="built, no device")["relative_time"] == 0.25  # no GPU took part
    for change in ({"device": "cuda"}, {"torch": "3"}, {"threads": 2}, {"isa": "amx"}):
        assert "relative_time" not in row(**change) and row(**change)["seconds"] == 1.0


def test_the_figures_show_no_interval_of_one_seed_and_cut_others_at_100() -> None:
    below, above = _bars([mean([90.0, 100.0]), mean([5.0])], least=0)
    assert (below[0], above[0]) == (pytest.approx(12.706 * 5, rel=1e-4), 5.0)
    assert math.isnan(below[1]) and math.isnan(above[1])
    assert len(set(STYLES)) == len(STYLES) >= len(STRATEGIES) + 4  # those of the grids, told apart


def test_a_bar_in_a_name_does_not_end_a_cell_of_markdown() -> None:
    assert markdown_table(["", "a|b"], [["x", "1|2"]]).splitlines()[0::2] == ["|  | a\\|b |", "| x | 1\\|2 |"]


def test_means_have_students_intervals() -> None:
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2.0 and math.isclose(found.half, 4.302653 / math.sqrt(3), rel_tol=1e-6)  # t(0.975, 2)
    assert str(mean([2.0])) == "2.00" and str(found) == "2.00 ± 2.48"


def test_the_report_has_tables_and_figures_and_asks_the_network_for_nothing(finished: Path) -> None:
    out = finished / "out"
    markdown = (out / MARKDOWN).read_text(encoding="utf-8")
    for title in (
        "Table 1",
        "Table 2: methods",
        "Table 3: random",
        "Figure 2",
        "Figure 3",
        "Wall-clock of every stage",
        "| finetune, del mask |",
        "22 cells of grid.toml, by delfast ",
    ):
        assert title in markdown
    attacked = markdown.split("Membership inference")[1]
    assert "| original | everything |" in attacked and "| oracle | everything |" in attacked

    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []
            self.ids: list[str] = []
            self.open_tags: list[str] = []

        def handle_starttag(self, tag: str, attributes: Any) -> None:
            links = ("src", "href", "xlink:href", "action", "data", "srcset")
            self.found += [value for name, value in attributes if name in links]
            self.ids += [value for name, value in attributes if name == "id"]
            if tag not in ("meta", "link", "img"):
                self.open_tags.append(tag)
            assert tag not in ("script", "iframe", "object")

        def handle_startendtag(self, tag: str, attributes: Any) -> None:
            self.handle_starttag(tag, attributes)
            self.handle_endtag(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    page = (out / HTML).read_text(encoding="utf-8")
    links = Links()
    assert page.count(own_script()) == 1
    links.feed(page.replace(own_script(), ""))
    assert links.open_tags == [] and "@import" not in page and "http://" not in page and "https://" not in page
    inside = [link.removeprefix("#") for link in links.found if link.startswith("#")]
    inside += re.findall(r"url\(#([^)]*)\)", page)  # clips of the drawings
    assert set(inside) <= set(links.ids) and len(links.ids) == len(set(links.ids))
    assert page.count("url(") == page.count("url(#") and page.count("<svg") == 3  # the answer, and two of the paper
    assert all(link.startswith(("#", "data:,", "data:text/csv;base64,")) for link in links.found)
    for figure in ("non-iid-answer.png", "non-iid-budgets.png", "non-iid-methods.png"):
        assert (out / "figures" / figure).read_bytes().startswith(b"\x89PNG")
        assert f"figures/{figure}" in markdown


def test_more_examples_than_there_are_are_refused(tmp_path: Path, capsys: Any) -> None:
    grid = write(tmp_path, TINY.replace("train_examples = 300", "train_examples = 3000"))
    assert main(["compare", str(grid), "--output-dir", str(tmp_path / "out")]) == 2
    assert "expected at most 1437 train_examples of 'digits', got 3000" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path, capsys: Any) -> None:
    grid = str(write(tmp_path, TINY))
    assert main(["compare", grid, "--output-dir", str(tmp_path / "out"), "--device", "cuda:99"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "expected a device auto, cpu or cuda that this machine has, got 'cuda:99'" in lines[0]
    assert not (tmp_path / "out").exists()


def test_an_unknown_grid_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a TOML file"):
        read_grid(tmp_path / "none.toml")
