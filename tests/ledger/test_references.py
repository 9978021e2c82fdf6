"""Reference models: which examples each knows, and files that hold requested examples by them and by masks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from delfast.errors import InputError
from delfast.ledger import Ledger, references
from delfast.ledger.references import half, references_of, with_members
from tests.ledger.jobs import make_ledger, persons, write_job

FINETUNE = {"method": "finetune", "epochs": 1, "lr": 0.02}


def test_half_of_the_examples_is_the_same_for_ever() -> None:
    members = half(12, torch.tensor([0, 5]), 500_000_001)
    assert members.nonzero().flatten().tolist() == [1, 3, 4, 6, 8]
    assert int(half(11, torch.tensor([0]), 3).sum()) == 5


@pytest.fixture
def ledger(made: Path, tmp_path: Path) -> Iterator[Ledger]:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    with Ledger.open(tmp_path / "ledger", job=tmp_path / "job.py") as opened:
        yield opened


@pytest.mark.long
def test_entry_has_the_newest_request_and_a_digest_of_the_examples(ledger: Ledger) -> None:
    ledger.add(persons(0, 40))
    ledger.add(persons(40, 60))
    assert ledger.train_references(3, device="cpu") == [3]
    assert ledger.train_references(3, device="cpu") == []
    *_, entry = ledger.store.entries("references")
    assert entry.payload.keys() == {"reference", "model", "seed", "newest_request", "known", "examples", "seconds"}
    assert entry.payload["newest_request"] == 2
    *_, (newest, members) = with_members(ledger, references_of(ledger.store))
    assert list(newest.requests) == [1, 2] and int(members.sum()) == 120 and not members[:60].any()


@pytest.mark.long
def test_examples_that_are_not_the_recorded_ones_are_refused(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong half would give wrong figures, and leave files that hold erased examples out of a purge."""
    ledger.add(persons(0, 40))
    monkeypatch.setattr(references, "half", lambda count, unknown, seed: half(count, unknown, seed + 1))
    head = ledger.head
    with pytest.raises(InputError, match="the examples of reference 1 are not those that its entry records"):
        ledger.run(method="finetune", device="cpu")
    assert ledger.head == head
    held = {each.file: each for each in ledger.holding()}
    for number in (1, 2):
        assert held[f"references/000{number}.safetensors"].requests == (1,)
        assert "may have seen some of them" in held[f"references/000{number}.safetensors"].why


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "localize_on", "expected"),
    [({"strategy": "salloc"}, "new", (2,)), ({}, "all", (1, 2)), ({"strategy": "weighted-grad-all"}, "new", (2, 4))],
)
def test_mask_is_listed_under_the_requests_that_chose_it(
    tmp_path: Path, options: dict[str, Any], localize_on: Any, expected: tuple[int, ...]
) -> None:
    """Request 1 was accepted before, request 3 is left out, request 4 comes later: retained in run 2."""
    job = write_job(tmp_path, {"test_drop": 60.0}, [FINETUNE, {**FINETUNE, "budget": 0.3, **options}])
    with make_ledger(tmp_path, job) as ledger:
        for first in (0, 20, 40):
            ledger.add(persons(first, first + 20))
        ledger.run(requests=[1], device="cpu")
        job = write_job(tmp_path, {"test_drop": 60.0}, [{**FINETUNE, "budget": 0.3, **options}])
        with Ledger.open(ledger.path, job=job) as opened:
            opened.run(requests=[2], localize_on=localize_on, device="cpu")
            opened.add(persons(60, 80))
            masks = [each.requests for each in opened.holding() if "mask" in each.file or "allowed" in each.file]
        assert masks == [expected, expected]


def test_plan_of_a_purge_needs_the_job(made: Path) -> None:
    with Ledger.open(made / "ledger") as opened, pytest.raises(InputError, match="expected the job of the ledger"):
        opened.purge_plan()
