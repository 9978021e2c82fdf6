"""The made-up ledgers of the report's tests have the payloads of real ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from delfast.ledger import Entry
from tests.ledger.histories import Writer, example
from tests.ledger.jobs import make_ledger, persons, write_job

NAMES = ("figures/sets", "figures/relearning", "settings")  # their keys differ by run and by method


def shapes(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the type at each path of a payload. The elements of a list share a path, and so do the sets of an audit."""
    if isinstance(value, dict):
        yield path, "dict"
        for key, each in value.items():
            yield from shapes(each, f"{path}/*" if path.endswith(NAMES) else f"{path}/{key}")
    elif isinstance(value, list):
        yield path, "list"
        for each in value:
            yield from shapes(each, f"{path}/*")
    else:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        yield path, "number" if is_number else type(value).__name__


def by_event(entries: Iterable[Entry]) -> dict[str, dict[str, set[str]]]:
    """Return, by event, the types that each path of its payloads has."""
    found: dict[str, dict[str, set[str]]] = {}
    for entry in entries:
        paths = found.setdefault(entry.event, {})
        for path, kind in shapes(entry.payload):
            is_setting = path.endswith("settings/*") or (entry.event == "started" and path.startswith("/attempts/*/"))
            if not is_setting:
                paths.setdefault(path, set()).add(kind)
    return found


def differences(made: dict[str, set[str]], real: dict[str, set[str]]) -> Iterator[str]:
    """Yield the paths that one payload lacks, unless a value above them may be null, and those of another type."""
    for here, there in ((made, real), (real, made)):
        for path in here.keys() - there.keys():
            parts = path.split("/")
            above = ("/".join(parts[:end]) for end in range(len(parts)))
            if not any("NoneType" in there.get(each, ()) for each in above):
                yield path
    for path in made.keys() & real.keys():
        kinds, others = made[path] - {"NoneType"}, real[path] - {"NoneType"}
        if kinds and others and kinds != others:
            yield f"{path}: {kinds}, {others}"


@pytest.mark.long
def test_payloads_are_those_of_real_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    lenient = {"test_drop": 100.0, "attack_advantage": 1.0, "relearn_ratio": 1000.0}
    job = write_job(tmp_path, lenient, [{"method": "finetune", "epochs": 1, "lr": 1e6}])
    with make_ledger(tmp_path, job, references=4) as ledger:
        ledger.add(persons(0, 60))
        assert not ledger.run(device="cpu").accepted, "the method fails"
        with monkeypatch.context() as patched:
            patched.setattr("delfast.ledger.running.audit", stop)
            with pytest.raises(KeyboardInterrupt):
                ledger.run(method="del", device="cpu")
        assert ledger.run(device="cpu").accepted
        ledger.add(persons(60, 120))
        ledger.run(method="del", device="cpu")
        ledger.purge(ledger.purge_plan())
        real = by_event(ledger.store.entries())
    write = Writer()
    write.receive(7, ["7"])
    write.start(5, [7], count=1)
    write.resume(5)
    write.fail(5, "the loss is not finite")
    made = by_event([*example(), *write.entries])
    assert made.keys() == real.keys()
    assert [(event, path) for event in made for path in differences(made[event], real[event])] == []
