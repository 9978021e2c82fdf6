"""Delete the files of a ledger that still hold requested examples: models, masks and references that saw them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from delfast.errors import InputError
from delfast.ledger.artefacts import PURGED, Recorded, digest_file
from delfast.ledger.history import History
from delfast.ledger.records import MODELS
from delfast.ledger.references import REFERENCES, Trained, references_of, with_members
from delfast.ledger.requests import CREATED, requests
from delfast.ledger.results import HeldFile
from delfast.ledger.running import LOCALIZED, UNLEARNED
from delfast.ledger.starting import RUNS

if TYPE_CHECKING:
    from delfast.ledger.records import Records


def purge_plan(ledger: Records) -> list[HeldFile]:
    """Return the files that a purge deletes: those that hold examples of accepted requests.

    The newest accepted model stays, and so does everything that an unfinished run needs. InputError without the job,
    since a reference is deleted only if it saw an example.
    """
    ledger.positions([])  # InputError without the job or the key
    history = History(ledger.store)
    accepted = set(history.accepted_requests)
    keep = {history.model["file"]}
    if history.unfinished is not None:
        used = history.unfinished.payload["references"]
        keep |= {each.model["file"] for each in references_of(ledger.store) if each.number in used}
    working = _directory_of(history)
    found = [each for each in holding(ledger) if not (working and each.file.startswith(working))]
    return [each for each in found if each.file not in keep and accepted & {*each.requests}]


def holding(ledger: Records) -> list[HeldFile]:
    """Return every file of the ledger that still holds examples of any request, open ones included.

    Without the job, a reference may hold the examples of every request that came after it. A file that no entry
    records, as a stopped run leaves it, may hold any.
    """
    history = History(ledger.store)
    everything = [request.number for request in requests(ledger.store)]
    recorded = Recorded.of(ledger.store.entries())
    found = [each for each in _held(ledger, history, everything) if each.file in recorded.digests]
    return [each for each in (*found, *_unrecorded(ledger, recorded, everything)) if each.requests]


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


def _directory_of(history: History) -> str | None:
    """Return the directory of the unfinished run, which continues with the files in it; None without one."""
    return None if history.unfinished is None else f"{RUNS}/{history.unfinished.run:04d}/"


def _unrecorded(ledger: Records, recorded: Recorded, everything: Sequence[int]) -> Iterator[HeldFile]:
    """Yield the files that no entry records."""
    for name in recorded.others(ledger.path, MODELS, RUNS, REFERENCES):
        why = "was purged and is there again" if name in recorded.purged else "recorded by no entry: may hold all"
        try:
            digest = digest_file(ledger.path / name)
        except FileNotFoundError:  # of a process at work
            continue
        yield _file(ledger, {"file": name, "digest": digest}, everything, why)


def _held(ledger: Records, history: History, everything: Sequence[int]) -> Iterator[HeldFile]:
    """Yield the recorded files with the requests whose examples they hold, purged ones too."""
    created = next(ledger.store.entries(CREATED)).payload["model"]
    yield _file(ledger, created, everything, "the model that the ledger was made for, trained on them")
    gone: set[int] = set()  # requests whose examples the newest accepted model so far does not hold
    accepted = dict(history.accepted_runs)
    for run in range(1, history.last_run + 1):
        taken, without = history.requests_of(run), gone
        chosen_by = everything if history.sees_more(run) else taken  # what its masks were localized on
        localized: set[int] = set()
        for entry in ledger.store.entries(run=run):
            payload = entry.payload
            if entry.event == LOCALIZED:
                localized.add(payload["attempt"])
                yield _file(ledger, payload["mask"], chosen_by, f"the mask of run {run}, chosen by them")
            elif entry.event == UNLEARNED:
                if payload["attempt"] in localized:  # otherwise everything was allowed to change
                    why = f"the mask of run {run} with the head, chosen by them"
                    yield _file(ledger, payload["allowed"], chosen_by, why)
                is_result = run in accepted and payload["model"] == history.result_of(run)["model"]
                is_retrained = payload["settings"]["method"] == "retrain" and payload["attempt"] not in localized
                lacks = gone | set(taken) if is_result or is_retrained else gone
                if is_retrained:  # from new weights, on the retain set alone
                    lacks |= set(history.excluded_by(run))
                left = [number for number in everything if number not in lacks]
                what = f"the model of run {run}" if is_result else f"a model of run {run} that is not accepted"
                how = "trained on them" if is_retrained else "which did not unlearn them"
                yield _file(ledger, payload["model"], left, f"{what}, {how}")
                without = lacks if is_result else without
        gone = without
    yield from _references(ledger)


def _references(ledger: Records) -> Iterator[HeldFile]:
    references = references_of(ledger.store)
    if not ledger.has_positions:
        received = [request.number for request in requests(ledger.store)]
        for reference in references:
            before = set(reference.requests)
            seen = [number for number in received if number not in before]
            yield _reference(ledger, reference, seen, "trained before they came: may have seen some of them")
        return
    positions = list(ledger.positions_by_request()) if references else []
    for reference, members in with_members(ledger, references):
        seen = [number for number, each in positions if bool(members[each].any())]
        yield _reference(ledger, reference, seen, "trained on some of them")


def _reference(ledger: Records, reference: Trained, seen: Sequence[int], why: str) -> HeldFile:
    return _file(ledger, dict(reference.model), seen, f"reference model {reference.number}, {why}")


def _file(ledger: Records, recorded: dict[str, str], numbers: Sequence[int], why: str) -> HeldFile:
    path = ledger.path / recorded["file"]
    size = path.stat().st_size if path.is_file() else 0
    return HeldFile(recorded["file"], recorded["digest"], size, tuple(numbers), why)
