"""Reference models, each trained on a random half of the examples: for the audit's per-example attack.

They are trained once and serve every run. The entry that recorded a reference determines its training examples: by its
seed, and by the number of the newest request then, since it was trained without the examples of every request so far.
The entry has a digest of these examples, too.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from delfast.arguments import check_count
from delfast.errors import InputError
from delfast.evaluation import Reference
from delfast.experiments.run import choose_device
from delfast.ledger.artefacts import REFERENCE_MODELS, Recorded, artefact
from delfast.ledger.events import PURGED, RECEIVED, REFERENCES
from delfast.ledger.networks import drawing, load_recorded
from delfast.ledger.store import Store
from delfast.provenance import digest_tensor
from delfast.seeding import seeded
from delfast.unlearning import train

if TYPE_CHECKING:
    from delfast.ledger.records import Records

MOMENTUM = 0.9  # of SGD, as in every training of the DEL paper
SEED = 500_000_000  # added to a reference's number: far from the seeds of runs


class UnknownMembers(InputError):
    """The examples that a reference was trained on do not follow from its entry."""


@dataclass(frozen=True)
class Trained:
    """A reference of the ledger: its number, its file, the seed of its half, the newest request then, 0 for none.

    known: SHA-256 (hex) of the positions of the examples that it was trained on.
    """

    number: int
    model: Mapping[str, str]
    seed: int
    newest_request: int
    known: str

    @property
    def requests(self) -> range:
        """Numbers of the requests whose examples it was trained without; they are numbered from 1 without a gap."""
        return range(1, self.newest_request + 1)

    def members(self, count: int, unknown: Tensor) -> Tensor:
        """Return bool (count,): the reference was trained on the example; ``unknown``: those of its requests.

        UnknownMembers if they are not those that were recorded.
        """
        members = half(count, unknown, self.seed)
        if digest(members) != self.known:
            raise UnknownMembers(
                f"the examples of reference {self.number} are not those that its entry records; verify the ledger, and "
                "purge the reference"
            )
        return members

    def for_audit(
        self, ledger: Records, members: Tensor, sets: Mapping[str, Tensor], device: torch.device
    ) -> Reference:
        """Return the reference as the audit takes it; the network is loaded when it is used."""
        return Reference(
            partial(load_recorded, ledger, self.model, device),
            {name: members[positions] for name, positions in sets.items()},
        )


def half(count: int, unknown: Tensor, seed: int) -> Tensor:
    """Return bool (count,): a random half of the examples that are not among the ``unknown`` positions.

    The numbers are of Python's random(), whose sequence for a seed is promised to stay the same; no promise covers
    torch.randperm.
    """
    draw = random.Random(seed).random
    numbers = torch.tensor([draw() for _ in range(count)], dtype=torch.float64)
    numbers[unknown] = 2.0  # above each number
    members = torch.zeros(count, dtype=torch.bool)
    members[numbers.argsort(stable=True)[: (count - len(unknown)) // 2]] = True
    return members


def digest(members: Tensor) -> str:
    """Return the SHA-256 (hex) of the positions of these examples."""
    return digest_tensor(members.nonzero().flatten()).hex()


def references_of(store: Store) -> list[Trained]:
    """Return the references that were trained and not purged, in order."""
    trained = list(store.entries(REFERENCES))
    present = Recorded.of(sorted([*trained, *store.entries(PURGED)])).digests
    found = (entry.payload for entry in trained)
    return [
        Trained(each["reference"], each["model"], each["seed"], each["newest_request"], each["known"])
        for each in found
        if present.get(each["model"]["file"]) == each["model"]["digest"]
    ]


def with_members(ledger: Records, references: Iterable[Trained]) -> Iterator[tuple[Trained, Tensor]]:
    """Yield each reference and bool (training examples,): it was trained on the example."""
    unknown = UnknownExamples(ledger)
    for reference in references:
        yield reference, reference.members(ledger.job.count, unknown.of(reference))


class UnknownExamples:
    """The examples that references were trained without; most were trained together, without the same requests."""

    def __init__(self, ledger: Records) -> None:
        self._ledger = ledger
        self._found: dict[int, Tensor] = {}

    def of(self, reference: Trained) -> Tensor:
        """Return the positions (examples,), int64, of the requests that came before a reference."""
        if reference.newest_request not in self._found:
            self._found[reference.newest_request] = self._ledger.positions(reference.requests)
        return self._found[reference.newest_request]


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
    received = ledger.store.last(RECEIVED)
    newest = 0 if received is None else received.payload["request"]
    members = half(job.count, ledger.positions(range(1, newest + 1)), seed)
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
    path = ledger.path / REFERENCE_MODELS / f"{number:04d}{Path(first['file']).suffix}"
    path.parent.mkdir(exist_ok=True)
    job.save(network, path)
    ledger.store.append(
        REFERENCES,
        {
            "reference": number,
            "model": artefact(ledger.path, path),
            "seed": seed,
            "newest_request": newest,
            "known": digest(members),
            "examples": len(positions),
            "seconds": time.perf_counter() - started,
        },
    )
