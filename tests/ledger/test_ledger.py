"""The ledger: made whole or not at all, requests added or refused by name, and their state from the entries."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from delfast.errors import InputError
from delfast.files import LOCK
from delfast.jobs import read_job
from delfast.ledger import Ledger, Request
from delfast.ledger.store import DATABASE, Store
from tests.ledger.small import EXAMPLES, JOB


def test_a_new_ledger_records_the_job_the_data_and_the_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    job, model = files
    path = tmp_path / "deep" / "ledger"
    with Ledger.create(path, job=job, model=model) as ledger:
        created = ledger.created
        assert ledger.path == path.resolve() and ledger.verify().count == 1 and ledger.verify().holds
    read = read_job(job)
    assert created["job"] == {
        "name": "job",
        "path": str(job),
        "digest": hashlib.sha256(job.read_bytes()).hexdigest(),
    }
    assert created["data"] == read.data_digest() and created["examples"] == EXAMPLES
    assert created["model"] == {
        "file": "models/0000.safetensors",
        "digest": hashlib.sha256(model.read_bytes()).hexdigest(),
    }
    assert (path / "models/0000.safetensors").read_bytes() == model.read_bytes()
    assert created["hash_ids"] is False and created["key_check"] is None
    assert set(created["accept"]) == {"test_drop", "attack_advantage", "relearn_ratio"}
    assert created["versions"]["torch"] == torch.__version__
    assert sorted(each.name for each in path.iterdir()) == [DATABASE, "models"]
    assert [each.name for each in path.parent.iterdir()] == ["ledger"]


def test_a_ledger_is_made_whole_or_not_at_all(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, model = files
    other = tmp_path / "other.safetensors"
    read = read_job(job)
    read.save(torch.nn.Linear(3, 3), other)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    kept = sorted(tmp_path.rglob("*"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"path": full}, "there is something"),
        ({"path": other}, "there is something"),
        ({"model": tmp_path / "absent"}, "expected a checkpoint"),
        ({"model": other}, "does not fit"),
        ({"job": tmp_path / "absent.py"}, "absent.py"),
        ({"hash_ids": tmp_path / "ledger" / "key"}, "outside the ledger"),
    ]
    for changed, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            Ledger.create(**{"path": tmp_path / "ledger", "job": job, "model": model, **changed})
        assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == kept

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("delfast.ledger.records.artefact", fail)
    with pytest.raises(KeyboardInterrupt):
        Ledger.create(tmp_path / "ledger", job=job, model=model)
    assert sorted(tmp_path.rglob("*")) == kept


def test_an_empty_directory_becomes_a_ledger(files: tuple[Path, Path], tmp_path: Path) -> None:
    job, model = files
    Ledger.create(tmp_path, job=job, model=model).close()
    with pytest.raises(InputError, match="there is something"):
        Ledger.create(tmp_path, job=job, model=model)
    with Ledger.open(tmp_path) as ledger:
        assert ledger.verify().holds


def test_requests_are_added_and_read(ledger: Ledger) -> None:
    assert list(ledger.requests()) == []
    assert ledger.add(["person-3", "person-1"], reason="  Fall №7 ", due="2026-12-31") == 1
    assert ledger.add(f"person-{number}" for number in (5, 9, 7)) == 2
    added = ledger.add_requests([{"ids": ["person-2"], "due": date(2027, 1, 31)}, {"ids": ["person-4"]}])
    assert added == [3, 4] and ledger.add_requests([]) == []
    first, second, third, _ = ledger.requests()
    assert (first.number, first.count, first.reason, first.due) == (1, 2, "Fall №7", "2026-12-31")
    assert (second.count, second.reason, second.due, third.due) == (3, None, None, "2027-01-31")
    assert all(request.status == "pending" and request.run is None and request.is_open for request in ledger.requests())
    details = ledger.show(1)
    assert details.request == first and details.ids == details.originals == ("person-3", "person-1")
    assert [entry.event for entry in details.events] == ["received"] and details.events[0].time == first.time
    assert datetime.fromisoformat(first.time).utcoffset() is not None
    assert ledger.positions([2]).tolist() == [5, 7, 9] and ledger.positions([2]).dtype == torch.int64
    assert ledger.positions([1, 3]).tolist() == [1, 2, 3] and ledger.positions([]).tolist() == []
    found = {each: ledger.find(f"person-{each}") for each in (1, 7, 4, 8, "x")}
    assert found == {1: 1, 7: 2, 4: 4, 8: None, "x": None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": ["person-1", "nobody"]}, "'nobody'"),
        ({"ids": ["person-1", "person-1"]}, "'person-1' twice"),
        ({"ids": ["person-1", "person-3"]}, "got 'person-3', which request 1 names"),
        ({"ids": []}, "at least one identifier"),
        ({"ids": "person-1"}, "put it in a list"),
        ({"ids": {"person-1": 1}}, "put them in a list"),
        ({"ids": 7}, "put them in a list"),
        ({"ids": [1.5]}, "type str or int"),
        ({"ids": [True]}, "type str or int"),
        ({"ids": ["person-1\nperson-2"]}, "printable characters"),
        ({"ids": [" person-1"]}, "printable characters"),
        ({"ids": [""]}, "printable characters"),
        ({"ids": ["person-1"], "due": "31.12.2026"}, "YYYY-MM-DD"),
        ({"ids": ["person-1"], "due": "2026-02-30"}, "YYYY-MM-DD"),
        ({"ids": ["person-1"], "due": datetime(2026, 12, 31)}, "YYYY-MM-DD"),
        ({"ids": ["person-1"], "due": 20261231}, "YYYY-MM-DD"),
        ({"ids": ["person-1"], "reason": " "}, "the reason as text"),
        ({"ids": ["person-1"], "reason": 7}, "the reason as text"),
        ({"ids": ["person-1"], "reason": "\ud800"}, "plain JSON"),
        ({"ids": ["person-1"], "until": "2026-12-31"}, "got 'ids', 'until'"),
        ({"reason": "x"}, "got 'reason'"),
    ],
)
def test_bad_requests_are_refused_and_change_nothing(ledger: Ledger, fields: dict[str, Any], message: str) -> None:
    ledger.add(["person-3"])
    head = ledger.head
    with pytest.raises(InputError, match=message) as caught:
        ledger.add_requests([{"ids": ["person-8"]}, fields])
    assert "\n" not in str(caught.value) and ledger.head == head and ledger.verify().count == 2
    assert ledger.add(["person-8"]) == 2


def test_one_example_is_in_one_of_many_requests(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="got 'person-1' in two"):
        ledger.add_requests([{"ids": ["person-1", "person-2"]}, {"ids": ["person-3", "person-1"]}])
    with pytest.raises(InputError, match="request 2 of those to add: expected at least one"):
        ledger.add_requests([{"ids": ["person-1"]}, {"ids": []}])
    assert ledger.verify().count == 1


def test_states_follow_the_runs(ledger: Ledger) -> None:
    for number in range(1, 5):
        ledger.add([f"person-{number}"])

    def states() -> list[tuple[str, int | None]]:
        return [(request.status, request.run) for request in ledger.requests()]

    append: Callable[..., object] = ledger.store.append
    append("started", {"requests": [1, 2]}, 1)
    assert states() == [("running", 1), ("running", 1), ("pending", None), ("pending", None)]
    append("rejected", {}, 1)
    assert states()[:2] == [("rejected", 1)] * 2 and all(request.is_open for request in ledger.requests())
    append("started", {"requests": [2, 3]}, 2)
    append("localized", {}, 2)
    append("accepted", {}, 2)
    assert states() == [("rejected", 1), ("accepted", 2), ("accepted", 2), ("pending", None)]
    assert [request.is_open for request in ledger.requests()] == [True, False, False, True]
    append("started", {"requests": [1, 4]}, 3)
    assert states() == [("running", 3), ("accepted", 2), ("accepted", 2), ("running", 3)]
    events = [(entry.run, entry.event) for entry in ledger.show(2).events]
    assert events == [
        *((None, "received"), (1, "started"), (1, "rejected")),
        *((2, "started"), (2, "localized"), (2, "accepted")),
    ]
    assert [entry.run for entry in ledger.show(4).events] == [None, 3]


def test_a_request_that_does_not_exist_is_named(ledger: Ledger) -> None:
    ledger.add(["person-3"])
    for number in (0, -1, 2):
        with pytest.raises(InputError, match=f"expected a request from 1 to 1, got {number}"):
            ledger.show(number)


def test_reading_needs_no_job_and_adding_does(ledger: Ledger, files: tuple[Path, Path]) -> None:
    ledger.add(["person-3"])
    with Ledger.open(ledger.path) as reader:
        assert [request.count for request in reader.requests()] == [1] and reader.show(1).ids == ("person-3",)
        assert reader.find("person-3") == 1 and reader.verify(head=ledger.head).holds
        for call in (lambda: reader.add(["person-4"]), lambda: reader.positions([1]), lambda: reader.job):
            with pytest.raises(InputError, match=f"pass --job {files[0]}"):  # shown, never executed
                call()


def test_the_job_may_change_and_its_data_may_not(ledger: Ledger, tmp_path: Path) -> None:
    changed, other = tmp_path / "changed.py", tmp_path / "other.py"
    changed.write_text(JOB + "\nbatch_size = 7\n", encoding="utf-8")
    with Ledger.open(ledger.path, job=changed) as opened:
        assert opened.job.batch_size == 7 and opened.add(["person-3"]) == 1
    other.write_text(JOB.replace(f"({EXAMPLES})]", f"({EXAMPLES})][::-1]"), encoding="utf-8")
    with pytest.raises(InputError, match="are not those that the ledger was made for: 40 examples now, 40 then"):
        Ledger.open(ledger.path, job=other)


def test_files_are_verified(ledger: Ledger) -> None:
    path = ledger.path / "models/0000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (problem,) = ledger.verify().problems
    assert problem.startswith("the recorded file 'models/0000.safetensors' is not as it was written")
    assert ledger.verify(files=False).holds
    path.unlink()
    (problem,) = ledger.verify().problems
    assert problem == "the recorded file 'models/0000.safetensors' cannot be read (No such file or directory)"
    ledger.store.append("purged", {"files": [{**ledger.created["model"], "why": "superseded"}]})
    assert ledger.verify().holds
    ledger.store.append("accepted", {"checks": [{"deep": {"file": "../outside", "digest": "0" * 64}}]}, 1)
    assert ledger.verify().problems[0] == "entry 3 records the file '../outside', which is outside the ledger"


@pytest.mark.parametrize("head", ["", "0" * 63, "g" * 64, "0" * 65])
def test_a_head_that_is_none_is_refused(ledger: Ledger, head: str) -> None:
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        ledger.verify(head=head)


def test_a_head_is_found_in_capitals_and_with_spaces(ledger: Ledger) -> None:
    head = ledger.head
    ledger.add(["person-1"])
    assert ledger.verify(head=f" {head.upper()}\n").holds and not ledger.verify(head="0" * 64).holds


def _hold(path: Path, told: Any, end: Any) -> None:
    with Ledger.open(path) as ledger, ledger.lock():
        told.set()
        end.wait()


def test_one_process_works_at_a_time(ledger: Ledger) -> None:
    context = multiprocessing.get_context("fork")
    told, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(ledger.path, told, end), daemon=True)
    process.start()
    assert told.wait(30)
    with pytest.raises(InputError, match="another process is working on the ledger"), ledger.lock():
        pass
    ledger.add(["person-1"])  # requests come in meanwhile
    process.kill()  # the lock ends with the process
    process.join()
    with ledger.lock():
        assert (ledger.path / LOCK).is_file()
    with ledger.lock():
        pass


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"found no {DATABASE}"):
        Ledger.open(tmp_path)
    Store.create(tmp_path).close()
    with pytest.raises(InputError, match="no entry of its creation"):
        Ledger.open(tmp_path)


def test_a_request_has_no_state_of_its_own() -> None:
    request = Request(1, "2026-01-31T12:00:00.000000+00:00", 1, None, None, "accepted", 1)
    assert not request.is_open
    with pytest.raises(AttributeError):
        request.status = "pending"  # type: ignore[misc]
