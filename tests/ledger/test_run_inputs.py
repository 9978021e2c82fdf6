"""The inputs of a run, the files of a stopped one, and the files that a run leaves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from delfast.errors import InputError
from delfast.ledger import Ledger, auditing, starting
from delfast.ledger.running import recorded_error
from delfast.ledger.starting import Choice, _attempts
from tests.ledger.jobs import persons, write_job

pytestmark = pytest.mark.long
FINETUNE = {"method": "finetune", "epochs": 1, "lr": 0.02}
RATIO = {"test_drop": 60.0, "relearn_ratio": 1000.0}


@pytest.fixture
def ledger(made: Path, tmp_path: Path) -> Iterator[Ledger]:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    with Ledger.open(tmp_path / "ledger", job=tmp_path / "job.py") as opened:
        yield opened


def payload(ledger: Ledger, event: str, run: int = 1) -> dict[str, Any]:
    (entry,) = ledger.store.entries(event, run)
    return entry.payload


def stopped(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, at: str = "audit_recorded", **choice: Any) -> None:
    """Run a ledger, and stop it where it calls a function."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"delfast.ledger.running.{at}", stop)
        with pytest.raises(KeyboardInterrupt):
            ledger.run(device="cpu", **choice)


def with_job(ledger: Ledger, text: str = "", **job: Any) -> Ledger:
    """Return the ledger with another job file, to which text is added."""
    path = write_job(ledger.path.parent, **job)
    with path.open("a") as stream:
        stream.write(text)
    return Ledger.open(ledger.path, job=path)


def files(ledger: Ledger) -> set[str]:
    folders = ("models", "runs", "references")
    found = (path for folder in folders for path in (ledger.path / folder).rglob("*") if path.is_file())
    return {path.relative_to(ledger.path).as_posix() for path in found}


def test_model_before_the_run_is_audited_and_its_figures_are_beside(ledger: Ledger) -> None:
    ledger.add(persons(0, 60))
    idle = [{"method": "finetune", "epochs": 1, "lr": 1e-9}]
    with with_job(ledger, accept={"attack_advantage": 1.0, **RATIO}, settings=idle) as opened:
        result = opened.run(device="cpu")
        figures = payload(opened, "baseline")["figures"]
        found = {check.name: check for check in result.checks}
        assert result.accepted
        assert found["relearn_ratio"].before == figures["relearn_ratio"]["value"]
        assert found["attack_advantage"].before == figures["sets"]["forget"]["attack_advantage"]["value"]
        assert found["relearn_ratio"].held_before and found["attack_advantage"].held_before
        assert payload(opened, "started")["before"]["test"] == figures["sets"]["test"]["accuracy"]["value"]
        assert opened.verify().holds, "its file is recorded"


def test_open_requests_that_are_not_taken_up_are_not_retained(ledger: Ledger) -> None:
    ledger.add(persons(0, 20))
    ledger.add(persons(20, 50))
    assert ledger.run(requests=[1], method="finetune", device="cpu").accepted
    started = payload(ledger, "started")
    assert (started["excluded"], started["forget"], started["retain"]) == ([2], 20, 250)


@pytest.mark.parametrize("requests", [[], 2, "12"])
def test_requests_of_another_form_are_refused(ledger: Ledger, requests: Any) -> None:
    ledger.add(persons(0, 20))
    with pytest.raises(InputError, match="expected requests as a list of numbers, at least one"):
        ledger.run(requests=requests, device="cpu")


@pytest.mark.parametrize("requests", [[True], [1.0], ["1"]])
def test_request_of_another_type_is_refused(ledger: Ledger, requests: Any) -> None:
    ledger.add(persons(0, 20))
    with pytest.raises(InputError, match=r"expected requests as a list of numbers, got .* in it"):
        ledger.run(requests=requests, device="cpu")


def test_request_that_comes_during_the_first_audit_is_left_out(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.add(persons(0, 40))
    audit = auditing.audit_recorded

    def slow(*arguments: Any) -> dict[str, Any]:
        with Ledger.open(ledger.path, job=ledger.job.path) as other:
            other.add(persons(60, 70))
        return audit(*arguments)

    monkeypatch.setattr(starting, "audit_recorded", slow)
    assert ledger.run(requests=[numpy.int64(1)], method="finetune", device="cpu").accepted
    started = payload(ledger, "started")
    assert (started["requests"], started["excluded"], started["retain"]) == ([1], [2], 250)
    assert payload(ledger, "audited")["figures"]["sets"]["retain"]["count"] == 250


def test_pairs_that_no_run_could_follow_are_refused(ledger: Ledger) -> None:
    ledger.add(persons(0, 40))
    head = ledger.head
    with pytest.raises(InputError, match="expected no budget for 'retrain', which changes everything"):
        ledger.run(method="retrain", budget=0.3, device="cpu")
    assert ledger.head == head
    for setting in ({"method": "retrain", "budget": 0.3}, {"method": "retrain", "strategy": "del"}):
        with pytest.raises(InputError, match=r"job\.py', line \d+: expected no (budget|strategy) for 'retrain'"):
            with_job(ledger, settings=[setting])


@pytest.mark.parametrize("budget", [0.0, 2.0, float("nan")])
def test_budget_is_checked_before_anything_is_recorded(ledger: Ledger, budget: float) -> None:
    ledger.add(persons(0, 20))
    head = ledger.head
    with pytest.raises(InputError, match="budget"):
        ledger.run(budget=budget, device="cpu")
    assert ledger.head == head


@pytest.mark.parametrize(
    ("choice", "methods"),
    [
        (Choice(escalate=True), ["del", "finetune", "retrain"]),
        (Choice(method="finetune", escalate=True), ["finetune", "del", "retrain"]),
        (Choice(method="neggrad+", escalate=True), ["neggrad+", "del", "finetune", "retrain"]),
        (Choice(method="retrain", escalate=True), ["retrain", "del", "finetune"]),
        (Choice(budget=0.5, escalate=True), ["del", "finetune", "retrain"]),
    ],
)
def test_escalation_takes_every_setting_once(ledger: Ledger, choice: Choice, methods: list[str]) -> None:
    assert [each["method"] for each in _attempts(ledger, choice)] == methods


def test_what_cannot_be_measured_is_found_out_before_the_run(ledger: Ledger) -> None:
    ledger.add(persons(0, 1))
    head = ledger.head
    kept = files(ledger)
    with pytest.raises(
        InputError, match=r"but it needs at least 2 examples, the forget set has 1; .*--accept-unmeasured"
    ):
        ledger.run(device="cpu")
    assert ledger.head == head
    assert files(ledger) == kept, "no audit of a run that did not begin"


def test_resumed_run_has_the_references_that_it_began_with(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.add(persons(0, 40))
    assert ledger.run(method="finetune", device="cpu").accepted
    ledger.add(persons(40, 100))
    with with_job(ledger, accept=RATIO) as opened:
        stopped(opened, monkeypatch, method="finetune")
        assert payload(opened, "started", 2)["references"] == [1, 2]
        plan = opened.purge_plan()
        assert "references/0001.safetensors" not in {each.file for each in plan}
        opened.purge(plan)
        opened.train_references(3, device="cpu")
        opened.run(device="cpu")
        assert len(payload(opened, "audited", 2)["figures"]["relearning"]["retain"]["control"]) == 2
        assert "references/0001.safetensors" in {each.file for each in opened.purge_plan()}


def test_unrecorded_files_hold_everything_and_are_purged(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.add(persons(0, 40))
    stopped(ledger, monkeypatch, at="artefact", method="finetune")
    left = "runs/0001/1/model.safetensors"
    assert left in files(ledger)
    assert left in {each.file for each in ledger.holding()}, "it holds them, recorded or not"
    assert left not in {each.file for each in ledger.purge_plan()}, "the unfinished run goes on with it"
    ledger.abandon()
    assert left not in files(ledger)
    (ledger.path / "references/0009.safetensors").write_bytes(b"of a process that was killed")
    assert ledger.run(method="finetune", device="cpu").accepted
    (found,) = [each for each in ledger.holding() if each.file == "references/0009.safetensors"]
    assert (found.requests, found.why) == ((1,), "recorded by no entry: may hold all")
    ledger.purge(ledger.purge_plan())
    assert files(ledger) == {
        "runs/0001/baseline.json",
        "runs/0002/baseline.json",
        "runs/0002/1/audit.json",
        "runs/0002/1/model.safetensors",
        "runs/0002/1/allowed.safetensors",
    }
    assert ledger.verify().holds and ledger.holding() == []


def test_purged_file_that_came_back_is_found(ledger: Ledger) -> None:
    ledger.add(persons(0, 40))
    ledger.run(method="finetune", device="cpu")
    first = ledger.path / "models/0000.safetensors"
    content = first.read_bytes()
    ledger.purge(ledger.purge_plan())
    first.write_bytes(content)
    (problem,) = ledger.verify().problems
    assert problem.startswith("the file 'models/0000.safetensors' was purged and is there again")
    (again,) = ledger.purge_plan()
    assert again.why == "was purged and is there again"
    ledger.purge([again])
    assert ledger.verify().holds and not first.exists()


def test_damaged_mask_leaves_the_run_unfinished(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.add(persons(0, 40))
    stopped(ledger, monkeypatch, at="unlearn")
    mask = ledger.path / "runs/0001/1/mask.safetensors"
    content = mask.read_bytes()
    mask.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="is not as the ledger recorded it"):
        ledger.run(device="cpu")
    assert not list(ledger.store.entries("failed"))
    mask.write_bytes(content)
    assert ledger.run(device="cpu").accepted


def test_error_of_the_audit_is_a_failed_attempt(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.add(persons(0, 40))

    def fail(*_: Any, **__: Any) -> None:
        raise InputError("the model has outputs that are not finite")

    monkeypatch.setattr("delfast.ledger.running.audit_recorded", fail)
    result = ledger.run(device="cpu", escalate=True)
    assert not result.accepted
    assert [entry.payload["attempt"] for entry in ledger.store.entries("failed")] == [1, 2, 3]
    assert "outputs that are not finite" in result.checks[0].set


def test_retrained_model_holds_no_request_that_its_run_left_out(ledger: Ledger) -> None:
    ledger.add(persons(0, 40))
    ledger.add(persons(40, 80))
    assert ledger.run(requests=[1], method="retrain", device="cpu").accepted
    in_use = str(ledger.model.relative_to(ledger.path))
    assert in_use not in {each.file for each in ledger.holding()}
    ledger.report(ledger.path.parent / "report")
    text = (ledger.path.parent / "report" / "report.md").read_text()
    assert "Not carried out yet: request 2. The model in use was retrained without these examples." in text
    ledger.add(persons(80, 120))
    (held,) = [each for each in ledger.holding() if each.file == in_use]
    assert (held.requests, held.why) == ((3,), "the model of run 1, trained on them")
    assert ledger.run(requests=[3], method="finetune", device="cpu").accepted
    holds_2 = {each.file for each in ledger.holding() if 2 in each.requests}
    assert not {in_use, str(ledger.model.relative_to(ledger.path))} & holds_2


FAILING = """
failing = False

def preprocess(batch):
    if failing:
        raise KeyError("no image of person-0005")
    return batch
"""


def test_text_of_the_jobs_errors_is_not_recorded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.add(persons(0, 40))
    lines: list[str] = []
    with with_job(ledger, FAILING) as opened:
        module = opened.job.source.module

        def watch(line: str) -> None:
            lines.append(line)
            if "baseline" in line:
                module.failing = True  # type: ignore[attr-defined]

        opened.run(device="cpu", watch=watch)
        recorded = payload(opened, "failed")["error"]
        entries = "\n".join(entry.text for entry in opened.store.entries(run=1))
    assert any("no image of person-0005" in line for line in lines), "it is printed"
    assert "no image" not in entries and "person-0005" not in entries
    assert recorded.startswith(f"KeyError in '{opened.job.path}', line ")


NAMING = """
def loss_fn(model, batch):
    return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def preprocess(batch):
    return {"x": batch[0], "y": batch[1], "first": "patient-0007 Ana Perez"}
"""
READING = """
import sys

late = {late}


def preprocess(batch):
    frame = sys._getframe() if late else None
    while frame is not None:
        if frame.f_code.co_name == "run_relearning":
            raise OSError("cannot read images/person-0003.png")
        frame = frame.f_back
    return batch
"""


@pytest.mark.parametrize("late", [False, True])
def test_text_of_the_data_is_not_recorded_by_an_audit(ledger: Ledger, late: bool) -> None:
    """Relearning reads the data once more; what goes wrong there is no reason that a figure is not measured."""
    ledger.add(persons(0, 40))
    with with_job(ledger, READING.format(late=not late), settings=[FINETUNE]) as opened:
        module = opened.job.source.module

        def watch(line: str) -> None:
            if "baseline" in line:
                module.late = True  # type: ignore[attr-defined]

        if not late:
            with pytest.raises(InputError, match=r"OSError: cannot read images/person-0003\.png"):
                opened.run(device="cpu")
            assert not list(opened.store.entries("started"))
            return
        assert not opened.run(device="cpu", watch=watch).accepted
        assert payload(opened, "failed")["error"].startswith(f"OSError in '{opened.job.path}', line ")
        assert not [entry for entry in opened.store.entries(run=1) if "person-0003" in entry.text]


def test_part_of_a_batch_is_recorded_by_its_type(ledger: Ledger) -> None:
    with with_job(ledger, NAMING, accept={"attack_advantage": 1.0}, settings=[FINETUNE]) as opened:
        opened.add(persons(0, 40))
        assert opened.run(device="cpu").accepted
        texts = [entry.text for entry in opened.store.entries(run=1)]
        texts += [path.read_text() for path in opened.path.glob("runs/**/*.json")]
        opened.report(opened.path / "report")
        texts.append((opened.path / "report/report.html").read_text())
    assert any("with a row for each example, got str; make it a tensor" in text for text in texts)
    assert not [text for text in texts if "Ana Perez" in text]


@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        ("the loss is not finite", "the loss is not finite"),
        ("expected a tensor, got 'Ana Perez'; make it one", "expected a tensor, got '...'; make it one"),
        ("expected \"O'Brien\" and 'Ana' once", "expected '...' once"),
    ],
)
def test_recorded_error_has_no_value(text: str, recorded: str) -> None:
    assert recorded_error(InputError(text), Path("/job.py")) == recorded
    try:
        raise InputError(text) from KeyError("Ana Perez")
    except InputError as error:
        assert recorded_error(error, Path("/job.py")) == "KeyError; its text is not recorded"
    try:
        try:
            raise KeyError("Ana Perez")
        except KeyError:
            raise InputError(text) from None
    except InputError as error:
        assert recorded_error(error, Path("/job.py")) == recorded


def test_path_of_the_model_in_use(ledger: Ledger) -> None:
    assert ledger.model == ledger.path / "models/0000.safetensors"
    ledger.add(persons(0, 40))
    ledger.run(method="finetune", device="cpu")
    assert ledger.model == ledger.path / "runs/0001/1/model.safetensors"


def test_recorded_path_outside_the_ledger_is_not_followed(ledger: Ledger) -> None:
    from delfast.ledger.artefacts import digest_file
    from delfast.ledger.networks import AlteredFile, recorded_file

    path = ledger.path.parent / "model.safetensors"
    with pytest.raises(AlteredFile, match="is not as the ledger recorded it"):
        recorded_file(ledger.path, {"file": "../model.safetensors", "digest": digest_file(path)})
