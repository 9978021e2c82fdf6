"""Delete the files of a ledger that still hold requested examples: models, masks and references that saw them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from delfast.errors import InputError
from delfast.ledger.artefacts import PURGED, digest_file
from delfast.ledger.history import History
from delfast.ledger.references import Trained, references_of
from delfast.ledger.requests import CREATED, requests
from delfast.ledger.results import HeldFile
from delfast.ledger.running import LOCALIZED, UNLEARNED

if TYPE_CHECKING:
    from delfast.ledger.records import Records


def purge_plan(ledger: Records) -> list[HeldFile]:
    """Return the files that a purge deletes: those that hold examples of accepted requests.

    The newest accepted model stays, and so does everything of an unfinished run. InputError without the job, since a
    reference is deleted only if it saw an example.
    """
    ledger.positions([])  # InputError without the job or the key
    history = History(ledger.store)
    accepted = set(history.accepted_requests)
    purged = {each["file"] for entry in ledger.store.entries(PURGED) for each in entry.payload["files"]}
    keep = history.model["file"]
    return [
        each
        for each in _held(ledger, history)
        if each.file not in purged and each.file != keep and accepted & {*each.requests}
    ]


def holding(ledger: Records) -> list[HeldFile]:
    """Return every file of the ledger that still holds examples of any request, open ones included.

    Without the job, a reference may hold the examples of every request that came after it.
    """
    history = History(ledger.store)
    purged = {each["file"] for entry in ledger.store.entries(PURGED) for each in entry.payload["files"]}
    return [each for each in _held(ledger, history) if each.file not in purged and each.requests]


def purge(ledger: Records, plan: Sequence[HeldFile]) -> None:
    """Delete the files of a plan and record it. InputError if the plan is not the ledger's present one.

    Files are deleted first: an entry never states that a file is gone which is there. After a stop in between the next
    plan has the same files, and records them.
    """
    with ledger.lock():
        if [each.file for each in plan] != [each.file for each in purge_plan(ledger)]:
            raise InputError("expected the ledger's present plan, it has changed since; show it again")
        for each in plan:
            path = ledger.path / each.file
            if path.is_file() and digest_file(path) != each.digest:
                raise InputError(f"'{path}' is not as the ledger recorded it; delete it yourself, then purge again")
        for each in plan:
            (ledger.path / each.file).unlink(missing_ok=True)
        if plan:
            files = [
                {"file": each.file, "digest": each.digest, "why": each.why, "requests": list(each.requests)}
                for each in plan
            ]
            ledger.store.append(PURGED, {"files": files})


def _held(ledger: Records, history: History) -> Iterator[HeldFile]:
    """Yield the recorded files with the requests whose examples they hold."""
    everything = [request.number for request in requests(ledger.store)]
    created = next(ledger.store.entries(CREATED)).payload["model"]
    yield _file(ledger, created, everything, "the model that the ledger was made for, trained on them")
    gone: set[int] = set()  # of the requests of runs accepted so far
    accepted = dict(history.accepted_runs)
    for run in range(1, history.last_run + 1):
        if history.unfinished is not None and history.unfinished.run == run:
            continue
        taken = history.requests_of(run)
        localized: set[int] = set()
        for entry in ledger.store.entries(run=run):
            payload = entry.payload
            if entry.event == LOCALIZED:
                localized.add(payload["attempt"])
                yield _file(ledger, payload["mask"], taken, f"the mask of run {run}, chosen by them")
            elif entry.event == UNLEARNED:
                if payload["attempt"] in localized:  # otherwise everything was allowed to change
                    why = f"the mask of run {run} with the head, chosen by them"
                    yield _file(ledger, payload["allowed"], taken, why)
                is_result = run in accepted and payload["model"] == history.result_of(run)["model"]
                known = gone | (set(taken) if is_result else set())
                left = [number for number in everything if number not in known]
                what = f"the model of run {run}" if is_result else f"a rejected model of run {run}"
                yield _file(ledger, payload["model"], left, f"{what}, which did not unlearn them")
        if run in accepted:
            gone |= set(taken)
    for reference in references_of(ledger.store):
        yield _reference(ledger, reference)


def _reference(ledger: Records, reference: Trained) -> HeldFile:
    if ledger.has_positions:
        members = reference.members(ledger)
        seen = [number for number, positions in ledger.positions_by_request() if bool(members[positions].any())]
        why = "trained on some of them"
    else:
        before = set(reference.requests)
        seen = [request.number for request in requests(ledger.store) if request.number not in before]
        why = "trained before they came: may have seen some of them"
    return _file(ledger, dict(reference.model), seen, f"reference {reference.number}, {why}")


def _file(ledger: Records, recorded: dict[str, str], numbers: Sequence[int], why: str) -> HeldFile:
    path = ledger.path / recorded["file"]
    size = path.stat().st_size if path.is_file() else 0
    return HeldFile(recorded["file"], recorded["digest"], size, tuple(numbers), why)
