"""A run: make the newest accepted model unlearn the open requests, and accept or reject the result by the evidence.

Every step is recorded by an entry when its files are on the disk. A run that was stopped at any moment is continued by
the next ``run`` from its last entry, to the same model: a step's result depends on the run's recorded inputs alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from delfast.arguments import check_choice, check_seed
from delfast.errors import InputError, one_line
from delfast.evaluation import Audit, Relearning, audit
from delfast.evaluation.measuring import measure
from delfast.experiments.run import choose_device
from delfast.experiments.verification import compare
from delfast.files import write_json
from delfast.ledger.artefacts import artefact
from delfast.ledger.checks import advice, check_all, refuse_unmeasurable
from delfast.ledger.history import History
from delfast.ledger.networks import drawing, load_recorded, recorded_file
from delfast.ledger.references import references_of
from delfast.ledger.requests import ACCEPTED, REJECTED, STARTED
from delfast.ledger.results import Check, RunResult
from delfast.ledger.store import Entry
from delfast.localization import BUDGET, WHOLE_TRAINING_SET, localize
from delfast.mask import Mask
from delfast.provenance import provenance
from delfast.unlearning import Diverged, TrainingOptions, make_method, unlearn

if TYPE_CHECKING:
    from delfast.ledger.records import Records

LOCALIZED, UNLEARNED, VERIFIED, AUDITED = "localized", "unlearned", "verified", "audited"
FAILED, RESUMED = "failed", "resumed"
RUNS = "runs"
VERSIONS = ("delfast", "torch", "numpy", "python", "platform", "device")
SEEDS_PER_RUN = 1000  # more than a run has attempts, so that no two attempts draw alike
OWN_SETTINGS = ("method", "budget", "strategy", "batch_size")  # the other keys of a setting are hyperparameters
LocalizeOn = Literal["new", "all"]
Watch = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """The arguments of ``Ledger.run`` as given; None: not given."""

    requests: Sequence[int] | None = None
    method: str | None = None
    budget: float | None = None
    localize_on: LocalizeOn | None = None
    escalate: bool | None = None
    seed: int | None = None
    accept_unmeasured: bool | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was given."""
        return all(value is None for value in vars(self).values())


def run(ledger: Records, choice: Choice, *, device: str, watch: Watch) -> RunResult:
    """Continue the unfinished run or start one, and bring it to its end. ``watch`` gets a line for each step."""
    with ledger.lock(), ledger.job.naming_errors():
        history = History(ledger.store)
        chosen = choose_device(device)
        unfinished = history.unfinished
        if unfinished is None:
            started = _start(ledger, history, choice, chosen)
        else:
            started = _continue(ledger, unfinished, choice, chosen)
        return _Run(ledger, History(ledger.store), started, chosen, watch).finish()


def abandon(ledger: Records) -> int:
    """Reject the unfinished run without a result, and return its number."""
    with ledger.lock():
        unfinished = History(ledger.store).unfinished
        if unfinished is None:
            raise InputError("expected an unfinished run to abandon, there is none")
        ledger.store.append(REJECTED, {"attempts": [], "checks": [], "advice": ["it was abandoned"]}, unfinished.run)
        assert unfinished.run is not None
        return unfinished.run


# ---- starting


def _start(ledger: Records, history: History, choice: Choice, device: torch.device) -> Entry:
    """Check everything that can be checked, and append the entry that begins a run."""
    localize_on = choice.localize_on or "new"
    check_choice("localize_on", localize_on, LocalizeOn)
    numbers = _chosen_requests(history, choice.requests)
    attempts = _attempts(ledger, choice)
    number = history.last_run + 1
    seed = SEEDS_PER_RUN * number if choice.seed is None else check_seed(choice.seed)
    examples = Examples(ledger, history.accepted_requests, numbers)
    if not len(examples.retain):
        raise InputError("expected examples to retain, the requests name every one; delete the model instead")
    model = history.model
    network = load_recorded(ledger, model, device)
    before = {
        "forget": _accuracy(ledger, network, examples.forget),
        "retain": _accuracy(ledger, network, examples.retain),
        "test": _accuracy(ledger, network, None),
    }
    refuse_unmeasurable(ledger.job.accept, before["test"] is not None, partial(references_of, ledger.store))
    versions = provenance(device=str(device))
    return ledger.store.append(
        STARTED,
        {
            "requests": numbers,
            "settings": attempts[0],
            "attempts": attempts,
            "localize_on": localize_on,
            "seed": seed,
            "job": ledger.job.digest,
            "model": model,
            "forget": len(examples.forget),
            "retain": len(examples.retain),
            "before": before,
            "accept": asdict(ledger.job.accept),
            "accept_unmeasured": bool(choice.accept_unmeasured),
            "versions": {name: versions[name] for name in VERSIONS},
        },
        number,
    )


def _continue(ledger: Records, started: Entry, choice: Choice, device: torch.device) -> Entry:
    """Check that a stopped run has the inputs that it began with, and record that it goes on."""
    if not choice.is_empty:
        raise InputError(
            f"run {started.run} was stopped and is not finished; continue it by `delfast ledger run` without settings, "
            "or end it by --abandon"
        )
    if started.payload["job"] != ledger.job.digest:
        raise InputError(
            f"the job file '{ledger.job.path}' has changed since run {started.run} began; restore it, or end the run "
            "by --abandon"
        )
    versions = provenance(device=str(device))
    ledger.store.append(RESUMED, {"versions": {name: versions[name] for name in VERSIONS}}, started.run)
    return started


def _chosen_requests(history: History, wanted: Sequence[int] | None) -> list[int]:
    """Return the numbers of the requests to take up: all open ones, or those wanted."""
    open_requests = history.open_requests
    if wanted is None:
        if not open_requests:
            raise InputError("expected open requests, there are none; add one: delfast ledger add")
        return open_requests
    for number in wanted:
        if number not in open_requests:
            known = "is accepted already" if number in history.accepted_requests else "does not exist"
            raise InputError(f"expected open requests, request {number} {known}; see `delfast ledger list`")
    return sorted(set(wanted))


def _attempts(ledger: Records, choice: Choice) -> list[dict[str, Any]]:
    """Return the settings to try, in order, each checked."""
    job = ledger.job
    settings = [dict(each) for each in job.settings]
    first = settings[0]
    if choice.method is not None:
        first = next((each for each in settings if each["method"] == choice.method), {"method": choice.method})
    if choice.budget is not None:
        first = {**first, "budget": choice.budget}
    make_method(first["method"], _hyperparameters(first))
    if not choice.escalate:
        return [first]
    others = [each for each in settings if each["method"] != "retrain" and each not in (first, settings[0])]
    retrain = next((each for each in settings if each["method"] == "retrain"), None)
    return [first, *others, retrain or {"method": "retrain", **asdict(job.training)}]


def _hyperparameters(setting: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in setting.items() if name not in OWN_SETTINGS}


# ---- the examples and the models


class Examples:
    """Positions in the training set (n,), sorted: those to forget now, those accepted before, and the rest."""

    def __init__(self, ledger: Records, accepted: Sequence[int], requests: Sequence[int]) -> None:
        self.forget = ledger.positions(requests)
        self.erased = ledger.positions(accepted)
        kept = torch.ones(ledger.job.count, dtype=torch.bool)
        kept[self.forget] = False
        kept[self.erased] = False
        self.retain = kept.nonzero().flatten()

    @property
    def requested(self) -> Tensor:
        """Return the examples of all requests that were accepted or are taken up."""
        return torch.cat([self.forget, self.erased]).sort().values


def _accuracy(ledger: Records, network: nn.Module, positions: Tensor | None) -> float | None:
    """Return the accuracy (percent) on training examples, or on the test set; None with a loss alone."""
    job = ledger.job
    loader = job.test_batches() if positions is None else job.batches(positions)
    (measured,), _ = measure([network], loader, "test" if positions is None else "training", job.loss_fn)
    return None if measured.right is None else 100 * (measured.right / measured.units).mean().item()


# ---- the steps


class _Run:
    """One run that has begun: its steps, each done once and recorded."""

    def __init__(self, ledger: Records, history: History, started: Entry, device: torch.device, watch: Watch) -> None:
        assert started.run is not None
        self.ledger, self.history, self.device, self.watch = ledger, history, device, watch
        self.job = ledger.job
        self.number, self.inputs = started.run, started.payload
        self.examples = Examples(ledger, history.accepted_requests, self.inputs["requests"])
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
            if model is not None and all(check.held for check in checks):
                payload = {"model": model, "attempts": tried, "checks": tried[-1]["checks"]}
                return self._end(ACCEPTED, payload, settings, checks, model)
        found = advice(checks, settings, escalated=len(attempts) > 1)
        payload = {"attempts": tried, "checks": tried[-1]["checks"], "advice": found}
        return self._end(REJECTED, payload, settings, checks, self.inputs["model"])

    def _end(
        self,
        event: str,
        payload: dict[str, Any],
        settings: Mapping[str, Any],
        checks: Sequence[Check],
        model: Mapping[str, str],
    ) -> RunResult:
        """Record the result and return it; ``model`` is the newest accepted one."""
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
        self.method = make_method(settings["method"], _hyperparameters(settings))
        self.batch_size: int = settings.get("batch_size", self.job.batch_size)
        self.seed: int = run.inputs["seed"] + number

    def result(self) -> tuple[list[Check], dict[str, str] | None]:
        """Take the steps; return the checks and the record of the model, None if the method failed."""
        failed = self.run.done.get((self.number, FAILED))
        if failed is None:
            try:
                mask = self._step(LOCALIZED, self._localize)["mask"] if self._localizes else None
                unlearned = self._step(UNLEARNED, partial(self._unlearn, mask))
            except (InputError, Diverged) as error:
                failed = {"attempt": self.number, "error": one_line(error)}
                self.ledger.store.append(FAILED, failed, self.run.number)
        if failed is not None:
            return [Check("method", None, None, False, failed["error"])], None
        verified = self._step(VERIFIED, partial(self._verify, unlearned))
        audited = self._step(AUDITED, partial(self._audit, unlearned["model"]))
        inputs = self.run.inputs
        checks = check_all(
            inputs["accept"],
            self.run.history.first_test_accuracy,
            verified,
            audited,
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
        self.run.watch(f"run {self.run.number}, {self.settings['method']}: {event}, {taken['seconds']:.1f} s")
        return payload

    @property
    def _localizes(self) -> bool:
        return self.method.localizes or "budget" in self.settings or "strategy" in self.settings

    @cached_property
    def _strategy(self) -> str:
        strategy: str = self.settings.get("strategy", "del")
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
        job, history = self.job, self.run.history
        model = load_recorded(self.ledger, recorded, self.run.device)
        earlier = {f"run {run}": self.ledger.positions(numbers) for run, numbers in history.accepted_runs}
        sets = {"forget": self.examples.forget, **earlier}
        references = [
            reference.for_audit(self.ledger, sets, self.run.device) for reference in references_of(self.ledger.store)
        ]
        found: Audit = audit(
            model,
            forget=job.batches(self.examples.forget),
            retain=job.batches(self.examples.retain),
            test=job.test_batches(),
            earlier={name: job.batches(positions) for name, positions in earlier.items()},
            references=references or None,
            relearn=Relearning() if references else None,
            loss_fn=job.loss_fn,
            seed=self.run.inputs["seed"],
        )
        figures = found.as_dict()
        path = self.directory / "audit.json"
        write_json(path, figures)
        return {"audit": artefact(self.ledger.path, path), "figures": figures}
