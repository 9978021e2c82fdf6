"""The beginning of a run: its inputs are checked, the model before it is audited, and both are recorded.

A threshold that cannot be measured is found out here, before anything is trained: the audit of the model before the run
has the same sets and references as that of the result.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import torch

from delfast.arguments import check_choice, check_seed, describe
from delfast.errors import InputError
from delfast.jobs.values import check_setting, hyperparameters
from delfast.ledger.artefacts import RUNS, discard_unrecorded
from delfast.ledger.auditing import audit_recorded
from delfast.ledger.checks import refuse_unmeasurable, refuse_unmeasured
from delfast.ledger.events import BASELINE, RESUMED, STARTED
from delfast.ledger.examples import Examples
from delfast.ledger.history import History
from delfast.ledger.networks import drawing
from delfast.ledger.references import references_of
from delfast.ledger.store import Entry, canonical
from delfast.ledger.versions import versions
from delfast.localization import BUDGET
from delfast.unlearning import make_method

if TYPE_CHECKING:
    from delfast.ledger.records import Records

SEEDS_PER_RUN = 1000  # more than a run has attempts, so that no two attempts draw alike
STRATEGY = "del"  # of a setting that names none
LocalizeOn = Literal["new", "all"]


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


def start(
    ledger: Records, history: History, choice: Choice, device: torch.device, watch: Callable[[str], None]
) -> Entry:
    """Check everything that can be checked, audit the model before the run, and append the entries that begin it."""
    localize_on = choice.localize_on or "new"
    check_choice("localize_on", localize_on, LocalizeOn)
    numbers = _chosen_requests(history, choice.requests)
    attempts = [_resolved(each, ledger.job.batch_size) for each in _attempts(ledger, choice)]
    canonical(attempts)  # InputError for values that an entry cannot hold
    number = history.last_run + 1
    seed = SEEDS_PER_RUN * number if choice.seed is None else check_seed(choice.seed)
    examples = _examples(ledger, history, numbers)
    references = [each.number for each in references_of(ledger.store)]
    accept = ledger.job.accept
    refuse_unmeasurable(accept, ledger.job.loss_fn is None, len(references), _options(ledger))
    began = time.perf_counter()
    path = ledger.path / RUNS / f"{number:04d}" / f"{BASELINE}.json"
    try:
        with drawing(seed, device):
            audited = audit_recorded(ledger, history, history.model, examples, references, seed, device, path)
        if not choice.accept_unmeasured:
            refuse_unmeasured(accept, audited["figures"])
        sets = audited["figures"]["sets"]
        baseline = {**audited, "seconds": time.perf_counter() - began}
        with ledger.store.writing() as append:
            now = History(ledger.store)  # with the requests that came during the audit
            examples = _examples(ledger, now, numbers)
            started = {
                "requests": numbers,
                "excluded": _excluded(now, numbers),
                "attempts": attempts,
                "localize_on": localize_on,
                "seed": seed,
                "references": references,
                "job": ledger.job.digest,
                "model": history.model,
                "forget": len(examples.forget),
                "retain": len(examples.retain),
                "before": {name: _value(sets[name]["accuracy"]) for name in ("forget", "retain", "test")},
                "accept": asdict(accept),
                "accept_unmeasured": bool(choice.accept_unmeasured),
                "versions": versions(device=str(device)),
            }
            entry: Entry = append(STARTED, started, number)
            append(BASELINE, baseline, number)
    except BaseException:
        discard_run(ledger, number)
        raise
    watch(f"run {number}: {BASELINE}, the audit of the model before it, {baseline['seconds']:.1f} s")
    return entry


def _options(ledger: Records) -> str:
    """Return the options of a command that names the ledger, its job file, and the key file if it has one."""
    named = f"{shlex.quote(str(ledger.path))} --job {shlex.quote(str(ledger.job.path))}"
    return f"{named} --hash-ids KEYFILE" if ledger.created["hash_ids"] else named


def discard_run(ledger: Records, run: int) -> None:
    """Delete a run's files that no entry records, such as a checkpoint: nobody needs them after its end."""
    discard_unrecorded(ledger.path, ledger.store.entries(run=run), f"{RUNS}/{run:04d}")


def _excluded(history: History, numbers: Sequence[int]) -> list[int]:
    """Return the open requests that are not taken up; their examples are not retained either."""
    return [each for each in history.open_requests if each not in numbers]


def _examples(ledger: Records, history: History, numbers: Sequence[int]) -> Examples:
    """Return the examples of a run that takes up these requests. InputError if none is left to retain."""
    examples = Examples(ledger, history.accepted_requests, numbers, _excluded(history, numbers))
    if not len(examples.retain):
        raise InputError("expected examples to retain, the requests name every one; delete the model instead")
    return examples


def resume(ledger: Records, started: Entry, choice: Choice, device: torch.device) -> Entry:
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
    ledger.store.append(RESUMED, {"versions": versions(device=str(device))}, started.run)
    return started


def _value(figure: dict[str, float] | None) -> float | None:
    return None if figure is None else figure["value"]


def _chosen_requests(history: History, wanted: Sequence[int] | None) -> list[int]:
    """Return the numbers of the requests to take up: all open ones, or those wanted."""
    open_requests = history.open_requests
    if wanted is None:
        if not open_requests:
            raise InputError("expected open requests, there are none; add one: delfast ledger add")
        return open_requests
    if isinstance(wanted, (str, bytes)) or not isinstance(wanted, Sequence) or not wanted:
        got = "none" if isinstance(wanted, Sequence) and not wanted else describe(wanted)
        raise InputError(f"expected requests as a list of numbers, at least one, got {got}; leave it out for all open")
    for number in wanted:
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise InputError(
                f"expected requests as a list of numbers, got {describe(number)} in it; pass whole numbers"
            )
        if number not in open_requests:
            known = "is accepted already" if number in history.accepted_requests else "does not exist"
            raise InputError(f"expected open requests, request {number} {known}; see `delfast ledger list`")
    return sorted({int(number) for number in wanted})


def _resolved(setting: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Return a setting with the default of every value that it leaves out: the ledger records the values that ran."""
    method = make_method(setting["method"], hyperparameters(setting))
    found = {"batch_size": batch_size, **setting}
    found |= {field.name: getattr(method, field.name) for field in fields(method) if field.init}
    if method.localizes or "budget" in setting or "strategy" in setting:
        found = {"budget": BUDGET, "strategy": STRATEGY, **found}
    return found


def _attempts(ledger: Records, choice: Choice) -> list[dict[str, Any]]:
    """Return the settings to try, in order, each checked."""
    job = ledger.job
    settings = [dict(each) for each in job.settings]
    own: dict[str, Any] | None = settings[0]  # the job's setting that the first attempt is made of
    if choice.method is not None:
        own = next((each for each in settings if each["method"] == choice.method), None)
    retraining = next((each for each in settings if each["method"] == "retrain"), None)
    retraining = retraining or {"method": "retrain", **asdict(job.training)}
    first: dict[str, Any] = {"method": choice.method} if own is None else dict(own)
    if own is None and choice.method == "retrain":
        first = dict(retraining)
    if choice.budget is not None:
        first["budget"] = choice.budget
    check_setting(first, has_loss_fn=job.loss_fn is not None)
    if not choice.escalate:
        return [first]
    others = [each for each in settings if each["method"] != "retrain" and each is not own]
    if first["method"] == "retrain":
        return [first, *others]
    return [first, *others, retraining]
