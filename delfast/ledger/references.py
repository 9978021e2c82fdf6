"""Reference models, each trained on a random half of the examples: for the audit's per-example attack.

They are trained once and serve every run. The entry that recorded a reference gives the examples that it was
trained on: by its seed, and the requests whose examples it was trained without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from delfast.arguments import check_count
from delfast.evaluation import Reference
from delfast.experiments.run import choose_device
from delfast.ledger.artefacts import PURGED, Recorded, artefact
from delfast.ledger.networks import drawing, load_recorded
from delfast.ledger.store import Store
from delfast.seeding import seeded
from delfast.unlearning import train

if TYPE_CHECKING:
    from delfast.ledger.records import Records

REFERENCES = "references"
MOMENTUM = 0.9  # of SGD, as in every training of the DEL paper
SEED = 500_000_000  # added to a reference's number: far from the seeds of runs


@dataclass(frozen=True)
class Trained:
    """A reference of the ledger: its number, its file, the seed of its half, and the requests it never saw."""

    number: int
    model: Mapping[str, str]
    seed: int
    requests: tuple[int, ...]

    def members(self, count: int, unknown: Tensor) -> Tensor:
        """Return bool (count,): the reference was trained on the example; ``unknown``: those of its requests."""
        allowed = torch.ones(count, dtype=torch.bool)
        allowed[unknown] = False
        positions = allowed.nonzero().flatten()
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(self.seed))
        members = torch.zeros(count, dtype=torch.bool)
        members[positions[order[: len(positions) // 2]]] = True
        return members

    def for_audit(
        self, ledger: Records, members: Tensor, sets: Mapping[str, Tensor], device: torch.device
    ) -> Reference:
        """Return the reference as the audit takes it; the network is loaded when it is used."""
        return Reference(
            partial(load_recorded, ledger, self.model, device),
            {name: members[positions] for name, positions in sets.items()},
        )


def references_of(store: Store) -> list[Trained]:
    """Return the references that were trained and not purged, in order."""
    trained = list(store.entries(REFERENCES))
    present = Recorded.of(sorted([*trained, *store.entries(PURGED)])).digests
    found = (entry.payload for entry in trained)
    return [
        Trained(each["reference"], each["model"], each["seed"], tuple(each["requests"]))
        for each in found
        if present.get(each["model"]["file"]) == each["model"]["digest"]
    ]


def with_members(ledger: Records, references: Iterable[Trained]) -> Iterator[tuple[Trained, Tensor]]:
    """Yield each reference and bool (training examples,): it was trained on the example."""
    known: dict[tuple[int, ...], Tensor] = {}  # most references were trained together, without the same requests
    for reference in references:
        if reference.requests not in known:
            known[reference.requests] = ledger.positions(reference.requests)
        yield reference, reference.members(ledger.job.count, known[reference.requests])


def train_references(ledger: Records, count: int, *, device: str, watch: Callable[[str], None]) -> list[int]:
    """Train references until the ledger has ``count``; return the numbers of the new ones.

    None is trained on an example of a request that was received before. Each is recorded when it is trained, so a
    stopped command continues with the next call.
    """
    check_count("count", count)
    with ledger.lock(), ledger.job.naming_errors():
        chosen = choose_device(device)
        missing = count - len(references_of(ledger.store))
        last = ledger.store.last(REFERENCES)
        first = 1 if last is None else last.payload["reference"] + 1
        numbers = list(range(first, first + max(0, missing)))
        for number in numbers:
            _train(ledger, number, chosen)
            watch(f"reference model {number} is trained ({number - first + 1} of {len(numbers)})")
        return numbers


def _train(ledger: Records, number: int, device: torch.device) -> None:
    started = time.perf_counter()
    job, seed = ledger.job, SEED + number
    requests = [request.number for request in ledger.requests()]
    reference = Trained(number, {}, seed, tuple(requests))
    ((_, members),) = with_members(ledger, [reference])
    positions = members.nonzero().flatten()
    with seeded(seed):
        network = job.model().to(device)
    settings = job.training
    optimizer = torch.optim.SGD(
        network.parameters(), lr=settings.lr, momentum=MOMENTUM, weight_decay=settings.weight_decay
    )
    with drawing(seed, device):
        train(
            network,
            job.batches(positions, shuffle=True, seed=seed),
            optimizer,
            epochs=settings.epochs,
            loss_fn=job.loss_fn,
        )
    first: dict[str, Any] = ledger.created["model"]
    path = ledger.path / REFERENCES / f"{number:04d}{Path(first['file']).suffix}"
    path.parent.mkdir(exist_ok=True)
    job.save(network, path)
    ledger.store.append(
        REFERENCES,
        {
            "action": "trained",
            "reference": number,
            "model": artefact(ledger.path, path),
            "seed": seed,
            "requests": requests,
            "examples": len(positions),
            "seconds": time.perf_counter() - started,
        },
    )
