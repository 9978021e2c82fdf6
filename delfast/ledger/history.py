"""The state of a ledger that its entries about runs add up to."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from delfast.ledger.events import ACCEPTED, CREATED, REJECTED, STARTED
from delfast.ledger.requests import requests
from delfast.ledger.store import Entry, Store


class History:
    """The runs of a ledger, as the entries were when each property was first read."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @cached_property
    def _started(self) -> dict[int, Entry]:
        return {entry.run: entry for entry in self.store.entries(STARTED) if entry.run is not None}

    @cached_property
    def _results(self) -> dict[int, Entry]:
        """The entry that ended each finished run."""
        found = [entry for event in (ACCEPTED, REJECTED) for entry in self.store.entries(event)]
        return {entry.run: entry for entry in sorted(found) if entry.run is not None}

    @property
    def last_run(self) -> int:
        """Number of the newest run; 0 without one."""
        return max(self._started, default=0)

    @property
    def unfinished(self) -> Entry | None:
        """The entry that began the run without a result; None if all are finished."""
        return next((entry for run, entry in self._started.items() if run not in self._results), None)

    @property
    def accepted_runs(self) -> list[tuple[int, list[int]]]:
        """The number of each accepted run and the requests that it took up, in order."""
        return [
            (run, self._started[run].payload["requests"])
            for run, entry in self._results.items()
            if entry.event == ACCEPTED
        ]

    @property
    def accepted_requests(self) -> list[int]:
        """Numbers of the requests that were accepted, sorted."""
        return sorted(number for _, numbers in self.accepted_runs for number in numbers)

    @cached_property
    def open_requests(self) -> list[int]:
        """Numbers of the requests that no run has accepted, sorted."""
        return [request.number for request in requests(self.store) if request.is_open]

    @cached_property
    def model(self) -> dict[str, str]:
        """The record of the newest accepted model; at first that of the model that the ledger was made for."""
        accepted = self.store.last(ACCEPTED) or next(self.store.entries(CREATED))
        recorded: dict[str, str] = accepted.payload["model"]
        return recorded

    @cached_property
    def first_test_accuracy(self) -> float | None:
        """Test accuracy (percent) of the ledger's first model, which the first run measured."""
        first: dict[str, Any] = self._started[min(self._started)].payload
        accuracy: float | None = first["before"]["test"]
        return accuracy

    def requests_of(self, run: int) -> list[int]:
        """Return the numbers of the requests that a run took up."""
        numbers: list[int] = self._started[run].payload["requests"]
        return numbers

    def excluded_by(self, run: int) -> list[int]:
        """Return the numbers of the open requests that a run left out; their examples are not retained either."""
        numbers: list[int] = self._started[run].payload["excluded"]
        return numbers

    def localizes_accepted(self, run: int) -> bool:
        """Return whether a run localized the examples of every accepted request beside its own."""
        localize_on: str = self._started[run].payload["localize_on"]
        return localize_on == "all"

    def settings_of(self, run: int, attempt: int) -> dict[str, Any]:
        """Return the settings of an attempt of a run, from 1."""
        settings: dict[str, Any] = self._started[run].payload["attempts"][attempt - 1]
        return settings

    def result_of(self, run: int) -> dict[str, Any]:
        """Return the payload of the entry that ended a run."""
        return self._results[run].payload
