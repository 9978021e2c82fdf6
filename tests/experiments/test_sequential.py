"""Sequential requests: definitions, disjoint forget sets, runs that go on where they were stopped, and the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from delfast.cli import main
from delfast.errors import InputError
from delfast.experiments.sequential import report
from delfast.experiments.sequential.cells import run_definition
from delfast.experiments.sequential.definition import read_definition
from delfast.experiments.sequential.stream import Stream
from tests.experiments.grids import images_of

DEFINITIONS = sorted((Path(__file__).parents[2] / "experiments/sequential").glob("*.toml"))
TINY = """
title = "tiny"
[train]
data = "digits"
model = "cnn"
epochs = 1
lr = 0.05
train_examples = 200
test_examples = 60
[[requests]]
forget = "mislabelled"
share = 0.05
[[requests]]
forget = "non-iid:3"
share = 0.02
[[requests]]
forget = "iid"
share = 0.05
[unlearn]
epochs = 1
[relearning]
steps = 2
fractions = [0.1]
[sequences.del-all]
method = "del"
localize_on = "all"
[sequences.retrain]
"""


def write(directory: Path, text: str = TINY) -> Path:
    path = directory / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


def stream(path: Path) -> Stream:
    definition = read_definition(path)
    return Stream.load(definition.configs[0], definition.requests, torch.device("cpu"))


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.stem)
def test_the_definitions_that_ship_have_ten_requests_and_the_methods(path: Path) -> None:
    definition = read_definition(path, data_is_read=False)
    assert len(definition.requests) == 10
    assert all(0.005 <= request.share <= 0.02 for request in definition.requests)
    names = [sequence.name for sequence in definition.sequences]
    assert names == ["del-new", "del-all", "finetune", "salun", "neggrad+", "scrub", "retrain"]
    assert [sequence.localize_on for sequence in definition.sequences[:2]] == ["new", "all"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            'forget = "iid"\n',
            'forget = "file:a"\n',
            "request 3 to be iid, non-iid:CLASSES or mislabelled, got 'file:a'",
        ),
        ('forget = "iid"\n', "", "expected request 3 to have 'forget'; add it"),
        ("share = 0.02", "share = 2.0", "share of request 2 to be a finite number from 0 to 1"),
        ('localize_on = "all"', 'localize_on = "some"', "localize_on"),
        ("[sequences.retrain]", "[sequences.retrain]\nbudget = 0.3", "without a mask"),
        ("[sequences.retrain]", '[sequences.retrain]\nstrategy = "del"', "pairs 'retrain' with a mask"),
        ("[sequences.retrain]", "[sequences.original]", "names of [sequences]"),
        ("[relearning]", "[relearning]\nspeed = 1", "unknown key 'speed'"),
        ('title = "tiny"', "controls = 0", "at least 1 control"),
    ],
)
def test_a_definition_that_cannot_be_run_is_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in TINY
    with pytest.raises(InputError) as error:
        read_definition(write(tmp_path, TINY.replace(before, after)))
    assert message in str(error.value)


def test_requests_name_disjoint_examples_that_later_requests_do_not_retain(tmp_path: Path) -> None:
    found = stream(write(tmp_path))
    sets, given = found.sets, found.data.images.train_targets
    assert [len(each.indices) for each in sets] == [10, 4, 10]
    assert len(torch.cat([each.indices for each in sets]).unique()) == 24
    assert bool((sets[0].targets[sets[0].indices] != given[sets[0].indices]).all())
    assert given[sets[1].indices].tolist() == [3] * 4
    assert (sets[2].targets != given).nonzero().flatten().tolist() == sets[0].indices.tolist()
    assert [len(each.retain) for each in sets] == [190, 186, 176]
    everything = torch.cat([sets[2].retain, *(each.indices for each in sets)]).sort().values
    assert everything.tolist() == list(range(200))
    accumulated = sets[2].accumulated
    assert len(accumulated.indices) == 24 and accumulated.retain.tolist() == sets[2].retain.tolist()


def test_a_request_for_more_examples_than_a_class_has_is_refused(tmp_path: Path) -> None:
    found = stream(write(tmp_path, TINY.replace("share = 0.02", "share = 0.5")))
    with pytest.raises(
        InputError, match=r"request 2 finds \d+ examples of non-iid:3, its share is 100; lower its share"
    ):
        _ = found.sets


def without_times(directory: Path) -> list[dict[str, Any]]:
    """Return the records without seconds."""
    records = report.read_records(directory)
    for record in records:
        record.pop("seconds", None)
    return records


@pytest.mark.long
def test_a_stopped_run_goes_on_to_the_same_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, whole, pieces = write(tmp_path), tmp_path / "whole", tmp_path / "pieces"
    packed = tmp_path / "packed"
    command = ["sequence", str(path), "--output-dir", str(whole)]
    assert main([*command, "--pack", str(packed)]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"report: {whole / report.REPORT}\n"
    kept = (whole / report.REPORT).read_bytes()
    (whole / report.REPORT).unlink()
    assert main([*command, "--report-only"]) == 0 and (whole / report.REPORT).read_bytes() == kept
    assert capsys.readouterr().out == f"report: {whole / report.REPORT}\n"
    assert len(report.read_records(whole)) == 1 + 2 * (3 + 1)
    assert report.read_records(packed) == report.read_records(whole)
    text = (packed / report.REPORT).read_text(encoding="utf-8")
    assert text == report.make_report(report.read_records(packed), "tiny")

    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("seed 0: del-all, request 2"):
            raise Stop

    with pytest.raises(Stop):
        run_definition(read_definition(path), pieces, "cpu", stop)
    assert len(report.read_records(pieces)) == 3
    state = next((pieces / "networks").glob("0-del-all-02.*"))
    kept = state.read_bytes()
    state.write_bytes((whole / "networks" / "0-del-all-03.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"is not the network of '.*0-del-all-02.json'; choose another --output-dir"):
        run_definition(read_definition(path), pieces, "cpu", print)
    state.write_bytes(kept)
    lines: list[str] = []
    run_definition(read_definition(path), pieces, "cpu", lines.append)
    served = [line.removeprefix("seed 0: ").partition(":")[0] for line in lines]
    last = [*(f"retrain, request {number}" for number in (1, 2, 3)), "retrain, relearning"]
    assert served == ["del-all, request 3", "del-all, relearning", *last]
    assert without_times(pieces) == without_times(whole)

    other = write(tmp_path, TINY.replace("share = 0.02", "share = 0.04"))
    assert main(["sequence", str(other), "--output-dir", str(whole)]) == 2
    assert "is of other settings than the definition; choose another --output-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--report-only"], "records of sequential requests, there is none"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--pack", "out"], "the output directory 'out' holds the input itself; choose another --pack"),
        (["--device", "magic"], "expected a device auto, cpu or cuda that this machine has, got 'magic'"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sequence", str(write(tmp_path)), "--output-dir", "out", *options]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("delfast: error: ") and message in error and not (tmp_path / "out").exists()


def record(sequence: str, seed: int, request: int, accuracies: dict[str, float], **more: Any) -> dict[str, Any]:
    kinds = {1: "mislabelled", 2: "iid", 3: "mislabelled"}
    sets = {
        name: {"accuracy": {"value": value}, "attack_advantage": {"value": value / 100}}
        for name, value in accuracies.items()
    }
    test = accuracies.get("test", 0.0)
    classes = {"test": [{"value": test}, {"value": test - 10.0 * request}, None]}
    return {
        "sequence": sequence,
        "seed": seed,
        "request": request,
        "provenance": {
            **dict.fromkeys(("delfast", "torch", "platform", "device"), "x"),
            "backend": {"isa": None, "cuda": "none", "threads": 1},
            "threads": 1,
        },
        "forget": {"spec": kinds.get(request, "iid")},
        "seconds": {"finetune": 2.0},
        "audit": {"sets": sets, "classes": classes},
        **more,
    }


def recorded(seed: int, bonus: float) -> list[dict[str, Any]]:
    before = {"test": 90.0, "retain": 100.0, "request 1": 100.0, "request 2": 100.0, "request 3": 100.0}
    after = {"test": 80.0 + bonus, "retain": 99.0, "request 1": 50.0, "request 2": 70.0, "request 3": 5.0}
    ratio = {"value": 2.0 + 6 * seed, "low": 1.0, "high": 5000.0}
    relearned = record("del", seed, 3, {}, relearning={f"request {number}": {"ratio": ratio} for number in (1, 3)})
    del relearned["audit"]
    return [
        record("original", seed, 0, before),
        record("del", seed, 1, {"test": 88.0, "retain": 99.0, "request 1": 10.0}),
        record("del", seed, 2, {"test": 84.0, "retain": 99.0, "request 1": 10.0, "request 2": 60.0}),
        record("del", seed, 3, after),
        relearned,
    ]


def test_the_report_has_erosion_what_comes_back_and_relearning() -> None:
    text = report.make_report([*recorded(0, 0.0), *recorded(1, 2.0)], "known")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| del")]
    erosion, reversal, attacks = rows
    assert erosion[:3] == ["del", "2", "90.0"] and erosion[-1] == "6", "two seeds give no interval"
    assert [erosion[k].split()[0] for k in (3, 4, 5, 6, 7)] == ["88.0", "84.0", "81.0", "-9.0", "-39.0"]
    # without the last request: the first one's wrong labels came back by 40 points, the second one's examples by 10
    assert [cell.split()[0] for cell in reversal[1:]] == ["60.0", "70.0", "none", "none", "10.0", "50.0"]
    assert [cell.split()[0] for cell in attacks[1:3]] == ["0.250", "0.417"]
    assert attacks[3] == "4.00 (2.00 to 8.00)"
    assert "| 2.00 (1.00 to 5e+03) |" in report.make_report(recorded(0, 0.0), "one seed")
    assert "After 3 requests the change of test accuracy is -9.0 points with all methods." in text
    assert "its change since each was unlearned is 40.0 points with all methods." in text


def test_three_seeds_give_an_interval() -> None:
    text = report.make_report([each for seed in range(3) for each in recorded(seed, float(seed))], "known")
    assert "| del | 3 | 90.0 ± 0.0 | 88.0 ± 0.0 | 84.0 ± 0.0 | 81.0 ± 2.5 |" in text


def test_a_digest_does_not_depend_on_the_path_of_the_images(tmp_path: Path) -> None:
    path = DEFINITIONS[0]
    assert path.stem == "cifar10-small"
    found = [read_definition(path, f"folder:{name}", data_is_read=False) for name in ("/a", "/b/c")]
    first, second = (each.digest(each.configs[0], each.sequences[0]) for each in found)
    assert first == second
    other = read_definition(write(tmp_path))
    more_epochs = read_definition(write(tmp_path, TINY.replace("epochs = 1\nlr", "epochs = 2\nlr")))
    assert other.digest(other.configs[0], None) != more_epochs.digest(more_epochs.configs[0], None)


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.stem)
def test_the_kept_records_are_those_of_the_definitions_that_ship(path: Path) -> None:
    definition = read_definition(path, data_is_read=False)
    kept = report.read_records(path.parents[1] / "results" / f"sequential-{path.stem}")
    sequences = {report.ORIGINAL: None} | {sequence.name: sequence for sequence in definition.sequences}
    configs = {config.seed: config for config in definition.configs}
    for each in kept:
        wanted = definition.digest(
            configs[each["seed"]], sequences[each["sequence"]], relearning=report.RELEARNING in each
        )
        assert each["definition"] == wanted
    assert len(kept) == len(configs) * (1 + len(definition.sequences) * (len(definition.requests) + 1))


@pytest.mark.long
def test_a_network_of_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        raise Stop

    directory = tmp_path / "out"
    with pytest.raises(Stop):
        run_definition(read_definition(write(tmp_path)), directory, "cpu", stop)
    for record in (directory / "cells").iterdir():
        record.unlink()
    other = read_definition(write(tmp_path, TINY.replace("epochs = 1\nlr", "epochs = 2\nlr")))
    with pytest.raises(InputError, match=r"0-original' is of other settings than the definition; choose another"):
        run_definition(other, directory, "cpu", print)


IMAGES = """
[train]
model = "cnn"
epochs = 1
lr = 0.05
batch_size = 16
[[requests]]
forget = "iid"
share = 0.2
[[requests]]
forget = "iid"
share = 0.2
[unlearn]
epochs = 1
[relearning]
steps = 2
fractions = [0.1]
[sequences.finetune]
"""


@pytest.mark.long
def test_records_of_other_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, moved, other = (images_of(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    out, kept = tmp_path / "out", tmp_path / "kept"

    def sequence(data: str, directory: Path, *options: str) -> int:
        path = write(tmp_path, IMAGES)
        return main(["sequence", str(path), "--data", data, "--output-dir", str(directory), *options])

    assert sequence(first, out, "--pack", str(kept)) == 0
    expected, records = (out / report.REPORT).read_bytes(), report.read_records(out)
    assert str(tmp_path) not in (kept / report.PACKED).read_text(encoding="utf-8")

    def refuses(data: str, directory: Path, *options: str) -> None:
        capsys.readouterr()
        assert sequence(data, directory, *options) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"records of the data that '{data}' holds now, it holds records of others" in error
        assert report.read_records(directory) == records and (directory / report.REPORT).read_bytes() == expected

    assert sequence(moved, out) == 0 and report.read_records(out) == records
    for directory in (out, kept):
        assert sequence("folder:absent", directory, "--report-only") == 0
        assert sequence(moved, directory, "--report-only") == 0
        refuses(other, directory, "--report-only")
    refuses(other, out)
    shutil.rmtree(out / "networks")
    refuses(other, out)
    images_of(tmp_path / "a", 2)  # the path of the run, with other images
    refuses(first, out)
    refuses(first, out, "--report-only")
    (out / "cells" / "0-original-00.json").write_text(json.dumps({**records[0], "data": "0"}), encoding="utf-8")
    assert sequence("folder:absent", out, "--report-only") == 2
    assert "to hold records of one data set, it holds records of 2" in capsys.readouterr().err.splitlines()[-1]


def test_kept_records_without_a_digest_of_their_data_are_reported(tmp_path: Path) -> None:
    for path in DEFINITIONS:
        kept, out = path.parents[1] / "results" / f"sequential-{path.stem}", tmp_path / path.stem
        shutil.copytree(kept, out)
        assert main(["sequence", str(path), "--output-dir", str(out), "--report-only"]) == 0
        assert (out / report.REPORT).read_bytes() == (kept / report.REPORT).read_bytes()


def test_the_report_names_what_failed_and_what_is_unfinished() -> None:
    records = recorded(0, 0.0)
    failed = {key: value for key, value in record("scrub", 0, 2, {"test": 1.0}).items() if key != "audit"}
    text = report.make_report([*records, {**failed, "failed": "loss is nan"}], "known")
    assert "- scrub, seed 0, failed at request 2: loss is nan" in text
    assert "- scrub: 1 of 1 seeds did not serve every request and are left out" in text
    with pytest.raises(InputError, match="served every request"):
        report.make_report(records[:2] + records[3:], "known")


def test_damaged_records_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="records of sequential requests, there is none"):
        report.read_records(tmp_path)
    broken = recorded(0, 0.0)[1]
    del broken["audit"]
    (tmp_path / report.PACKED).write_text(json.dumps(broken) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1 of .* to have 'audit', it does not; restore it"):
        report.read_records(tmp_path)
