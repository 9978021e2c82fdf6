"""A job: what a job file defines, checked."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset, default_collate

from delfast.arguments import check_count, check_seed, check_type, describe
from delfast.batches import LossFn
from delfast.errors import InputError
from delfast.jobs.examples import (
    JoinedBatches,
    Relabelled,
    check_batches,
    check_dataset,
    class_targets,
    digest_examples,
)
from delfast.jobs.identifiers import check_identifiers
from delfast.jobs.networks import checked_loss, load_network, save_network
from delfast.jobs.source import Source
from delfast.jobs.values import Accept, Training, read_accept, read_batch_size, read_settings, read_training

REQUIRED = ("model", "train_set", "test_set")
OPTIONAL = ("example_ids", "load", "save", "loss_fn", "preprocess")


@dataclass(frozen=True, eq=False)
class Job:
    """The network, data and training of a user's job file; ``read_job`` makes it.

    Parameters
    ----------
    path : Path
        The job file, absolute.
    name : str
        The file's name without its suffix.
    batch_size : int
        Number of examples in a batch.
    training : Training
        How networks are trained.
    accept : Accept
        The thresholds under which a ledger accepts an unlearned network.
    settings : tuple of mappings
        Methods to unlearn with, in order: "method", optionally "budget", "strategy", "batch_size", and hyperparameters.
    loss_fn : callable, optional
        ``loss_fn(model, batch)``, which returns losses (N,). None: cross-entropy of class indices.
    digest : str
        SHA-256 (hex) of the job file's bytes. Modules that the file imports are not in it.
    source : Source
        The executed file.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from delfast.jobs import read_job
    >>> text = '''
    ... import torch
    ... def model(): return torch.nn.Linear(2, 2)
    ... def train_set(): return torch.utils.data.TensorDataset(torch.eye(2), torch.tensor([0, 1]))
    ... test_set = train_set
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "tiny.py"
    ...     _ = path.write_text(text)
    ...     job = read_job(path)
    >>> job.name, job.count, list(job.ids)
    ('tiny', 2, ['0', '1'])
    """

    path: Path
    name: str
    batch_size: int
    training: Training
    accept: Accept
    settings: tuple[Mapping[str, Any], ...]
    loss_fn: LossFn | None
    digest: str
    source: Source = field(repr=False)
    _networks: list[weakref.ref[nn.Module]] = field(default_factory=list, init=False, repr=False)

    def naming_errors(self) -> AbstractContextManager[None]:
        """Turn exceptions that come from a line of the job file into InputErrors that name file and line.

        Use it around work that runs the job's code: its network, its data sets, its loss.

        Returns
        -------
        context manager
            Exceptions of other code pass unchanged.
        """
        return self.source.naming_errors()

    def model(self) -> nn.Module:
        """Return a newly initialized network.

        Returns
        -------
        torch.nn.Module
            The result of the job's ``model()``.

        Raises
        ------
        InputError
            With file and line, for an exception inside, another type, and a network of an earlier call.
        """
        return self._new("model")

    def load(self, path: str | os.PathLike[str]) -> nn.Module:
        """Return the network of a file.

        Parameters
        ----------
        path : str or os.PathLike
            A file of ``save``. Without a ``load`` in the job file a state dict: safetensors, or a file that
            ``torch.load(weights_only=True)`` reads.

        Returns
        -------
        torch.nn.Module
            The network; without a ``load`` in the job file on the CPU.

        Raises
        ------
        InputError
            For a missing or damaged file, and one of another network. With file and line, for an exception inside the
            job's ``load``, another type, and a network of an earlier call.
        """
        file = Path(path)
        if self.source.function("load") is None:
            return load_network(self.source, file, self.model)
        if not file.exists():
            raise InputError(f"expected a network at '{file}', there is none; check the path")
        return self._new("load", file)

    def _new(self, name: str, *arguments: Any) -> nn.Module:
        """Call a function of the job that returns a network. InputError for one that an earlier call returned.

        Two networks are compared with each other, so neither may be the other under a second name.
        """
        made = self.source.call(name, *arguments)
        with self.source.at(name):
            check_type(f"{name}() to return", made, nn.Module, "a torch.nn.Module")
            self._networks[:] = [earlier for earlier in self._networks if earlier() is not None]
            if any(earlier() is made for earlier in self._networks):
                raise InputError(
                    f"expected {name}() to make a new network each time, it returned an earlier one; build the network "
                    f"inside {name}()"
                )
        self._networks.append(weakref.ref(made))
        return made  # type: ignore[no-any-return]

    def save(self, model: nn.Module, path: str | os.PathLike[str]) -> None:
        """Write a network to a file, whole or not at all.

        Parameters
        ----------
        model : torch.nn.Module
            The network.
        path : str or os.PathLike
            The file. Without a ``save`` in the job file it is the state dict as safetensors.

        Raises
        ------
        InputError
            With file and line, if the job's ``save`` fails or writes no file.
        """
        save_network(self.source, model, Path(path))

    # The data

    @cached_property
    def train_set(self) -> Any:
        """The training set: the job's ``train_set()``, called once."""
        return self._dataset("train_set")

    @cached_property
    def test_set(self) -> Any:
        """The test set: the job's ``test_set()``, called once."""
        return self._dataset("test_set")

    def _dataset(self, name: str) -> Any:
        data = self.source.call(name)
        with self.source.at(name), self.source.naming_errors():
            check_dataset(data)
        return data

    @property
    def count(self) -> int:
        """Number of training examples."""
        return len(self.train_set)

    @property
    def has_ids(self) -> bool:
        """Whether the job has identifiers of its own; otherwise the indices are the identifiers."""
        return self.source.function("example_ids") is not None

    @cached_property
    def ids(self) -> Sequence[str]:
        """The identifier of each training example, as text: the job's ``example_ids()``, or the indices."""
        if not self.has_ids:
            return tuple(map(str, range(self.count)))
        given = self.source.call("example_ids")
        with self.source.at("example_ids"):
            return check_identifiers(given, self.count)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {each: position for position, each in enumerate(self.ids)}

    def positions(self, ids: Iterable[str]) -> Tensor:
        """Return the positions of examples in the training set.

        Parameters
        ----------
        ids : iterable of str
            Identifiers, each once, in any order.

        Returns
        -------
        Tensor
            Int64 (n,), sorted.

        Raises
        ------
        InputError
            For the first identifier that no training example has, or that occurs twice.
        """
        found = set[int]()
        for each in ids:
            position = self._positions.get(each)
            if position is None:
                raise InputError(
                    f"expected identifiers of training examples of '{self.path}', got {describe(each)}; correct it"
                )
            if position in found:
                raise InputError(f"expected each identifier once, '{each}' is there twice; drop one")
            found.add(position)
        return torch.tensor(sorted(found), dtype=torch.int64)

    def data_digest(self) -> str:
        """Return a digest of the data.

        It reads the identifiers, the lengths of both sets, and at most 64 evenly spaced examples of each.

        Returns
        -------
        str
            SHA-256 (hex).

        Raises
        ------
        InputError
            For examples that differ each time they are read, as under a random transform, and for a ``preprocess``
            that returns another batch for the same examples. A random change that it makes rarely is not noticed.
        """
        return self._data_digest

    @cached_property
    def _data_digest(self) -> str:
        total = hashlib.sha256()
        for each in self.ids:
            total.update(each.encode("utf-8", "surrogatepass") + b"\0")
        for name in ("train_set", "test_set"):
            data = getattr(self, name)
            with self.source.at(name), self.source.naming_errors():
                total.update(digest_examples(data, len(data)))
            if self.source.function("preprocess") is not None:
                with self.source.at("preprocess"), self.source.naming_errors():
                    check_batches(data, len(data), self._collate)
        return total.hexdigest()

    def targets(self) -> Tensor | None:
        """Return the classes of the training examples; every example is read, once in the job's life.

        Returns
        -------
        Tensor or None
            Int64 (N,); None unless every example is (input, target) with an integer target of 0 or more.
        """
        return self._targets

    @cached_property
    def _targets(self) -> Tensor | None:
        with self.naming_errors():
            return class_targets(self.train_set, self.count)

    def batches(
        self,
        indices: Tensor,
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        targets: Tensor | None = None,
    ) -> DataLoader[Any]:
        """Return a loader of training examples.

        Parameters
        ----------
        indices : Tensor
            Positions in the training set, integers (n,).
        batch_size : int, optional
            Number of examples in a batch. Default: the job's.
        shuffle : bool, default False
            Whether every pass has an order of its own. Otherwise the order is that of ``indices``. A last batch of one
            example then joins the batch before it, since BatchNorm cannot train on one.
        seed : int, default 0
            Of the orders: the first pass of the same seed has the same order, and so on.
        targets : Tensor, optional
            Classes of all training examples, int64 (N,), in place of those of the data set. Examples must be
            (input, target). Default: the data set's own.

        Returns
        -------
        torch.utils.data.DataLoader
            Batches of torch's default collate function, and of the job's ``preprocess``.

        Raises
        ------
        InputError
            For positions that do not exist.
        """
        data = self.train_set if targets is None else Relabelled(self.train_set, targets)
        return self._loader(data, indices, batch_size, shuffle, seed)

    def test_batches(self, indices: Tensor | None = None, *, batch_size: int | None = None) -> DataLoader[Any]:
        """Return a loader of test examples, in order.

        Parameters
        ----------
        indices : Tensor, optional
            Positions in the test set, integers (n,). Default: all.
        batch_size : int, optional
            Number of examples in a batch. Default: the job's.

        Returns
        -------
        torch.utils.data.DataLoader
            Batches as those of ``batches``.

        Raises
        ------
        InputError
            For positions that do not exist.
        """
        return self._loader(self.test_set, indices, batch_size, False, 0)

    def _loader(
        self, data: Any, indices: Tensor | None, batch_size: int | None, shuffle: bool, seed: int
    ) -> DataLoader[Any]:
        count = len(data)
        chosen = range(count) if indices is None else indices.tolist()
        if len(chosen) and not 0 <= min(chosen) <= max(chosen) < count:
            raise InputError(f"expected positions from 0 to {count - 1}, got {min(chosen)} to {max(chosen)}")
        subset, generator = Subset(data, chosen), torch.Generator().manual_seed(check_seed(seed))
        size = self.batch_size if batch_size is None else check_count("batch_size", batch_size)
        options: dict[str, Any] = {
            "batch_size": size,
            "shuffle": shuffle and len(chosen) > 0,
        }  # torch's sampler refuses an empty set
        if shuffle and 1 < size < len(chosen) and len(chosen) % size == 1:
            # the same draws as with shuffle=True
            options = {"batch_sampler": JoinedBatches(RandomSampler(subset, generator=generator), size, False)}
        # also without shuffle: a DataLoader draws from its generator at each pass, or else from the process's
        collate = default_collate if self.source.function("preprocess") is None else self._collate
        return DataLoader(subset, generator=generator, collate_fn=collate, **options)

    def _collate(self, examples: Any) -> Any:
        return self.source.call("preprocess", default_collate(examples))


def read_job(path: str | os.PathLike[str]) -> Job:
    """Execute a job file and return what it defines.

    The file is executed as Python code, so it must be the user's own. Nothing else is: a run directory or a ledger
    only stores the path of its job file.

    The file defines the functions ``model()``, ``train_set()`` and ``test_set()``; optionally ``example_ids()``,
    ``load(path)`` with ``save(model, path)``, ``loss_fn(model, batch)`` and ``preprocess(batch)``; optionally the
    constants ``batch_size``, ``training``, ``accept`` and ``settings``. `delfast init-job` writes one with comments.
    Modules in the file's folder can be imported, except those that the folder of another job of the process has too.

    Parameters
    ----------
    path : str or os.PathLike
        The job file.

    Returns
    -------
    Job
        The data sets are made when they are used.

    Raises
    ------
    InputError
        With file and line: for an error in the file, a function that is missing, and an unfit constant. Also for a
        module that the folder of another job has too.

    Examples
    --------
    >>> from delfast.jobs import read_job
    >>> read_job("no-such-job.py")
    Traceback (most recent call last):
        ...
    delfast.errors.InputError: expected a job file at '...no-such-job.py', there is none; `delfast init-job` writes one
    """
    source = Source(Path(os.path.realpath(os.path.expanduser(path))))
    found = {name: source.function(name) for name in (*REQUIRED, *OPTIONAL)}
    missing = [name for name in REQUIRED if found[name] is None]
    if missing:
        raise InputError(f"expected '{source.path}' to define a function {missing[0]}(), it does not; define it")
    for name, other in (("load", "save"), ("save", "load")):
        if found[name] is not None and found[other] is None:
            raise InputError(f"{source.place(name)}: expected {other}() beside {name}(), there is none; define both")
    return Job(
        path=source.path,
        name=source.path.stem,
        batch_size=read_batch_size(source),
        training=read_training(source),
        accept=read_accept(source),
        settings=read_settings(source),
        loss_fn=checked_loss(source),
        digest=source.digest,
        source=source,
    )
