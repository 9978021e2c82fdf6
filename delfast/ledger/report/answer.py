"""The first lines of the report: how the requests stand, what the figures show, and what is still to be done."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from delfast.ledger.events import ACCEPTED, REJECTED
from delfast.ledger.evidence import RESULTS, counted_results, figure_results, interval_of, result_of
from delfast.ledger.report import verdict, wording
from delfast.ledger.report.history import History, Run, TakenRequest
from delfast.ledger.results import Check, HeldFile
from delfast.ledger.words import THRESHOLDS, amount

SHOWN = 3  # runs that did not pass, and requests that were tried again: the newest
COLUMNS = ["check", "limit", "worst figure of a run that passed", "95 % interval", "its result", "results of all runs"]
Rows = list[list[str]]


def answer(history: History) -> str:
    """How many requests there are, how they stand, and for how many forgetting is seen."""
    if not history.requests:
        return "No request has been received."
    parts = [
        f"{count:,} {words}"
        for status, words in wording.REQUEST_STATUS.items()
        if (count := len(history.having(status))) or status == ACCEPTED
    ]
    first = f"{wording.counted(len(history.requests), 'forget request')}: {'; '.join(parts)}."
    return " ".join([first, *_forgetting(history)])


def _forgetting(history: History) -> list[str]:
    """Return a sentence with the totals of the timeline's column on forgetting; none without a value in it."""
    found = [(request, verdict.kind_of(request, history)) for request in history.requests.values()]
    kinds = [kind for _, kind in found]
    totals = [f"{each} in {count:,}" for each in verdict.KINDS if (count := kinds.count(each))]
    if not totals:
        return []
    measured = [request for request, kind in found if kind and kind != verdict.RETRAINED]
    pooled = any(len(request.runs[-1].requests) > 1 for request in measured)
    head = "Forgetting, measured of all examples of a run together" if pooled else "Forgetting"
    return [f"{head}: {', '.join(totals)}."]


def summary(history: History, holding: Sequence[HeldFile], today: date) -> list[str]:
    """Return sentences on the figures, on what did not pass, on retraining, and on requests that are still open."""
    open_requests = [request for request in history.requests.values() if request.status != ACCEPTED]
    last_runs = [request.runs[-1] for request in open_requests if request.status == REJECTED]
    rejected = list({run.number: run for run in last_runs}.values())
    return [
        *_figures(history.accepted),
        *map(_rejection, rejected[-SHOWN:]),
        *_repetitions(history),
        *_retraining(history),
        *_open(open_requests, history, holding),
        *_overdue(open_requests, today),
    ]


def _figures(accepted: Sequence[Run]) -> list[str]:
    """Return a sentence on what the figures of the runs that passed show."""
    results = [result for run in accepted for result in figure_results(run.checks, has_mask=run.has_mask)]
    if not results:
        return []
    meanings = [f"“{each}”: {RESULTS[each]}" for each in RESULTS if each in results and RESULTS[each]]
    runs = "the run that passed" if len(accepted) == 1 else f"the {len(accepted):,} runs that passed"
    text = f"Of the {wording.counted(len(results), 'figure')} of {runs}: {'; '.join(counted_results(results))}."
    return [f"{text} {'; '.join(meanings)}." if meanings else text]


def _rejection(run: Run) -> str:
    return (
        f"Run {run.number} ({wording.requests(run.requests)}) did not pass: {run.failures}. The model stayed as it was."
    )


def _repetitions(history: History) -> list[str]:
    """Return sentences on requests that were carried out after runs or attempts that did not pass."""
    groups: dict[tuple[int, ...], list[TakenRequest]] = {}
    repeated = [request for request in history.having(ACCEPTED) if request.attempt_count > 1]
    for request in repeated:
        groups.setdefault(tuple(run.number for run in request.runs), []).append(request)
    sentences = [_repetition(group) for group in groups.values() if len(group[0].runs) > 1]
    return [*sentences[-SHOWN:], *([wording.CHOSEN] if repeated else [])]


def _repetition(group: Sequence[TakenRequest]) -> str:
    """Return a sentence on the runs before the last of requests that were always taken up together."""
    before = group[0].runs[:-1]
    named = wording.requests([request.number for request in group])
    return (
        f"{named[0].upper()}{named[1:]} {'was' if len(group) == 1 else 'were'} tried in {len(before) + 1} runs: "
        f"{'; '.join(f'run {run.number} did not pass ({run.failures})' for run in before)}."
    )


def _retraining(history: History) -> list[str]:
    """Return a sentence on the requests whose examples the model in use was never trained on."""
    run = history.retraining
    if run is None:
        return []
    left_out = sorted(history.left_out_by(run))
    since = [each.number for each in history.accepted if each.number > run.number]
    later = f" {wording.runs(since)} changed it since." if since else ""
    return [
        f"Run {run.number} trained a new network from nothing, without the examples of {wording.requests(left_out)}."
        f"{later}"
    ]


def _open(requests: Sequence[TakenRequest], history: History, holding: Sequence[HeldFile]) -> list[str]:
    """Return sentences on the requests that are not carried out: with and without a model that holds them."""
    held = {number for each in holding if each.file == history.model for number in each.requests}
    trained = [request.number for request in requests if request.number in held]
    retrained = [request.number for request in requests if request.number not in held]
    states = ((trained, "was trained on these examples"), (retrained, "was retrained without these examples"))
    return [
        f"Not carried out yet: {wording.requests(numbers)}. The model in use {state}."
        for numbers, state in states
        if numbers
    ]


def _overdue(requests: Sequence[TakenRequest], today: date) -> list[str]:
    late = [request for request in requests if wording.is_overdue(request, today)]
    if not late:
        return []
    named = ", ".join(f"request {request.number} (due {request.due})" for request in late[-SHOWN:])
    more = f", and {len(late) - SHOWN:,} more" if len(late) > SHOWN else ""
    return [f"Overdue on {today.isoformat()}: {named}{more}."]


def threshold_rows(runs: Sequence[Run]) -> Rows:
    """A row for each check: its newest limit, the worst figure of a run that passed, and the results of all runs."""
    rows = []
    for name, threshold in THRESHOLDS.items():
        asked = [(run, check) for run in runs if (check := run.asked(name)) is not None]
        if not asked:
            continue
        counts = "; ".join(counted_results(result_of(check, has_mask=run.has_mask) for run, check in asked))
        limit = amount(asked[-1][1].limit, threshold)
        measured = [
            (run, check)
            for run, check in asked
            if run.status == ACCEPTED and check.value is not None and (name != "outside_mask" or run.has_mask)
        ]
        rows.append([threshold.title, limit, *_worst(measured), counts])
    return rows


def _worst(measured: Sequence[tuple[Run, Check]]) -> tuple[str, str, str]:
    """Return the largest figure with its run, its interval, and what it shows; empty without one."""
    if not measured:
        return "", "", ""
    # of equal figures the one with the interval that reaches highest
    run, check = max(measured, key=lambda each: (each[1].value, each[1].high or 0.0, each[0].number))
    figure = f"{amount(check.value, THRESHOLDS[check.name])} (run {run.number})"
    return figure, interval_of(check), result_of(check, has_mask=run.has_mask)
