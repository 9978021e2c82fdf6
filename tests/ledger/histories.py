"""Entries of ledgers as ``delfast ledger`` writes them, with figures made up, for tests of the report.

test_histories.py compares the payloads with those of real runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from delfast.ledger.results import HeldFile
from delfast.ledger.store import FIRST, Entry, canonical, entry_hash

START = datetime(2026, 3, 1, 8, 0, 7, 250000, tzinfo=timezone.utc)
ACCEPT = {"test_drop": 2.0, "attack_advantage": 0.1, "relearn_ratio": 1.5}
SETTINGS = {"method": "del", "budget": 0.3, "epochs": 10, "lr": 0.015}
RETRAIN = {"method": "retrain", "epochs": 30, "lr": 0.1, "weight_decay": 0.0}
VERSIONS = {"delfast": "0.2.0", "torch": "2.11.0", "numpy": "2.4.0", "python": "3.11.2", "platform": "Linux x86_64"}


def hexadecimal(text: str) -> str:
    """Return a digest."""
    return hashlib.sha256(text.encode()).hexdigest()


def artefact(file: str) -> dict[str, str]:
    """Return a file and its digest, as events record them."""
    return {"file": file, "digest": hexadecimal(file)}


class Writer:
    """Chains entries, each 37 minutes after the one before."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def __call__(self, event: str, payload: dict[str, Any], run: int | None = None) -> None:
        number = len(self.entries) + 1
        time = (START + timedelta(minutes=37 * number)).isoformat(timespec="microseconds")
        previous = self.entries[-1].hash if self.entries else FIRST
        fields = (number, time, event, run, canonical(payload), previous)
        self.entries.append(Entry(*fields, entry_hash(*fields)))

    def create(self, *, hash_ids: bool = False) -> None:
        """Append the first entry."""
        job = {"name": "photos", "path": "/home/ana/photos.py", "digest": hexadecimal("job")}
        payload = {"job": job, "data": hexadecimal("data"), "model": artefact("models/0000.safetensors")}
        self(
            "created",
            {
                **payload,
                "hash_ids": hash_ids,
                "key_check": None,
                "examples": 4500,
                "accept": ACCEPT,
                "versions": VERSIONS,
            },
        )

    def reference(self, number: int, requests: Sequence[int] = ()) -> None:
        """Append a reference model, trained without the examples of the requests that came before."""
        model = artefact(f"references/{number:04d}.safetensors")
        trained = {"action": "trained", "reference": number, "model": model, "seed": 500_000_000 + number}
        self("references", {**trained, "requests": list(requests), "examples": 2250, "seconds": 55.5})

    def purge(self, file: str, requests: Sequence[int]) -> None:
        """Append the deletion of a file."""
        self("purged", {"files": [{**artefact(file), "why": "superseded", "requests": list(requests)}]})

    def receive(self, number: int, ids: Sequence[str], reason: str | None = None, due: str | None = None) -> None:
        """Append a request."""
        self("received", {"request": number, "ids": list(ids), "count": len(ids), "reason": reason, "due": due})

    def run(
        self,
        number: int,
        requests: Sequence[int],
        *,
        count: int,
        earlier: Sequence[int] = (),
        before: str = "models/0000.safetensors",
        drop: float = 0.4,
        ratios: Sequence[float] = (1.1,),
    ) -> None:
        """Append a whole run: an attempt for each ratio, of which the last alone may be accepted.

        ``earlier``: the accepted runs before. Attempts after the first retrain.
        """
        attempts = [SETTINGS if number == 1 else RETRAIN for number, _ in enumerate(ratios, start=1)]
        self.start(number, requests, count=count, before=before, attempts=attempts)
        tried = []
        for attempt, (settings, ratio) in enumerate(zip(attempts, ratios, strict=True), start=1):
            checks = self._attempt(number, attempt, settings, count, earlier, drop, ratio)
            tried.append({"attempt": attempt, "settings": settings, "checks": checks})
        if all(check["held"] for check in tried[-1]["checks"]):
            model = artefact(model_of(number, len(ratios)))
            self("accepted", {"model": model, "attempts": tried, "checks": tried[-1]["checks"]}, number)
        else:
            self("rejected", {"attempts": tried, "checks": tried[-1]["checks"], "advice": ["a larger budget"]}, number)

    def start(
        self,
        number: int,
        requests: Sequence[int],
        *,
        count: int,
        before: str = "models/0000.safetensors",
        attempts: Sequence[dict[str, Any]] = (SETTINGS,),
    ) -> None:
        """Append the beginning of a run."""
        settings = {"settings": attempts[0], "attempts": list(attempts), "localize_on": "new", "seed": 1000 * number}
        sizes = {"forget": count, "retain": 4500 - 40 * number}
        inputs = {"job": hexadecimal("job"), "model": artefact(before), "accept": ACCEPT, "accept_unmeasured": False}
        accuracies = {"before": {"forget": 100.0, "retain": 98.2, "test": 84.3}}
        versions = {"versions": {**VERSIONS, "device": "cpu"}}
        others = {"excluded": [], "references": [1]}
        self(
            "started",
            {"requests": list(requests), **others, **settings, **sizes, **inputs, **accuracies, **versions},
            number,
        )
        found = figures(0, count, [], 4.0)
        found["sets"]["forget"]["attack_advantage"] = figure(0.4, 0.1)
        self(
            "baseline",
            {"audit": artefact(f"runs/{number:04d}/baseline.json"), "figures": found, "seconds": 12.0},
            number,
        )

    def resume(self, number: int) -> None:
        """Append that a stopped run goes on."""
        self("resumed", {"versions": {**VERSIONS, "device": "cpu"}}, number)

    def fail(self, number: int, error: str) -> None:
        """Append the end of a run whose only attempt failed."""
        checks = [{**check("method", 0, 0, False, error), "value": None, "limit": None}]
        self("failed", {"attempt": 1, "error": error}, number)
        tried = [{"attempt": 1, "settings": SETTINGS, "checks": checks}]
        self("rejected", {"attempts": tried, "checks": checks, "advice": [f"del failed: {error}"]}, number)

    def _attempt(
        self,
        number: int,
        attempt: int,
        settings: dict[str, Any],
        count: int,
        earlier: Sequence[int],
        drop: float,
        ratio: float,
    ) -> list[dict[str, Any]]:
        """Append the steps of one attempt, and return its checks."""

        def step(event: str, payload: dict[str, Any], seconds: float) -> None:
            self(event, {"attempt": attempt, **payload, "seconds": seconds}, number)

        folder = f"runs/{number:04d}/{attempt}"
        if settings["method"] == "del":
            mask = artefact(f"{folder}/mask.safetensors")
            step("localized", {"mask": mask, "selected": 210_000, "total": 701_466, "channels": 913}, 2.4)
        files = {"model": artefact(model_of(number, attempt)), "allowed": artefact(f"{folder}/allowed.safetensors")}
        step("unlearned", {**files, "settings": settings, "losses": [0.4, 0.2]}, 61.7)
        step("verified", {"changed": 209_871, "outside": 0}, 0.3)
        found = figures(number, count, earlier, ratio)
        step("audited", {"audit": artefact(f"{folder}/audit.json"), "figures": found}, 31.0)
        advantage = found["sets"]["forget"]["attack_advantage"]
        return [
            check("outside_mask", 0, 0, True, "model"),
            check("test_drop", drop, ACCEPT["test_drop"], where="test")
            | {"low": drop - 1, "high": drop + 1, "before": 0.0},
            check("attack_advantage", advantage["value"], 0.1)
            | {"low": advantage["low"], "high": advantage["high"], "before": 0.4},
            check("relearn_ratio", ratio, ACCEPT["relearn_ratio"])
            | {"low": ratio - 0.3, "high": ratio + 0.3, "before": 4.0},
        ]


def model_of(run: int, attempt: int = 1) -> str:
    """Return the file of a run's model."""
    return f"runs/{run:04d}/{attempt}/model.safetensors"


def check(name: str, value: float, limit: float, held: bool | None = None, where: str = "forget") -> dict[str, Any]:
    """Return one comparison with a threshold, without an interval."""
    found = {"name": name, "value": value, "limit": limit, "held": value <= limit if held is None else held}
    return {**found, "set": where, "low": None, "high": None, "before": None, "reason": None}


def figure(value: float, half: float, low: float = -math.inf, high: float = math.inf) -> dict[str, float]:
    """Return a figure and its interval, cut at the ends of its range."""
    return {"value": value, "low": max(low, value - half), "high": min(high, value + half)}


def figures(number: int, count: int, earlier: Sequence[int], ratio: float) -> dict[str, Any]:
    """Return the figures of an audit."""

    def measured(size: int, accuracy: float, advantage: float | None = None) -> dict[str, Any]:
        half = 98 / math.sqrt(size)
        lira = {"auc": figure(0.52, 0.05, 0, 1), "tpr_at_1_percent": figure(2, 2, 0, 100), "examples": size}
        return {
            "count": size,
            "accuracy": figure(accuracy, half, 0, 100),
            "loss": figure(2.3 - accuracy / 50, 0.1, 0),
            "attack_advantage": None if advantage is None else figure(advantage, 0.6 / math.sqrt(size), 0, 1),
            "attack_left_out": 0,
            "lira": None if advantage is None else {**lira, "left_out": 0},
            "kl": None,
        }

    sets = {
        "forget": measured(count, 71.0 - 2 * number, 0.02 + 0.01 * number),
        "retain": measured(4000, 97.4 - 0.3 * number),
        "test": measured(1000, 84.1 - 0.4 * number),
        "control": measured(500, 83.5 - 0.4 * number),
        **{f"run {each}": measured(40, 70.0 + 0.8 * (number - each), 0.03) for each in earlier},
    }
    steps = [0, 5, 10, 20, 40]
    curves = {
        name: {
            "steps": steps,
            "accuracy": [65 + gain * (1 - math.exp(-step / 15)) for step in steps],
            "control": [[64 + shift + gain * (1 - math.exp(-step / 18)) for step in steps] for shift in (0, 1, 2)],
            "loss": [1.2 - 0.01 * step for step in steps],
            "trained_on": size,
            "measured": count - size,
            "advantage": figure(1.0, 0.2),
            "compared_on": [count - size],
            "ratio_left_out": None,
            "ratio": figure(ratio, 0.3, 0),
        }
        for name, gain, size in (("retain", 4, 0), ("forget 10 %", 14, max(1, count // 10)))
    }
    return {
        "sets": sets,
        "classes": {"retain": [figure(97, 1), figure(96, 1), None], "test": [figure(85, 5), figure(80, 5), None]},
        "relearning": {**curves, "forget 1 %": {"left_out": f"1 % of {count} examples is less than one"}},
        "relearn_ratio": figure(ratio, 0.3, 0),
        "oracle": None,
        "settings": {
            "seed": 0,
            "relearning": {
                "steps": 40,
                "lr": 0.01,
                "batch_size": 64,
                "fractions": [0.01, 0.1],
                "every": 10,
                "max_examples": 500,
            },
        },
        "seconds": {"inference": 4.0, "lira": 2.0, "relearning": 25.0},
    }


def names(first: int, count: int) -> list[str]:
    """Return identifiers of examples."""
    return [f"IMG_{position:05d}.jpg" for position in range(first, first + count)]


def example(*, hash_ids: bool = False, reason: str = "withdrawn consent, letter of 2 March") -> list[Entry]:
    """Return the entries of a ledger with six requests: four accepted, one rejected, one pending."""
    write = Writer()
    write.create(hash_ids=hash_ids)

    def ids(first: int, count: int) -> list[str]:
        found = names(first, count)
        return [f"hmac-sha256:{hexadecimal('key' + each)}" for each in found] if hash_ids else found

    write.reference(1)
    write.receive(1, ids(0, 40), reason, "2026-04-01")
    write.run(1, [1], count=40)
    write.receive(2, ids(100, 25))
    write.receive(3, ids(200, 15), "wrong labels")
    write.run(2, [2, 3], count=40, earlier=[1], before=model_of(1), drop=1.1)
    write.receive(4, ids(300, 90), "an account was closed", "2026-03-20")
    write.run(3, [4], count=90, earlier=[1, 2], before=model_of(2), ratios=[2.7])
    write.receive(5, ids(400, 30))
    write.run(4, [5], count=30, earlier=[1, 2], before=model_of(2), drop=1.7, ratios=[2.2, 1.38])
    write.purge("models/0000.safetensors", [1, 2, 3, 4, 5])
    write.receive(6, ids(500, 3), None, "2026-04-15")
    return write.entries


def held() -> list[HeldFile]:
    """Return files of the example that still hold requested examples."""
    files = {
        "references/0001.safetensors": ((1, 2, 3, 4, 5, 6), "reference model 1, trained on some of them"),
        model_of(2): ((4, 5, 6), "the model of run 2, which did not unlearn them"),
        "runs/0004/1/mask.safetensors": ((5,), "the mask of run 4, chosen by them"),
        model_of(4, 2): ((6,), "the model of run 4, trained on them"),
    }
    return [HeldFile(file, hexadecimal(file), 4096, requests, why) for file, (requests, why) in files.items()]
