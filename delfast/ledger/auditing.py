"""The audit of one of a ledger's models, as its entries record it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from delfast.errors import InputError
from delfast.evaluation import Relearning, audit
from delfast.files import write_json
from delfast.ledger.artefacts import artefact
from delfast.ledger.examples import Examples
from delfast.ledger.history import History
from delfast.ledger.networks import load_recorded
from delfast.ledger.references import references_of, with_members

if TYPE_CHECKING:
    from delfast.ledger.records import Records


def audit_recorded(
    ledger: Records,
    history: History,
    model: Mapping[str, str],
    examples: Examples,
    references: Sequence[int],
    seed: int,
    device: torch.device,
    path: Path,
) -> dict[str, Any]:
    """Audit a recorded model with the references of these numbers; return the artefact and the figures."""
    job = ledger.job
    earlier = {f"run {run}": ledger.positions(numbers) for run, numbers in history.accepted_runs}
    sets = {"forget": examples.forget, **earlier}
    chosen = [each for each in references_of(ledger.store) if each.number in references]
    if len(chosen) < len(references):
        raise InputError("reference models of this run were purged; end it by `delfast ledger run --abandon`")
    found = audit(
        load_recorded(ledger, model, device),
        forget=job.batches(examples.forget),
        retain=job.batches(examples.retain),
        test=job.test_batches(),
        earlier={name: job.batches(positions) for name, positions in earlier.items()},
        references=[
            reference.for_audit(ledger, members, sets, device) for reference, members in with_members(ledger, chosen)
        ]
        or None,
        relearn=Relearning() if chosen else None,
        loss_fn=job.loss_fn,
        seed=seed,
    )
    figures = found.as_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures)
    return {"audit": artefact(ledger.path, path), "figures": figures}
