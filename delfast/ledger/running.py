"""A run: make the newest accepted model unlearn the open requests, and accept or reject the result by the evidence.

Every step is recorded by an entry when its files are on the disk. A run that was stopped at any moment is continued by
the next ``run`` from its last entry, to the same model: a step's result depends on the run's recorded inputs alone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import torch

from delfast.errors import InputError, one_line
from delfast.experiments.run import choose_device
from delfast.experiments.verification import compare
from delfast.jobs.values import hyperparameters
from delfast.ledger.artefacts import RUNS, artefact
from delfast.ledger.auditing import audit_recorded
from delfast.ledger.checks import advice, check_all
from delfast.ledger.events import ACCEPTED, AUDITED, BASELINE, FAILED, LOCALIZED, REJECTED, UNLEARNED, VERIFIED
from delfast.ledger.examples import Examples
from delfast.ledger.history import History
from delfast.ledger.networks import AlteredFile, drawing, load_recorded, recorded_file
from delfast.ledger.results import Check, RunResult
from delfast.ledger.starting import STRATEGY, Choice, discard_run, resume, start
from delfast.ledger.store import Entry
from delfast.ledger.words import failure
from delfast.localization import BUDGET, WHOLE_TRAINING_SET, localize
from delfast.mask import Mask
from delfast.unlearning import Diverged, TrainingOptions, make_method, unlearn

if TYPE_CHECKING:
    from delfast.ledger.records import Records

QUOTED = re.compile("['\"].*['\"]")  # up to the last quote, since a value may contain quotes
Watch = Callable[[str], None]


def run(ledger: Records, choice: Choice, *, device: str, watch: Watch) -> RunResult:
    """Continue the unfinished run or start one, and bring it to its end. ``watch`` gets a line for each step."""
    with ledger.lock(), ledger.job.naming_errors():
        history = History(ledger.store)
        chosen = choose_device(device)
        unfinished = history.unfinished
        if unfinished is None:
            started = start(ledger, history, choice, chosen, watch)
        else:
            started = resume(ledger, unfinished, choice, chosen)
        return _Run(ledger, History(ledger.store), started, chosen, watch).finish()


def abandon(ledger: Records) -> int:
    """Reject the unfinished run without a result, and return its number."""
    with ledger.lock():
        unfinished = History(ledger.store).unfinished
        if unfinished is None:
            raise InputError("expected an unfinished run to abandon, there is none")
        assert unfinished.run is not None
        discard_run(ledger, unfinished.run)
        ledger.store.append(REJECTED, {"attempts": [], "checks": [], "advice": ["it was abandoned"]}, unfinished.run)
        return unfinished.run


# ---- the steps


class _Run:
    """One run that has begun: its steps, each done once and recorded."""

    def __init__(self, ledger: Records, history: History, started: Entry, device: torch.device, watch: Watch) -> None:
        assert started.run is not None
        self.ledger, self.history, self.device, self.watch = ledger, history, device, watch
        self.job = ledger.job
        self.number, self.inputs = started.run, started.payload
        inputs = self.inputs
        self.examples = Examples(ledger, history.accepted_requests, inputs["requests"], inputs["excluded"])
        (baseline,) = ledger.store.entries(BASELINE, self.number)
        self.baseline: dict[str, Any] = baseline.payload["figures"]
        self.done = {
            (entry.payload["attempt"], entry.event): entry.payload
            for entry in ledger.store.entries(run=self.number)
            if "attempt" in entry.payload
        }

    def finish(self) -> RunResult:
        """Take every step that is not recorded yet."""
        tried: list[dict[str, Any]] = []
        attempts: list[dict[str, Any]] = self.inputs["attempts"]
        for attempt, settings in enumerate(attempts, start=1):
            checks, model = _Attempt(self, attempt, settings).result()
            tried.append({"attempt": attempt, "settings": settings, "checks": [asdict(check) for check in checks]})
            failed = [failure(check) for check in checks if not check.held]
            if model is not None and failed and attempt < len(attempts):  # the command prints those of the last one
                self.watch(f"{self.named(attempt)}: did not pass: {'; '.join(failed)}")
            if model is not None and not failed:
                payload = {"model": model, "attempts": tried, "checks": tried[-1]["checks"]}
                return self._end(ACCEPTED, payload, settings, checks, model)
        found = advice(checks, attempts)
        payload = {"attempts": tried, "checks": tried[-1]["checks"], "advice": found}
        return self._end(REJECTED, payload, settings, checks, self.inputs["model"])

    def named(self, attempt: int) -> str:
        """Return the words by which lines name an attempt."""
        attempts = self.inputs["attempts"]
        which = f", attempt {attempt} of {len(attempts)}" if len(attempts) > 1 else ""
        return f"run {self.number}{which}, {attempts[attempt - 1]['method']}"

    def _end(
        self,
        event: str,
        payload: dict[str, Any],
        settings: Mapping[str, Any],
        checks: Sequence[Check],
        model: Mapping[str, str],
    ) -> RunResult:
        """Record the result and return it; ``model`` is the newest accepted one."""
        discard_run(self.ledger, self.number)
        self.ledger.store.append(event, payload, self.number)
        self.watch(f"run {self.number}: {event}")
        found = tuple(payload.get("advice", ()))
        requests = tuple(self.inputs["requests"])
        return RunResult(self.number, event == ACCEPTED, requests, settings, tuple(checks), found, model["file"])


class _Attempt:
    """One attempt of a run: one method with its settings."""

    def __init__(self, run: _Run, number: int, settings: Mapping[str, Any]) -> None:
        self.run, self.number, self.settings = run, number, settings
        self.ledger, self.job, self.examples = run.ledger, run.job, run.examples
        self.directory = self.ledger.path / RUNS / f"{run.number:04d}" / str(number)
        self.method = make_method(settings["method"], hyperparameters(settings))
        self.batch_size: int = settings.get("batch_size", self.job.batch_size)
        self.seed: int = run.inputs["seed"] + number

    def result(self) -> tuple[list[Check], dict[str, str] | None]:
        """Take the steps; return the checks and the record of the model, None if a step failed."""
        failed = self.run.done.get((self.number, FAILED))
        if failed is None:
            try:
                return self._steps()
            except AlteredFile:  # it may be restored: the run stays unfinished
                raise
            except (InputError, Diverged) as error:
                self.run.watch(f"{self.run.named(self.number)}: {FAILED}: {one_line(error)}")
                failed = {"attempt": self.number, "error": recorded_error(error, self.job.path)}
                self.ledger.store.append(FAILED, failed, self.run.number)
        return [Check("method", None, None, False, failed["error"])], None

    def _steps(self) -> tuple[list[Check], dict[str, str]]:
        mask = self._step(LOCALIZED, self._localize)["mask"] if self._localizes else None
        unlearned = self._step(UNLEARNED, partial(self._unlearn, mask))
        verified = self._step(VERIFIED, partial(self._verify, unlearned))
        audited = self._step(AUDITED, partial(self._audit, unlearned["model"]))
        inputs = self.run.inputs
        checks = check_all(
            inputs["accept"],
            self.run.history.first_test_accuracy,
            verified,
            audited["figures"],
            self.run.baseline,
            accept_unmeasured=inputs["accept_unmeasured"],
        )
        return checks, unlearned["model"]

    def _step(self, event: str, take: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the payload of a step: recorded by the entries, or taken and recorded now."""
        recorded = self.run.done.get((self.number, event))
        if recorded is not None:
            return recorded
        self.directory.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with drawing(self.seed, self.run.device):
            taken = {"attempt": self.number, **take()}
        taken["seconds"] = time.perf_counter() - started
        payload = self.ledger.store.append(event, taken, self.run.number).payload
        self.run.watch(f"{self.run.named(self.number)}: {event}, {taken['seconds']:.1f} s")
        return payload

    @property
    def _localizes(self) -> bool:
        return self.method.localizes or "budget" in self.settings or "strategy" in self.settings

    @cached_property
    def _strategy(self) -> str:
        strategy: str = self.settings.get("strategy", STRATEGY)
        return strategy

    def _localize(self) -> dict[str, Any]:
        examples = self.examples
        positions = examples.forget if self.run.inputs["localize_on"] == "new" else examples.requested
        if self._strategy in WHOLE_TRAINING_SET:
            positions = torch.cat([examples.retain, examples.forget]).sort().values
        model = load_recorded(self.ledger, self.run.inputs["model"], self.run.device)
        mask = localize(
            model,
            self.job.batches(positions, batch_size=self.batch_size),
            self.settings.get("budget", BUDGET),
            strategy=self._strategy,
            loss_fn=self.job.loss_fn,
            seed=self.seed,
        )
        path = self.directory / "mask.safetensors"
        mask.save(path)
        return {
            "mask": artefact(self.ledger.path, path),
            "selected": mask.selected,
            "total": mask.total,
            "channels": mask.channels,
        }

    def _unlearn(self, recorded: Mapping[str, str] | None) -> dict[str, Any]:
        mask = None if recorded is None else Mask.load(recorded_file(self.ledger.path, recorded))
        model = load_recorded(self.ledger, self.run.inputs["model"], self.run.device)
        checkpoint = self.directory / "checkpoint.pt"
        batches = partial(self.job.batches, batch_size=self.batch_size, shuffle=True, seed=self.seed)
        result = unlearn(
            model,
            forget=batches(self.examples.forget),
            retain=batches(self.examples.retain),
            mask=mask,
            method=self.method,
            init=self.job.model,
            loss_fn=self.job.loss_fn,
            seed=self.seed,
            training=TrainingOptions(config={"run": self.run.number, "model": self.run.inputs["model"]["digest"]}),
            checkpoint=checkpoint if self.method.epochs else None,
            resume=self.method.epochs > 0,
        )
        path = self.directory / f"model{Path(self.run.inputs['model']['file']).suffix}"
        self.job.save(model, path)
        allowed = self.directory / "allowed.safetensors"  # the mask with the head
        result.mask.save(allowed)
        checkpoint.unlink(missing_ok=True)
        return {
            "model": artefact(self.ledger.path, path),
            "allowed": artefact(self.ledger.path, allowed),
            "settings": dict(self.settings),
            "losses": result.losses,
        }

    def _verify(self, unlearned: Mapping[str, Any]) -> dict[str, Any]:
        """Compare the files of the two models bit by bit."""
        cpu = torch.device("cpu")
        before = load_recorded(self.ledger, self.run.inputs["model"], cpu)
        after = load_recorded(self.ledger, unlearned["model"], cpu)
        buffers = [name for name, _ in before.named_buffers() if name in before.state_dict()]
        mask = Mask.load(recorded_file(self.ledger.path, unlearned["allowed"]))
        found = compare(before.state_dict(), after.state_dict(), mask, buffers=buffers)
        return {"changed": found.changed, "outside": found.outside}

    def _audit(self, recorded: Mapping[str, str]) -> dict[str, Any]:
        inputs, path = self.run.inputs, self.directory / "audit.json"
        return audit_recorded(
            self.ledger,
            self.run.history,
            recorded,
            self.examples,
            inputs["references"],
            inputs["seed"],
            self.run.device,
            path,
        )


# ---- the end


def recorded_error(error: Exception, job: Path) -> str:
    """Return an error as the ledger keeps it: without anything that may be a value of the job's data.

    The text of other code is left out, of an error in the job file beside its type, file and line. So is everything
    between quotes: a value may name a person, and an entry cannot be removed.
    """
    chain: list[BaseException] = [error]
    while (cause := _cause(chain[-1])) is not None:
        chain.append(cause)
    for each in reversed(chain):
        lines = [line for frame, line in walk_tb(each.__traceback__) if frame.f_code.co_filename == str(job)]
        if lines:
            return f"{type(each).__name__} in '{job}', line {lines[-1]}; its text is not recorded"
    for each in reversed(chain):
        if not isinstance(each, (InputError, Diverged)):
            return f"{type(each).__name__}; its text is not recorded"
    if str(job) in str(error):  # a result of the job's that did not fit, quoted
        return f"{type(error).__name__} of a value of '{job}'; its text is not recorded"
    return QUOTED.sub("'...'", one_line(error))


def _cause(error: BaseException) -> BaseException | None:
    """Return what an error comes from; None also for one that was raised ``from None``, whose text stands alone."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)
