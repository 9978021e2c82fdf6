"""The history that a ledger's entries describe: its requests, its runs, and the files that still hold a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from delfast.ledger.requests import ACCEPTED, PENDING, RECEIVED, REJECTED, RUNNING, STARTED
from delfast.ledger.store import FIRST, Entry

Payload = Mapping[str, Any]
STATUSES = (ACCEPTED, REJECTED, RUNNING, PENDING)
STEPS = ("localized", "unlearned", "verified", "audited")  # events of an attempt
KEPT_IDS = 100  # requests, the newest, whose identifiers are kept: bounds the memory


@dataclass
class Run:
    """One run: the requests that it took up, the payload of each event of its last attempt, and the files it wrote."""

    number: int
    requests: tuple[int, ...]
    time: str
    steps: dict[str, Payload] = field(default_factory=dict)
    times: dict[str, str] = field(default_factory=dict)
    models: list[Payload] = field(default_factory=list)
    """Files of unlearned models, one for each attempt."""
    masks: list[Payload] = field(default_factory=list)
    """Files of masks, and of masks with the head."""
    attempts: list[str] = field(default_factory=list)
    """The method of each attempt, and the error of one that failed."""
    attempt: int = 1
    seconds: float = 0.0
    """Of all steps of all attempts."""

    def take(self, entry: Entry) -> None:
        """Take up an entry of the run; a later attempt replaces the steps of the one before."""
        payload = entry.payload
        if payload.get("attempt", self.attempt) > self.attempt:
            self.attempt = payload["attempt"]
            for event in STEPS:
                self.steps.pop(event, None)
        self.steps[entry.event], self.times[entry.event] = payload, entry.time
        self.seconds += payload.get("seconds") or 0.0
        if entry.event == "localized":
            self.masks.append(payload["mask"])
        elif entry.event == "unlearned":
            self.models.append(payload["model"])
            self.masks += [payload["allowed"]] if "localized" in self.steps and "allowed" in payload else []
            self.attempts.append(payload["settings"]["method"])
        elif entry.event == "failed":
            self.attempts.append(f"failed ({payload['error']})")

    @property
    def status(self) -> str:
        """ACCEPTED, REJECTED, or RUNNING while the run has no verdict."""
        return next((verdict for verdict in (ACCEPTED, REJECTED) if verdict in self.steps), RUNNING)

    @property
    def figures(self) -> Payload | None:
        """Figures of the run's audit, in the form of ``Audit.as_dict``; None before the audit."""
        audited = self.steps.get("audited")
        return None if audited is None else audited["figures"]

    @property
    def checks(self) -> list[Payload]:
        """The comparisons with the job's thresholds; empty before the verdict."""
        return list(self.steps.get(self.status, {}).get("checks", ()))

    def asked(self, name: str) -> Payload | None:
        """Return the comparison with one threshold, if it had a limit."""
        return next((check for check in self.checks if check["name"] == name and check["limit"] is not None), None)

    def artefact(self, step: str, name: str) -> Payload | None:
        """File and digest that a step recorded under a name; None if it recorded none."""
        found: Payload | None = self.steps.get(step, {}).get(name)
        return found


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


@dataclass(frozen=True)
class Holder:
    """A file that may still hold requested examples, and why."""

    file: str
    digest: str
    kind: str
    requests: tuple[int, ...]
    why: str


@dataclass
class History:
    """Everything that the report shows, from one pass over the entries."""

    created: Entry | None = None
    entry_count: int = 0
    last_time: str = ""
    head: str = FIRST
    requests: dict[int, TakenRequest] = field(default_factory=dict)
    runs: dict[int, Run] = field(default_factory=dict)
    references: dict[str, Payload] = field(default_factory=dict)
    """File -> payload of the entry that recorded the reference model."""
    purged: set[str] = field(default_factory=set)

    def having(self, status: str) -> list[TakenRequest]:
        """Return the requests of a status, in order."""
        return [request for request in self.requests.values() if request.status == status]

    def holders(self) -> list[Holder]:
        """Return the files on record that were not purged and may still hold a request's examples.

        Every model from before a request was accepted may hold its examples: they were trained on. A mask marks the
        channels that the examples used. A reference model that was added before the request may have seen them.
        """
        found = [*self._models(), *self._masks(), *self._references()]
        return [holder for holder in found if holder.requests and holder.file not in self.purged]

    def _models(self) -> Iterable[Holder]:
        waiting = set(self.requests)  # requests that no model so far has carried out
        if self.created is not None:
            model = self.created.payload["model"]
            yield Holder(model["file"], model["digest"], "model", tuple(sorted(waiting)), "trained on these examples")
        for run in self.runs.values():
            before = tuple(sorted(waiting))
            if run.status == ACCEPTED:
                waiting.difference_update(run.requests)
            result = run.artefact(ACCEPTED, "model")
            for model in run.models:
                if model == result:
                    why = "the run's accepted model, which did not unlearn these requests"
                    yield Holder(model["file"], model["digest"], "model", tuple(sorted(waiting)), why)
                else:
                    why = "of an attempt that was not accepted"
                    yield Holder(model["file"], model["digest"], "model", before, why)

    def _masks(self) -> Iterable[Holder]:
        for run in self.runs.values():
            for mask in run.masks:
                why = "marks the channels that these examples used"
                yield Holder(mask["file"], mask["digest"], "mask", run.requests, why)

    def _references(self) -> Iterable[Holder]:
        why = "trained before these requests came: may have seen their examples"
        for file, payload in self.references.items():
            later = tuple(number for number in self.requests if number not in payload["requests"])
            yield Holder(file, payload["model"]["digest"], "reference", later, why)


def read_history(entries: Iterable[Entry]) -> History:
    """Read a ledger's entries, in order, into its history."""
    history = History()
    for entry in entries:
        history.entry_count += 1
        history.last_time, history.head = entry.time, entry.hash
        payload = entry.payload
        if entry.event == "created":
            history.created = entry
        elif entry.event == RECEIVED:
            number = payload["request"]
            facts = (payload[name] for name in ("count", "reason", "due", "ids"))
            history.requests[number] = TakenRequest(number, entry.time, *facts)
            if number - KEPT_IDS in history.requests:
                history.requests[number - KEPT_IDS].ids = ()
        elif entry.event == STARTED and entry.run is not None:
            run = Run(entry.run, tuple(payload["requests"]), entry.time)
            history.runs[run.number] = run
            for number in run.requests:
                history.requests[number].runs.append(run)
        elif entry.event == "references":
            history.references[payload["model"]["file"]] = payload
        elif entry.event == "purged":
            history.purged.update(artefact["file"] for artefact in payload["files"])
        if entry.run is not None:
            history.runs[entry.run].take(entry)
    return history
