"""The records of a ledger: how it is made and opened, its requests, and the positions of their examples."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from delfast.errors import InputError
from delfast.ledger import requests as queries
from delfast.ledger.artefacts import artefact
from delfast.ledger.identifiers import Identifiers, checked, read_key
from delfast.ledger.requests import CREATED, RECEIVED, Request, RequestDetails, read_request
from delfast.ledger.store import Store
from delfast.ledger.verification import creation

if TYPE_CHECKING:  # imports torch
    from torch import Tensor

    from delfast.jobs import Job

MODELS = "models"
VERSIONS = ("delfast", "torch", "numpy", "python", "platform")
R = TypeVar("R", bound="Records")


class Records:
    """The part of ``delfast.ledger.Ledger`` that its work stands on."""

    def __init__(self, store: Store, job: Job | None, identifiers: Identifiers | None) -> None:
        self.store = store
        self._job = job
        self._identifiers = identifiers
        self.path = store.path.parent.resolve()

    @classmethod
    def create(
        cls: type[R],
        path: str | os.PathLike[str],
        *,
        job: str | os.PathLike[str],
        model: str | os.PathLike[str],
        hash_ids: str | os.PathLike[str] | None = None,
    ) -> R:
        """Make a ledger for a trained model. The job file is executed: it must be your own.

        Parameters
        ----------
        path : path-like
            Directory to make; it must not exist, or be empty.
        job : path-like
            Your job file (docs/job_files.md).
        model : path-like
            Checkpoint of the trained model, as the job's ``load`` reads it. It is copied into the ledger.
        hash_ids : path-like, optional
            File of a secret key outside the ledger; made, for its owner alone, if it does not exist. With it the ledger
            stores identifiers as their HMAC-SHA-256, and later commands need the same file. Default: as text.

        Returns
        -------
        Ledger
            The new ledger, open.

        Raises
        ------
        InputError
            If the directory is not empty, the job or the model cannot be read, or the key is short or in the ledger.
            Nothing was made then.

        Examples
        --------
        >>> from delfast.ledger import Ledger
        >>> ledger = Ledger.create("ledger", job="job.py", model="model.safetensors")  # doctest: +SKIP
        """
        from delfast.files import directory_for, sync_directory, write_atomically
        from delfast.jobs import read_job

        path, model = Path(path), Path(model)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"expected no ledger at '{path}' yet, there is something; choose another directory")
        read = read_job(job)
        facts = _facts(read, model)
        key = None if hash_ids is None else read_key(hash_ids, path, make=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with directory_for(path.absolute()) as (directory, _):
            making = directory / "ledger"
            kept = making / MODELS / f"0000{model.suffix}"
            kept.parent.mkdir(parents=True)
            write_atomically(kept, partial(_copy, model))
            store = Store.create(making)
            identifiers = Identifiers(key)
            secrecy = {"hash_ids": key is not None, "key_check": identifiers.key_check}
            store.append(CREATED, {**facts, **secrecy, "model": artefact(making, kept)})
            store.close()
            os.replace(making, path)  # a reader gets no ledger or a whole one
        sync_directory(path.absolute().parent)
        return cls(Store(path), read, identifiers)

    @classmethod
    def open(
        cls: type[R],
        path: str | os.PathLike[str],
        *,
        job: str | os.PathLike[str] | None = None,
        hash_ids: str | os.PathLike[str] | None = None,
    ) -> R:
        """Open a ledger.

        Nothing in the ledger is ever executed, so a job is passed again where it is needed.

        Parameters
        ----------
        path : path-like
            Directory of the ledger.
        job : path-like, optional
            Your job file, which is executed. Needed to add requests and to run them. It may have changed since the
            ledger was made; its training data may not.
        hash_ids : path-like, optional
            Key file of a ledger that stores identifiers as HMACs. Needed with a job, and by ``find``.

        Returns
        -------
        Ledger
            The ledger, open.

        Raises
        ------
        InputError
            If there is no ledger, the key is not the ledger's, or the job's training data are not the ledger's.

        Examples
        --------
        >>> from delfast.ledger import Ledger
        >>> Ledger.open("absent")
        Traceback (most recent call last):
        delfast.errors.InputError: expected a ledger at 'absent', found no ledger.sqlite3; make one: delfast ledger init
        """
        path = Path(path)
        store = Store(path)
        try:
            created = creation(store)
            identifiers = _identifiers(created, path, hash_ids)
            return cls(store, None if job is None else _same_job(job, created), identifiers)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Close the ledger's database.

        Examples
        --------
        >>> from delfast.ledger import Ledger
        >>> Ledger.open("ledger").close()  # doctest: +SKIP
        """
        self.store.close()

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the ledger's lock: one run, purge or training of references at a time. Requests can be added meanwhile.

        The lock ends with the process, however the process ends.

        Yields
        ------
        None
            While the lock is held.

        Raises
        ------
        InputError
            If another process holds the lock.

        Examples
        --------
        >>> with ledger.lock():  # doctest: +SKIP
        ...     ...
        """
        from delfast.files import LOCK, exclusive

        busy = f"another process is working on the ledger '{self.path}'; wait for its end and try again"
        with exclusive(self.path / LOCK, busy):
            yield

    # ---- what was given

    @property
    def created(self) -> dict[str, Any]:
        """Payload of the first entry: the job, its data, the model, and how identifiers are stored."""
        return creation(self.store)

    @property
    def job(self) -> Job:
        """The user's job; InputError without one."""
        if self._job is None:
            raise InputError(f"expected the job of the ledger; pass --job {self.created['job']['path']}")
        return self._job

    @property
    def identifiers(self) -> Identifiers:
        """Conversion of identifiers to their stored form; InputError where the key is missing."""
        if self._identifiers is None:
            raise InputError("expected the key file of the ledger, which stores HMACs; pass --hash-ids KEYFILE")
        return self._identifiers

    @property
    def has_positions(self) -> bool:
        """Whether ``positions`` can be found: the ledger was opened with the job and, where it needs one, the key."""
        return self._job is not None and self._identifiers is not None

    # ---- requests

    def add(self, ids: Iterable[str | int], *, reason: str | None = None, due: str | None = None) -> int:
        """Add one forget request.

        Parameters
        ----------
        ids : iterable of str or int
            Identifiers of the examples to forget, as the job's ``example_ids`` returns them.
        reason : str, optional
            Free text, stored as it is: write no personal data into it.
        due : str, optional
            Date by which it is to be done: ISO 8601, YYYY-MM-DD.

        Returns
        -------
        int
            Number of the request.

        Raises
        ------
        InputError
            For no identifiers, an unknown one, one given twice, or one of an earlier request. Nothing was added then.

        Examples
        --------
        >>> ledger.add(["3", "14"], due="2026-12-31")  # doctest: +SKIP
        1
        """
        return self.add_requests([{"ids": ids, "reason": reason, "due": due}])[0]

    def add_requests(self, requests: Iterable[Mapping[str, Any]]) -> list[int]:
        """Add many forget requests at once: all of them or, after an error, none.

        Parameters
        ----------
        requests : iterable of mapping
            The fields of each request: "ids" and optionally "reason" and "due", as ``add`` takes them.

        Returns
        -------
        list of int
            Numbers of the requests, in order.

        Raises
        ------
        InputError
            As ``add``; also for an identifier in two of the requests.

        Examples
        --------
        >>> ledger.add_requests([{"ids": ["3", "14"]}, {"ids": ["15"], "reason": "case 8"}])  # doctest: +SKIP
        [1, 2]
        """
        read = list(_read_all(requests))
        stored = [[self.identifiers.stored(each) for each in ids] for ids, _, _ in read]
        originals = _without_repeats(read, stored)
        self.job.positions(originals.values())  # names the first unknown one
        with self.store.writing() as append:
            for number, earlier in queries.stored_ids(self.store):
                for each in earlier:
                    if each in originals:
                        raise InputError(
                            f"expected examples that no request names yet, got '{originals[each]}', "
                            f"which request {number} names; leave it out"
                        )
            last = self.store.last(RECEIVED)
            first = 1 if last is None else last.payload["request"] + 1
            for number, ((_, reason, due), ids) in enumerate(zip(read, stored, strict=True), start=first):
                fields = {"request": number, "ids": ids, "count": len(ids), "reason": reason, "due": due}
                append(RECEIVED, fields)
        return list(range(first, first + len(read)))

    def requests(self) -> Iterator[Request]:
        """Return every request with its state, in order; they are read as they are taken, not kept in memory.

        Returns
        -------
        iterator of Request
            The requests.

        Examples
        --------
        >>> [request.number for request in ledger.requests() if request.is_open]  # doctest: +SKIP
        [2]
        """
        return queries.requests(self.store)

    def show(self, number: int) -> RequestDetails:
        """Return one request with its identifiers and every entry about it.

        Parameters
        ----------
        number : int
            Number of the request.

        Returns
        -------
        RequestDetails
            The request.

        Raises
        ------
        InputError
            If there is no request of that number.

        Examples
        --------
        >>> ledger.show(1).request.status  # doctest: +SKIP
        'accepted'
        """
        found = queries.request(self.store, number)
        if found is None:
            last = self.store.last(RECEIVED)
            count = 0 if last is None else last.payload["request"]
            raise InputError(f"expected a request from 1 to {count}, got {number}; see `delfast ledger list`")
        request, received = found
        ids = tuple(received.payload["ids"])
        runs = queries.runs_of(self.store, number)
        events = (received, *(entry for run in runs for entry in self.store.entries(run=run)))
        return RequestDetails(request, ids, self._originals(ids), events)

    def find(self, identifier: str | int) -> int | None:
        """Return the number of the request that names an example.

        Parameters
        ----------
        identifier : str or int
            Identifier of the example.

        Returns
        -------
        int or None
            Number of the request; None if no request names the example.

        Raises
        ------
        InputError
            If the ledger stores HMACs and was opened without the key.

        Examples
        --------
        >>> ledger.find("14")  # doctest: +SKIP
        1
        """
        stored = self.identifiers.stored(*checked([identifier]))
        return next((number for number, ids in queries.stored_ids(self.store) if stored in ids), None)

    def positions(self, numbers: Iterable[int]) -> Tensor:
        """Return where in the training set the examples of requests are.

        Parameters
        ----------
        numbers : iterable of int
            Numbers of the requests.

        Returns
        -------
        Tensor
            Positions (examples,), int64, sorted.

        Raises
        ------
        InputError
            If the ledger was opened without the job or the key.

        Examples
        --------
        >>> ledger.positions([1])  # doctest: +SKIP
        tensor([ 3, 14])
        """
        chosen = set(numbers)
        stored = {each for number, ids in queries.stored_ids(self.store) if number in chosen for each in ids}
        originals = self.identifiers.originals(self.job.ids, stored)
        return self.job.positions(originals[each] for each in stored)

    def positions_by_request(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each request's number and the positions (examples,), int64, of its examples in the training set."""
        import torch

        found = {self.identifiers.stored(each): position for position, each in enumerate(self.job.ids)}
        for number, ids in queries.stored_ids(self.store):
            yield number, torch.tensor([found[each] for each in ids], dtype=torch.int64)

    def _originals(self, ids: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return identifiers as text, in order; None without what is needed to find them."""
        if not self.created["hash_ids"]:
            return ids
        if self._job is None or self._identifiers is None:
            return None
        found = self._identifiers.originals(self._job.ids, set(ids))
        return tuple(found[each] for each in ids)


def _copy(model: Path, path: Path) -> None:
    shutil.copyfile(model, path)


def _facts(job: Job, model: Path) -> dict[str, Any]:
    """Return what the first entry records of the job and the model, after reading both."""
    from delfast.provenance import provenance

    if not model.is_file():
        raise InputError(f"expected a checkpoint at '{model}', there is no such file; check --model")
    job.load(model)
    versions = provenance()
    return {
        "job": {"name": job.name, "path": str(job.path), "digest": job.digest},
        "data": job.data_digest(),
        "examples": len(job.ids),
        "accept": asdict(job.accept),
        "versions": {name: versions[name] for name in VERSIONS},
    }


def _identifiers(created: Mapping[str, Any], path: Path, hash_ids: str | os.PathLike[str] | None) -> Identifiers | None:
    if not created["hash_ids"]:
        if hash_ids is not None:
            raise InputError(f"the ledger '{path}' stores identifiers as text and has no key; leave out --hash-ids")
        return Identifiers()
    if hash_ids is None:
        return None
    identifiers = Identifiers(read_key(hash_ids, path))
    if identifiers.key_check != created["key_check"]:
        raise InputError(f"the key in '{hash_ids}' is not that of the ledger '{path}'; pass the file it was made with")
    return identifiers


def _same_job(path: str | os.PathLike[str], created: Mapping[str, Any]) -> Job:
    """Read the job file; InputError if its training data are not those that the ledger was made for."""
    from delfast.jobs import read_job

    job = read_job(path)
    if job.data_digest() != created["data"]:
        raise InputError(
            f"the training data of '{path}' are not those that the ledger was made for: "
            f"{len(job.ids)} examples now, {created['examples']} then; restore them, or make another ledger"
        )
    return job


def _read_all(requests: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[str], str | None, str | None]]:
    """Yield the fields of each request, checked; InputError names the request, counted from 1."""
    for position, fields in enumerate(requests, start=1):
        try:
            yield read_request(fields)
        except InputError as error:
            raise InputError(f"request {position} of those to add: {error}") from None


def _without_repeats(read: list[tuple[list[str], str | None, str | None]], stored: list[list[str]]) -> dict[str, str]:
    """Return the identifier of each stored form; InputError for one that several of the requests name."""
    originals: dict[str, str] = {}
    for (ids, _, _), forms in zip(read, stored, strict=True):
        for original, form in zip(ids, forms, strict=True):
            if form in originals:
                raise InputError(f"expected every example in one request, got '{original}' in two; leave one out")
            originals[form] = original
    return originals
