"""The ledger of one model: the requests to forget, what was done about each, and the evidence."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from delfast.errors import InputError
from delfast.ledger.history import History
from delfast.ledger.records import Records
from delfast.ledger.results import HeldFile, RunResult
from delfast.ledger.store import Verification
from delfast.ledger.verification import verify_ledger

if TYPE_CHECKING:  # imports torch
    from delfast.ledger.starting import LocalizeOn


class Ledger(Records):
    """Forget requests for one model, and the evidence of what was done about them, in a directory.

    Make one by ``Ledger.create``, open it by ``Ledger.open``. The ledger holds entries that are only ever added; each
    carries the hash of the entry before it. Not shared between threads or across a fork: open it again there.

    Parameters
    ----------
    store : Store
        The ledger's open store.
    job : Job or None
        The user's job. Without it requests can be read and verified, not added or run.
    identifiers : Identifiers or None
        Conversion of identifiers to their stored form; None where they are HMACs and no key was given.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from delfast.jobs import read_job
    >>> from delfast.ledger import Ledger
    >>> text = '''
    ... import torch
    ... def model(): return torch.nn.Linear(2, 2)
    ... def train_set(): return torch.utils.data.TensorDataset(torch.eye(2), torch.tensor([0, 1]))
    ... test_set = train_set
    ... def example_ids(): return ["user-3", "user-14"]
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path, model = Path(folder) / "job.py", Path(folder) / "model.safetensors"
    ...     _ = path.write_text(text)
    ...     job = read_job(path)
    ...     job.save(job.model(), model)
    ...     with Ledger.create(Path(folder) / "ledger", job=path, model=model) as ledger:
    ...         number = ledger.add(["user-14"], reason="case 7", due="2026-12-31")
    ...         print(number, [(each.count, each.status) for each in ledger.requests()], ledger.verify().holds)
    1 [(1, 'pending')] True
    """

    # ---- work

    def run(
        self,
        *,
        requests: Sequence[int] | None = None,
        method: str | None = None,
        budget: float | None = None,
        localize_on: LocalizeOn | None = None,
        escalate: bool | None = None,
        seed: int | None = None,
        accept_unmeasured: bool | None = None,
        device: str = "auto",
        watch: Callable[[str], None] | None = None,
    ) -> RunResult:
        """Make the newest accepted model unlearn the open requests, audit the result, and accept or reject it.

        All open requests are taken up together. The retained examples are the training set without those of accepted
        requests, and of all open ones, taken up or not. The model before the run is audited first. A run that was
        stopped is continued, to the same model: call ``run`` without arguments then.

        Parameters
        ----------
        requests : sequence of int, optional
            Numbers of the requests to take up. Default: all open ones.
        method : str, optional
            Method, with the first of the job's settings that has it. Default: the job's first setting.
        budget : float, optional
            Fraction of the parameters to select. Default: the setting's.
        localize_on : {"new", "all"}, optional
            Whether to localize the examples of the requests taken up ("new", the default), or with them those of every
            accepted request.
        escalate : bool, optional
            Whether to try the job's other settings in order where the thresholds do not hold, and retraining last.
            Default: no.
        seed : int, optional
            Seed of everything random. Default: derived from the run's number.
        accept_unmeasured : bool, optional
            Whether a threshold that cannot be measured on so few examples holds; it is recorded. Default: no.
        device : str
            "auto", "cpu", "cuda" or "cuda:N". Default: "auto".
        watch : callable, optional
            Called with a line for each step. Default: lines are dropped.

        Returns
        -------
        RunResult
            Whether the result was accepted, and by which figures. A rejected run leaves the accepted model as it is.

        Raises
        ------
        InputError
            For arguments beside a run that was stopped, requests that are not open, a threshold that cannot be
            measured, and a ledger that another process works on. Nothing was recorded then.

        Examples
        --------
        >>> ledger.run().accepted  # doctest: +SKIP
        True
        """
        from delfast.ledger.running import run
        from delfast.ledger.starting import Choice

        choice = Choice(requests, method, budget, localize_on, escalate, seed, accept_unmeasured)
        return run(self, choice, device=device, watch=watch or _drop)

    def abandon(self) -> int:
        """End a run that was stopped, as rejected; its requests stay open.

        Returns
        -------
        int
            Number of the run.

        Raises
        ------
        InputError
            If every run has a result.

        Examples
        --------
        >>> ledger.abandon()  # doctest: +SKIP
        3
        """
        from delfast.ledger.running import abandon

        return abandon(self)

    def train_references(
        self, count: int = 8, *, device: str = "auto", watch: Callable[[str], None] | None = None
    ) -> list[int]:
        """Train reference models until the ledger has ``count`` of them.

        Each is trained on a random half of the examples that no request has named. The audit compares a model with
        those that were not trained on an example. They serve all runs, until they are purged.

        Parameters
        ----------
        count : int
            Number of reference models to have. Default: 8.
        device : str
            As for ``run``. Default: "auto".
        watch : callable, optional
            Called with a line for each reference model. Default: lines are dropped.

        Returns
        -------
        list of int
            Numbers of the new reference models.

        Raises
        ------
        InputError
            If another process works on the ledger.

        Examples
        --------
        >>> ledger.train_references(8)  # doctest: +SKIP
        [1, 2, 3, 4, 5, 6, 7, 8]
        """
        from delfast.ledger.references import train_references

        return train_references(self, count, device=device, watch=watch or _drop)

    def holding(self) -> list[HeldFile]:
        """Return the ledger's files that hold examples of requests, open ones included.

        In a ledger that was opened without the job, a reference model is listed with every request that came after it:
        it may have seen their examples.

        Returns
        -------
        list of HeldFile
            The files, with the requests that each holds.

        Examples
        --------
        >>> [each.file for each in ledger.holding()]  # doctest: +SKIP
        ['models/0000.safetensors']
        """
        from delfast.ledger.purging import holding

        return holding(self)

    def purge_plan(self) -> list[HeldFile]:
        """Return the files that ``purge`` would delete: all that hold examples of accepted requests.

        These are superseded models, masks, reference models that were trained on them, and files that no entry records.
        The newest accepted model stays, and the reference models that an unfinished run began with.

        Returns
        -------
        list of HeldFile
            The files, with the requests that each holds.

        Examples
        --------
        >>> ledger.purge(ledger.purge_plan())  # doctest: +SKIP
        """
        from delfast.ledger.purging import purge_plan

        return purge_plan(self)

    def purge(self, plan: Sequence[HeldFile]) -> None:
        """Delete the files of a plan, and record it.

        The files are unlinked, not overwritten; backups and the disk may keep their content.

        Parameters
        ----------
        plan : sequence of HeldFile
            Result of ``purge_plan``.

        Raises
        ------
        InputError
            If the plan is no longer the ledger's, or a file is not as it was recorded. Nothing was deleted then.

        Examples
        --------
        >>> ledger.purge(ledger.purge_plan())  # doctest: +SKIP
        """
        from delfast.ledger.purging import purge

        purge(self, plan)

    # ---- evidence

    @property
    def model(self) -> Path:
        """Path of the newest accepted model, the one to use; at first that of the model the ledger was made for."""
        return self.path / History(self.store).model["file"]

    @property
    def head(self) -> str:
        """Hash of the newest entry, which stands for the whole ledger up to it: 64 hexadecimal digits."""
        return self.store.head

    def verify(self, *, head: str | None = None, files: bool = True) -> Verification:
        """Check every entry in order, and the recorded files.

        An entry that was edited, removed, inserted or moved breaks the chain of hashes and is named. A ledger that was
        rewritten as a whole, or cut at its end, has a whole chain: only a head kept elsewhere finds it.

        Parameters
        ----------
        head : str, optional
            Hash of the newest entry at an earlier time, as a report prints it. Default: not compared.
        files : bool
            Whether to compare the recorded files with their digests. Default: True.

        Returns
        -------
        Verification
            The number of entries that hold, and the problems.

        Raises
        ------
        InputError
            If ``head`` is not 64 hexadecimal digits.

        Examples
        --------
        >>> ledger.verify(head="0" * 64).holds  # doctest: +SKIP
        False
        """
        return verify_ledger(self.store, head, files=files)

    def report(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a report of all requests and runs: ``report.html``, which needs no other file, and ``report.md``.

        Its first lines give the number of requests by status, the thresholds that held, and the ledger's head. It lists
        what ``holding`` returns, which is exact if the ledger was opened with the job.

        Parameters
        ----------
        output_dir : path-like
            Directory of the report; made if it does not exist.

        Raises
        ------
        InputError
            If the ledger's chain of entries does not hold (``verify``). Nothing was written then.

        Examples
        --------
        >>> ledger.report("ledger-report")  # doctest: +SKIP
        """
        from delfast.ledger.report import write_report

        found = self.verify(files=False)
        if not found.holds:
            raise InputError(f"expected a ledger that holds, but {found.problems[0]}; see `delfast ledger verify`")
        write_report(self.store.entries(), self.holding(), Path(output_dir))


def _drop(line: str) -> None:
    """Drop a line that nobody watches."""
