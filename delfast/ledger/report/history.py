"""The history that a ledger's entries describe: its requests, its runs with their attempts, and its references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from delfast.ledger.checks import advantage
from delfast.ledger.events import (
    ACCEPTED,
    AUDITED,
    BASELINE,
    CREATED,
    LOCALIZED,
    PURGED,
    RECEIVED,
    REFERENCES,
    REJECTED,
    RESUMED,
    STARTED,
)
from delfast.ledger.evidence import result_of
from delfast.ledger.requests import PENDING, RUNNING
from delfast.ledger.results import Check
from delfast.ledger.store import FIRST, Entry
from delfast.ledger.words import failure

Payload = Mapping[str, Any]
KEPT_IDS = 100  # requests, the newest, whose identifiers are kept: bounds the memory


def is_forget_set(name: str) -> bool:
    """Return whether a set of an audit is the run's own forget set, or that of an earlier run."""
    return name == "forget" or name.startswith("run ")


@dataclass
class Run:
    """One run: its number, the requests that it took, how it started and ended, and its attempts."""

    number: int
    requests: tuple[int, ...]
    time: str
    started: Payload
    attempts: list[dict[str, Payload]] = field(default_factory=list)
    """The payload of each event, by attempt."""
    baseline: Payload = field(default_factory=dict)
    """The audit of the model before the run."""
    resumed: int = 0
    status: str = RUNNING
    result: Payload = field(default_factory=dict)
    decided: str = ""
    """Time of the entry that ended the run; empty while it has no result."""

    @property
    def last(self) -> Mapping[str, Payload]:
        """The events of the newest attempt: the one that was accepted, or the last that was rejected."""
        return self.attempts[-1] if self.attempts else {}

    @property
    def settings(self) -> Payload:
        """The method and settings of the newest attempt."""
        attempts: Sequence[Payload] = self.started["attempts"]
        return attempts[max(0, len(self.attempts) - 1)]

    @property
    def has_mask(self) -> bool:
        """Whether the newest attempt was kept to a mask."""
        return LOCALIZED in self.last

    @property
    def is_retrained(self) -> bool:
        """Whether the newest attempt trained a new network from nothing, on the retained examples alone."""
        return self.settings["method"] == "retrain" and not self.has_mask

    @property
    def has_accuracy(self) -> bool:
        """Whether the job has no loss of its own, so that there are accuracies."""
        return self.started["before"]["test"] is not None

    @property
    def results(self) -> list[tuple[Check, str]]:
        """The checks of the newest attempt, each with what its figure shows."""
        return [(check, result_of(check, has_mask=self.has_mask)) for check in self.checks]

    @property
    def failures(self) -> str:
        """In a few words, why the run was rejected."""
        failed = [failure(check) for check in self.checks if not check.held]
        return "; ".join(failed) or "it was stopped and then abandoned"

    @property
    def figures(self) -> Payload | None:
        """Figures of the newest attempt's audit, in the form of ``Audit.as_dict``; None before the audit."""
        audited = self.last.get(AUDITED)
        return None if audited is None else audited["figures"]

    @property
    def largest_attack(self) -> Payload | None:
        """The largest attack advantage, of the run's own forget set and of every earlier one; None if not measured."""
        sets = (self.figures or {}).get("sets", {})
        found = [advantage(self.figures or {}, name)[0] for name in sets if is_forget_set(name)]
        known: list[Payload] = [figure for figure in found if figure is not None]
        return max(known, key=lambda figure: figure["value"], default=None)

    @property
    def checks(self) -> list[Check]:
        """The checks of the newest attempt; empty before the result, and for a run that was abandoned."""
        return [Check(**check) for check in self.result.get("checks", ())]

    @property
    def earlier_checks(self) -> list[tuple[Payload, list[Check]]]:
        """The settings and the checks of each attempt before the newest."""
        tried = self.result.get("attempts", ())[:-1]
        return [(each["settings"], [Check(**check) for check in each["checks"]]) for each in tried]

    def asked(self, name: str) -> Check | None:
        """Return the check of one threshold, if it was made."""
        return next((check for check in self.checks if check.name == name), None)

    def artefact(self, step: str, name: str) -> Payload | None:
        """File and digest that a step of the newest attempt recorded under a name; None if it recorded none."""
        found: Payload | None = self.last.get(step, {}).get(name)
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the audit before the run, of the attempts before the newest, and of each of its steps."""
        found = {"audit before": float(self.baseline["seconds"])}
        if len(self.attempts) > 1:
            found["attempts before"] = sum(sum(_seconds(attempt).values()) for attempt in self.attempts[:-1])
        return found | _seconds(self.last)


def _seconds(attempt: Mapping[str, Payload]) -> dict[str, float]:
    return {event: float(payload["seconds"]) for event, payload in attempt.items() if "seconds" in payload}


@dataclass
class TakenRequest:
    """One forget request, and the runs that took it up."""

    number: int
    time: str
    count: int
    reason: str | None
    due: str | None
    ids: Sequence[str]
    runs: list[Run] = field(default_factory=list)

    @property
    def status(self) -> str:
        """Status of the newest run that took it up; PENDING without one."""
        return self.runs[-1].status if self.runs else PENDING

    @property
    def attempt_count(self) -> int:
        """Number of attempts of all its runs."""
        return sum(len(run.attempts) for run in self.runs)


@dataclass
class History:
    """Everything that the report shows, from one pass over the entries."""

    created: Entry | None = None
    entry_count: int = 0
    last_time: str = ""
    head: str = FIRST
    requests: dict[int, TakenRequest] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)
    references: set[str] = field(default_factory=set)
    """Files of the reference models that were trained."""
    purged: dict[str, str] = field(default_factory=dict)
    """File that was deleted -> time of the entry that records it."""

    @property
    def model(self) -> str:
        """File of the newest accepted model; at first that of the model that the ledger was made for."""
        assert self.created is not None
        file: str = [self.created.payload["model"]["file"], *(run.result["model"]["file"] for run in self.accepted)][-1]
        return file

    @property
    def accepted(self) -> list[Run]:
        """The accepted runs, in order."""
        return [run for run in self.runs.values() if run.status == ACCEPTED]

    @property
    def retraining(self) -> Run | None:
        """The newest accepted run that trained a new network from nothing: the model in use is of that network."""
        return next((run for run in reversed(self.accepted) if run.is_retrained), None)

    def left_out_by(self, run: Run) -> set[int]:
        """Return the requests whose examples an accepted run did not retain: its own, open and earlier ones."""
        before = [number for each in self.accepted if each.number < run.number for number in each.requests]
        return {*run.requests, *run.started["excluded"], *before}

    def having(self, status: str) -> list[TakenRequest]:
        """Return the requests of a status, in order."""
        return [request for request in self.requests.values() if request.status == status]


def read_history(entries: Iterable[Entry]) -> History:
    """Read a ledger's entries, in order, into its history."""
    history = History()
    for entry in entries:
        history.entry_count += 1
        history.last_time, history.head = entry.time, entry.hash
        if entry.run is not None:
            _read_step(history, entry, entry.run)
        elif entry.event == CREATED:
            history.created = entry
        elif entry.event == RECEIVED:
            _read_request(history, entry)
        elif entry.event == REFERENCES:
            history.references.add(entry.payload["model"]["file"])
        elif entry.event == PURGED:
            history.purged.update((artefact["file"], entry.time) for artefact in entry.payload["files"])
    return history


def _read_request(history: History, entry: Entry) -> None:
    payload = entry.payload
    number = payload["request"]
    facts = (payload[name] for name in ("count", "reason", "due", "ids"))
    history.requests[number] = TakenRequest(number, entry.time, *facts)
    if number - KEPT_IDS in history.requests:
        history.requests[number - KEPT_IDS].ids = ()


def _read_step(history: History, entry: Entry, number: int) -> None:
    """Read an entry of a run."""
    payload = entry.payload
    if entry.event == STARTED:
        run = Run(number, tuple(payload["requests"]), entry.time, payload)
        history.runs[number] = run
        for each in run.requests:
            history.requests[each].runs.append(run)
        return
    run = history.runs[number]
    if entry.event in (ACCEPTED, REJECTED):
        run.status, run.result, run.decided = entry.event, payload, entry.time
    elif entry.event == RESUMED:
        run.resumed += 1
    elif entry.event == BASELINE:
        run.baseline = payload
    else:
        if len(run.attempts) < payload["attempt"]:
            run.attempts.append({})
        run.attempts[-1][entry.event] = payload
