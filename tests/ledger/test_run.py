"""Runs of a ledger: what is taken up, accepted or rejected, recorded, refused and purged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from delfast.bits import bits
from delfast.errors import InputError
from delfast.files import LOCK, exclusive, load_state
from delfast.ledger import Ledger
from delfast.mask import Mask
from tests.ledger.jobs import LENIENT, make_ledger, persons, write_job

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]


@pytest.fixture
def ledger(made: Path, tmp_path: Path) -> Iterator[Ledger]:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    with Ledger.open(tmp_path / "ledger", job=tmp_path / "job.py") as opened:
        yield opened


def reopened(ledger: Ledger, **job: Any) -> Ledger:
    """Return the ledger with another job file."""
    return Ledger.open(ledger.path, job=write_job(ledger.path.parent, **job))


def events(ledger: Ledger, run: int) -> list[str]:
    return [entry.event for entry in ledger.store.entries(run=run)]


def payload(ledger: Ledger, event: str, run: int) -> dict[str, Any]:
    (entry,) = ledger.store.entries(event, run)
    return entry.payload


def test_runs_follow_one_another(ledger: Ledger) -> None:
    ledger.add(persons(0, 30))
    ledger.add(persons(30, 60))
    first = ledger.run(device="cpu")
    assert first.accepted and first.requests == (1, 2)
    assert events(ledger, 1) == ["started", "baseline", "localized", "unlearned", "verified", "audited", "accepted"]
    started = payload(ledger, "started", 1)
    assert (started["forget"], started["retain"]) == (60, 240)
    assert started["model"]["file"] == "models/0000.safetensors"
    ledger.add(persons(100, 120))
    second = ledger.run(device="cpu")
    started = payload(ledger, "started", 2)
    assert second.requests == (3,)
    assert (started["forget"], started["retain"]) == (20, 220), "accepted requests stay out of the retain set"
    assert started["model"] == payload(ledger, "accepted", 1)["model"], "a run begins from the newest accepted model"
    assert payload(ledger, "audited", 2)["figures"]["sets"].keys() >= {"forget", "run 1"}
    assert [request.status for request in ledger.requests()] == ["accepted"] * 3
    assert ledger.verify().holds


def test_only_the_mask_changes(ledger: Ledger) -> None:
    ledger.add(persons(0, 60))
    ledger.run(device="cpu")
    unlearned = payload(ledger, "unlearned", 1)
    before = load_state(ledger.path / "models/0000.safetensors")
    after = load_state(ledger.path / unlearned["model"]["file"])
    allowed = Mask.load(ledger.path / unlearned["allowed"]["file"]).to_dense()
    changed = {name: bits(before[name]) != bits(after[name]) for name in allowed}
    assert any(bool(each.any()) for each in changed.values())
    assert not any(bool((changed[name] & ~allowed[name].cpu()).any()) for name in allowed)
    assert payload(ledger, "verified", 1)["changed"] == sum(int(each.sum()) for each in changed.values())


def test_rejected_run_keeps_the_model(ledger: Ledger) -> None:
    ledger.add(persons(0, 60))
    strict = {"test_drop": 60.0, "attack_advantage": 0.9, "relearn_ratio": 0.0}
    with reopened(ledger, accept=strict) as opened:
        result = opened.run(device="cpu")
        assert not result.accepted
        assert [check.name for check in result.checks if not check.held] == ["relearn_ratio"]
        assert any("relearn_ratio" in line for line in result.advice)
        assert any("--escalate" in line for line in result.advice)
        assert result.model == "models/0000.safetensors", "the model stays as it was"
        assert [request.status for request in opened.requests()] == ["rejected"]
    with reopened(ledger, accept=LENIENT) as opened:
        assert opened.run(device="cpu").accepted, "a rejected request stays open"
        assert payload(opened, "started", 2)["model"]["file"] == "models/0000.safetensors"


def test_escalation_ends_with_retraining(ledger: Ledger) -> None:
    ledger.add(persons(0, 60))
    lines: list[str] = []
    with reopened(ledger, accept={"relearn_ratio": 0.0}) as opened:
        assert not opened.run(device="cpu", escalate=True, watch=lines.append).accepted
        tried = payload(opened, "rejected", 1)["attempts"]
        assert [each["settings"]["method"] for each in tried] == ["del", "finetune", "retrain"]
        assert tried[-1]["settings"]["epochs"] == 6, "as the job trains"
        failed = [line for line in lines if "did not pass" in line]
        assert len(failed) == 2, "the table of the command shows the last one"
        assert failed[0].startswith("run 1, attempt 1 of 3, del: did not pass: relearning ratio ")
        assert any(line.startswith("run 1, attempt 3 of 3, retrain: audited, ") for line in lines)
        assert events(opened, 1).count("localized") == 1, "del alone localizes"


def test_method_that_fails_is_rejected_by_name(ledger: Ledger) -> None:
    ledger.add(persons(0, 60))
    with reopened(ledger, settings=[{"method": "finetune", "epochs": 2, "lr": 1e6}]) as opened:
        result = opened.run(device="cpu")
        assert not result.accepted
        assert "finetune failed: " in result.advice[0]
        assert opened.verify().holds


def test_localize_on_all(ledger: Ledger) -> None:
    ledger.add(persons(0, 60))
    ledger.run(device="cpu")
    ledger.add(persons(60, 80))
    copy = ledger.path.parent / "copy"
    shutil.copytree(ledger.path, copy)
    ledger.run(device="cpu")
    with Ledger.open(copy, job=ledger.job.path) as other:
        other.run(device="cpu", localize_on="all")
        masks = [payload(each, "localized", 2)["mask"]["digest"] for each in (ledger, other)]
    assert masks[0] != masks[1]


def test_chosen_requests_and_settings(ledger: Ledger) -> None:
    ledger.add(persons(0, 30))
    ledger.add(persons(30, 60))
    result = ledger.run(requests=[2], method="finetune", budget=0.1, device="cpu")
    assert result.requests == (2,)
    assert dict(result.settings) == {
        **{"method": "finetune", "epochs": 2, "lr": 0.02, "budget": 0.1},
        **{"momentum": 0.9, "weight_decay": 0.0, "schedule": "cosine", "strategy": "del", "batch_size": 32},
    }, "with the defaults that it leaves out"
    assert payload(ledger, "localized", 1)["selected"] <= 0.1 * payload(ledger, "localized", 1)["total"]
    assert [request.status for request in ledger.requests()] == ["pending", "accepted"]
    with pytest.raises(InputError, match="request 2 is accepted already"):
        ledger.run(requests=[2], device="cpu")
    with pytest.raises(InputError, match="request 7 does not exist"):
        ledger.run(requests=[7], device="cpu")


def test_refusals_record_nothing(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="expected open requests, there are none"):
        ledger.run(device="cpu")
    ledger.add(persons(0, 300))
    head = ledger.head
    with pytest.raises(InputError, match="the requests name every one"):
        ledger.run(device="cpu")
    with pytest.raises(InputError, match="unfinished run to abandon, there is none"):
        ledger.abandon()
    assert ledger.head == head


def test_thresholds_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    job = write_job(tmp_path, accept={"relearn_ratio": 1.5})
    with make_ledger(tmp_path, job) as ledger:
        ledger.add(persons(0, 60))
        head = ledger.head
        with pytest.raises(InputError, match=f"delfast ledger references {ledger.path} --job {job} --count 8"):
            ledger.run(device="cpu")
        assert ledger.head == head


def test_stopped_run_is_continued_as_it_began(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.add(persons(0, 60))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("delfast.ledger.running.audit_recorded", stop)
        with pytest.raises(KeyboardInterrupt):
            ledger.run(device="cpu")
    ledger.add(persons(60, 80))
    assert [request.status for request in ledger.requests()] == ["running", "pending"]
    held = {each.file for each in ledger.holding()}
    assert {"runs/0001/1/mask.safetensors", "runs/0001/1/model.safetensors"} <= held, "a stopped run's files count too"
    assert not [each for each in ledger.purge_plan() if each.file.startswith("runs/0001/")]
    with pytest.raises(InputError, match="run 1 was stopped and is not finished"):
        ledger.run(method="finetune", device="cpu")
    with (
        reopened(ledger, accept={"test_drop": 50.0}) as opened,
        pytest.raises(InputError, match="has changed since run 1"),
    ):
        opened.run(device="cpu")
    write_job(ledger.path.parent)
    result = ledger.run(device="cpu")
    assert result.requests == (1,), "requests that came later wait for the next run"
    assert events(ledger, 1) == [
        "started",
        "baseline",
        "localized",
        "unlearned",
        "verified",
        "resumed",
        "audited",
        "accepted",
    ]


def test_abandoned_run_leaves_its_requests_open(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.add(persons(0, 60))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("delfast.ledger.running.unlearn", stop)
        with pytest.raises(KeyboardInterrupt):
            ledger.run(device="cpu")
    assert ledger.abandon() == 1
    assert ledger.run(device="cpu").requests == (1,)


def test_two_runs_at_once(ledger: Ledger) -> None:
    ledger.add(persons(0, 60))
    command = [sys.executable, "-m", "delfast", "ledger", "run", str(ledger.path), "--job", str(ledger.job.path)]
    with exclusive(ledger.path / LOCK, "held"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "another process is working on the ledger" in done.stderr
    assert events(ledger, 1) == []


def test_altered_model_is_refused(ledger: Ledger) -> None:
    ledger.add(persons(0, 60))
    path = ledger.path / "models/0000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not as the ledger recorded it"):
        ledger.run(device="cpu")


def test_purge_deletes_what_holds_accepted_requests(ledger: Ledger) -> None:
    ledger.add(persons(0, 60))
    assert ledger.purge_plan() == []
    ledger.run(device="cpu")
    plan = ledger.purge_plan()
    with Ledger.open(ledger.path) as other:  # without the job nobody knows which examples a reference saw
        assert [each.requests for each in other.holding()] == [each.requests for each in ledger.holding()]
        assert "may have seen some of them" in other.holding()[-1].why
        with pytest.raises(InputError, match="expected the job of the ledger"):
            other.purge_plan()
    assert {each.file for each in plan} == {
        "models/0000.safetensors",
        "runs/0001/1/mask.safetensors",
        "runs/0001/1/allowed.safetensors",
        "references/0001.safetensors",
        "references/0002.safetensors",
    }
    assert all(each.requests == (1,) and each.bytes > 0 for each in plan)
    with pytest.raises(InputError, match="it has changed since"):
        ledger.purge(plan[1:])
    # a purge that was killed after its first file
    (ledger.path / plan[0].file).unlink()
    assert not ledger.verify().holds
    ledger.purge(ledger.purge_plan())
    assert not any((ledger.path / each.file).exists() for each in plan)
    assert ledger.verify().holds
    assert ledger.purge_plan() == ledger.holding() == []
    ledger.add(persons(60, 80))
    assert [each.file for each in ledger.holding()] == ["runs/0001/1/model.safetensors"]
    assert ledger.run(device="cpu").accepted, "the newest model and the first accuracies are left"


def test_hashed_identifiers_are_in_no_file(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    with make_ledger(tmp_path, job, hash_ids=tmp_path / "key") as ledger:
        ledger.add(persons(0, 60))
        assert ledger.run(device="cpu").accepted
        ledger.report(ledger.path / "report")
        files = [path for path in ledger.path.rglob("*") if path.is_file()]
        assert len(files) > 8
        assert not [path for path in files if b"person-" in path.read_bytes()]


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small file system")
def test_full_disk_leaves_the_ledger_consistent(made: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this container may not mount file systems")
    try:
        shutil.copytree(made, small, dirs_exist_ok=True)
        with Ledger.open(small / "ledger", job=small / "job.py") as ledger:
            ledger.add(persons(0, 60))
            filler = small / "filler"
            while shutil.disk_usage(small).free > 24_000:
                with open(filler, "ab") as stream:
                    stream.write(bytes(4096))
            with pytest.raises(OSError, match="No space left on device"):
                ledger.run(device="cpu")
            assert ledger.verify().holds
            filler.unlink()
            assert ledger.run(device="cpu").accepted
            assert ledger.verify().holds
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_run_by_command(ledger: Ledger) -> None:
    ledger.add(persons(0, 60))
    command = [sys.executable, "-m", "delfast", "ledger"]
    own = [str(ledger.path), "--job", str(ledger.job.path)]
    both = [*command, "run", *own, "--request", "1", "--pending"]
    done = subprocess.run(both, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "expected --request or --pending, got both" in done.stderr
    done = subprocess.run([*command, "run", *own, "--device", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\nChange of test accuracy " in done.stdout and "run 1: accepted" in done.stdout
    assert f"head: {ledger.head}" in done.stdout
    assert f"the model in use: {ledger.path / 'runs/0001/1/model.safetensors'}" in done.stdout
    done = subprocess.run([*command, "show", own[0], "1"], capture_output=True, text=True, check=True)
    assert f"the model in use: {ledger.model}" in done.stdout
    done = subprocess.run([*command, "purge", *own], capture_output=True, text=True, check=True)
    assert "5 files; --yes deletes them" in done.stdout
    done = subprocess.run([*command, "purge", *own, "--yes"], capture_output=True, text=True, check=True)
    assert "deleted 5 files" in done.stdout
