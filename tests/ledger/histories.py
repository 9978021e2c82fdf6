"""Entries of ledgers as ``delfast ledger`` writes them, with figures made up, for tests of the report."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from delfast.ledger.store import FIRST, Entry, canonical, entry_hash

START = datetime(2026, 3, 1, 8, 0, 7, 250000, tzinfo=timezone.utc)
ACCEPT = {"test_drop": 2.0, "attack_advantage": 0.1, "relearn_ratio": 1.5}
SETTINGS = {"method": "del", "budget": 0.3, "epochs": 10, "lr": 0.015}


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
        versions = {"delfast": "0.2.0", "torch": "2.11.0", "python": "3.11.2", "platform": "Linux x86_64"}
        payload = {"job": job, "data": hexadecimal("data"), "model": artefact("models/0000.safetensors")}
        self(
            "created",
            {
                **payload,
                "hash_ids": hash_ids,
                "key_check": None,
                "examples": 4500,
                "accept": ACCEPT,
                "versions": versions,
            },
        )

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
        accepted: bool = True,
        drop: float = 0.4,
        ratio: float = 1.1,
    ) -> None:
        """Append a whole run, from started to its verdict."""
        folder = f"runs/{number:04d}"
        model = artefact(f"models/{number:04d}.safetensors" if accepted else f"{folder}/model.safetensors")
        versions = {"delfast": "0.2.0", "torch": "2.11.0", "python": "3.11.2", "platform": "Linux x86_64"}
        start = {"requests": list(requests), "settings": SETTINGS, "localize_on": "new", "forget": count, "seed": 0}
        self(
            "started", {**start, "retain": 4500 - 40 * number, "model": artefact(before), "versions": versions}, number
        )
        mask = {"mask": artefact(f"{folder}/mask.safetensors"), "selected": 210_000, "total": 701_466, "channels": 913}
        self("localized", {**mask, "seconds": 2.4}, number)
        self("unlearned", {"model": model, "settings": SETTINGS, "seconds": 61.7}, number)
        self("verified", {"changed": 209_871, "outside": 0, "seconds": 0.3}, number)
        found = figures(number, count, earlier, ratio)
        self("audited", {"audit": artefact(f"{folder}/audit.json"), "figures": found, "seconds": 31.0}, number)
        checks = [
            check("verified", 0, 0, True),
            check("test_drop", drop, ACCEPT["test_drop"]),
            check("attack_advantage", found["sets"]["forget"]["attack_advantage"]["value"], 0.1, where="forget"),
            check("relearn_ratio", ratio, ACCEPT["relearn_ratio"], where="forget 10 %"),
        ]
        if accepted:
            self("accepted", {"model": model, "checks": checks}, number)
        else:
            advice = ["a larger budget, 0.4 in place of 0.3", "more epochs, 20 in place of 10"]
            self("rejected", {"model": artefact(before), "checks": checks, "advice": advice}, number)


def check(name: str, value: float, limit: float, held: bool | None = None, where: str | None = None) -> dict[str, Any]:
    """Return one comparison with a threshold."""
    return {
        "name": name,
        "value": value,
        "limit": limit,
        "held": value <= limit if held is None else held,
        "set": where,
    }


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
        **{f"request {each}": measured(40, 70.0 + 0.8 * (number - each), 0.03) for each in earlier},
    }
    steps = [0, 5, 10, 20, 40]
    curves = {
        name: {
            "steps": steps,
            "accuracy": [65 + gain * (1 - math.exp(-step / 15)) for step in steps],
            "control": [[64 + shift + gain * (1 - math.exp(-step / 18)) for step in steps] for shift in (0, 1, 2)],
            "trained_on": size,
            "ratio": figure(ratio, 0.3, 0),
        }
        for name, gain, size in (("retain", 4, 3900), ("forget 10 %", 14, max(1, count // 10)))
    }
    return {
        "sets": sets,
        "classes": {"retain": [figure(97, 1), figure(96, 1), None], "test": [figure(85, 5), figure(80, 5), None]},
        "relearning": {**curves, "forget 1 %": {"left_out": f"1 % of {count} examples is less than one"}},
        "relearn_ratio": figure(ratio, 0.3, 0),
        "oracle": None,
        "settings": {"seed": 0, "relearning": {"steps": 40, "lr": 0.01}},
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

    write("references", {"action": "added", "references": [artefact("references/0.safetensors")], "requests": []})
    write.receive(1, ids(0, 40), reason, "2026-04-01")
    write.run(1, [1], count=40)
    write.receive(2, ids(100, 25))
    write.receive(3, ids(200, 15), "wrong labels")
    write.run(2, [2, 3], count=40, earlier=[1], before="models/0001.safetensors", drop=1.1)
    write.receive(4, ids(300, 90), "an account was closed", "2026-03-20")
    write.run(3, [4], count=90, earlier=[1, 2, 3], before="models/0002.safetensors", accepted=False, ratio=2.7)
    write.receive(5, ids(400, 30))
    write.run(4, [5], count=30, earlier=[1, 2, 3], before="models/0002.safetensors", drop=1.7, ratio=1.38)
    write("purged", {"files": [{**artefact("models/0000.safetensors"), "why": "superseded"}]})
    write.receive(6, ids(500, 3), None, "2026-04-15")
    return write.entries
