"""The history that a ledger's entries describe: its requests, its runs, and the files that still hold a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from delfast.ledger.requests import ACCEPTED, PENDING, RECEIVED, REJECTED, RUNNING, STARTED
from delfast.ledger.store import FIRST, Entry

Payload = Mapping[str, Any]
STATUSES = (ACCEPTED, REJECTED, RUNNING, PENDING)
KEPT_IDS = 100  # requests, the newest, whose identifiers are kept: bounds the memory


@dataclass
class Run:
    """One run: its number, the requests that it took, and the last payload of each of its events."""

    number: int
    requests: tuple[int, ...]
    time: str
    steps: dict[str, Payload] = field(default_factory=dict)
    times: dict[str, str] = field(default_factory=dict)

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

    def measured(self, check: Payload) -> Payload | None:
        """Return the audit's figure, with its interval, that a check compared; None for figures without an interval."""
        figures = self.figures or {}
        if check["name"] == "relearn_ratio":
            found: Payload | None = figures.get("relearn_ratio")
            return found
        if check["name"] == "attack_advantage":
            found = figures.get("sets", {}).get(check.get("set") or "forget", {}).get("attack_advantage")
            return found
        return None

    def artefact(self, step: str, name: str) -> Payload | None:
        """File and digest that a step recorded under a name; None if it recorded none."""
        found: Payload | None = self.steps.get(step, {}).get(name)
        return found

    @property
    def seconds(self) -> float:
        """Seconds of all steps together."""
        return float(sum(payload.get("seconds") or 0.0 for payload in self.steps.values()))


@dataclass
class TakenRequest:
    """One forget request, and the runs that took it up."""

    number: int
    entry: int
    """Number of the entry that received it."""
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
    references: dict[str, tuple[int, Payload]] = field(default_factory=dict)
    """File -> number of the entry that added it, and the artefact; retired ones are left out."""
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
            model = run.artefact("unlearned", "model")
            if run.status == ACCEPTED:
                waiting.difference_update(run.requests)
                model, why = run.artefact(ACCEPTED, "model"), "made before these requests were carried out"
            else:
                why = "of a run that was not accepted"
            if model is not None:
                yield Holder(model["file"], model["digest"], "model", tuple(sorted(waiting)), why)

    def _masks(self) -> Iterable[Holder]:
        for run in self.runs.values():
            mask = run.artefact("localized", "mask")
            if mask is not None:
                why = "marks the channels that these examples used"
                yield Holder(mask["file"], mask["digest"], "mask", run.requests, why)

    def _references(self) -> Iterable[Holder]:
        why = "trained before these requests came: may have seen their examples"
        for file, (added, artefact) in self.references.items():
            later = tuple(number for number, request in self.requests.items() if request.entry > added)
            yield Holder(file, artefact["digest"], "reference", later, why)


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
            history.requests[number] = TakenRequest(number, entry.number, entry.time, *facts)
            if number - KEPT_IDS in history.requests:
                history.requests[number - KEPT_IDS].ids = ()
        elif entry.event == STARTED and entry.run is not None:
            run = Run(entry.run, tuple(payload["requests"]), entry.time)
            history.runs[run.number] = run
            for number in run.requests:
                history.requests[number].runs.append(run)
        elif entry.event == "references":
            for artefact in payload["references"]:
                if payload["action"] == "retired":
                    history.references.pop(artefact["file"], None)
                else:
                    history.references[artefact["file"]] = (entry.number, artefact)
        elif entry.event == "purged":
            history.purged.update(artefact["file"] for artefact in payload["files"])
        if entry.run is not None:
            run = history.runs[entry.run]
            run.steps[entry.event], run.times[entry.event] = payload, entry.time
    return history
