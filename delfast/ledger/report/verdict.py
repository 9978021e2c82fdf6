"""The verdict on one request in plain sentences: what was done, what the figures show, and what was tried before."""

from __future__ import annotations

from delfast.ledger.events import ACCEPTED, LOCALIZED, REJECTED
from delfast.ledger.evidence import BLIND, FAILED, HELD, RESULTS, UNMEASURED, UNSURE, title_of
from delfast.ledger.report import wording
from delfast.ledger.report.history import History, Run, TakenRequest
from delfast.ledger.results import Check

FORGETTING = ("attack_advantage", "relearn_ratio")
SEEN, UNDECIDED, NOTHING, RETRAINED = "seen", "undecided", "nothing to see before the run", "trained without them"
KINDS = (SEEN, UNDECIDED, NOTHING, UNMEASURED, RETRAINED)
"""The verdicts on forgetting, in the order in which they are counted."""
HEADS = {
    HELD: "Held",
    UNSURE: f"Held, but undecided ({RESULTS[UNSURE]})",
    BLIND: f"Held, but shows nothing ({RESULTS[BLIND]})",
    UNMEASURED: "Not measured",
    FAILED: "Did not hold",
}


def verdict_of(request: TakenRequest, history: History, *, is_held: bool) -> list[str]:
    """Return the sentences; ``is_held``: the model in use holds the request's examples."""
    run = request.runs[-1] if request.runs else None
    if run is None:
        sentences = ["Not carried out yet: no run has taken up this request."]
    elif run.status == ACCEPTED:
        sentences = [
            f"Carried out on {run.decided[:10]} by run {run.number}: {deed(run)}. The model in use changed from "
            f"{run.started['model']['file']} to {run.result['model']['file']}.",
            f"Forgetting: {forgetting_of(request, history)}.",
            *_retrained(request, history, is_held=is_held),
            *_pooled(request, run),
            *_shown(run),
        ]
    elif run.status == REJECTED:
        sentences = [
            f"Not carried out yet, the request is open: run {run.number} did not pass ({run.failures}), so "
            f"{run.started['model']['file']} stayed in use."
        ]
    else:
        sentences = [f"Not carried out yet: run {run.number} has no result. It is at work, or it was stopped."]
    if request.status != ACCEPTED:
        sentences += _retrained(request, history, is_held=is_held)
    return [*sentences, *_tried(request)]


def forgetting_of(request: TakenRequest, history: History) -> str:
    """Return the verdict on forgetting in a few words, with the figures that show it; empty without a verdict."""
    kind = kind_of(request, history)
    return f"{SEEN} in {' and '.join(_seen(request.runs[-1]))}" if kind == SEEN else kind


def kind_of(request: TakenRequest, history: History) -> str:
    """Return one of ``KINDS``; empty for a request that is open and that no retraining left out.

    A figure shows forgetting that was above its limit before the run, and is below it with its whole interval after
    the run.
    """
    retraining = history.retraining
    if retraining is not None and request.number in history.left_out_by(retraining):
        return RETRAINED
    if request.status != ACCEPTED:
        return ""
    run = request.runs[-1]
    if not _measured(run):
        return UNMEASURED
    if _seen(run):
        return SEEN
    return UNDECIDED if any(result == UNSURE for _, result in _changed(run)) else NOTHING


def _measured(run: Run) -> list[tuple[Check, str]]:
    """Return the checks of forgetting with a figure before and after the run, each with its result."""
    return [
        (check, result)
        for check, result in run.results
        if check.name in FORGETTING and check.value is not None and check.before is not None
    ]


def _changed(run: Run) -> list[tuple[Check, str]]:
    """Return the measured checks whose figure was above its limit before the run."""
    return [
        (check, result)
        for check, result in _measured(run)
        if check.before is not None and check.limit is not None and check.before > check.limit
    ]


def _seen(run: Run) -> list[str]:
    """Return the titles of the checks that show forgetting."""
    return [title_of(check).lower() for check, result in _changed(run) if result == HELD]


def deed(run: Run) -> str:
    """Describe in words what the newest attempt of a run did."""
    count = wording.counted(run.started["forget"], "example")
    if run.is_retrained:
        retained = wording.counted(run.started["retain"], "example")
        return f"a new network was trained from nothing on the {retained} left, without the {count} to forget"
    text = f"the method {run.settings['method']} changed the model to forget {count}"
    mask = run.last.get(LOCALIZED)
    return text if mask is None else f"{text}, in {100 * mask['selected'] / mask['total']:.1f} % of its elements"


def _pooled(request: TakenRequest, run: Run) -> list[str]:
    """Return a sentence on figures that are of several requests together."""
    if len(run.requests) == 1:
        return []
    count = wording.counted(run.started["forget"], "example")
    alone = "this one" if request.count == 1 else "these"
    return [
        f"The figures are of {count} together, {request.count:,} of them this request's; they do not show what became "
        f"of {alone} alone."
    ]


def _shown(run: Run) -> list[str]:
    """Return a sentence for each result that a figure of the run has, and one on a small forget set.

    What stayed unchanged outside a mask is left out: it shows nothing about forgetting.
    """
    results = [(check, result) for check, result in run.results if not (check.name == "outside_mask" and check.held)]
    found = {head: [title_of(check) for check, result in results if result == each] for each, head in HEADS.items()}
    sentences = [f"{head}: {'; '.join(titles).lower()}." for head, titles in found.items() if titles]
    if run.started["forget"] < wording.SMALL:
        count = wording.counted(run.started["forget"], "example")
        sentences.append(
            f"The run had {count} to forget: most figures need more to separate forgotten from remembered."
        )
    return sentences


def _tried(request: TakenRequest) -> list[str]:
    """Return sentences on the runs before the newest one, and on the attempts before its newest one."""
    if not request.runs:
        return []
    *before, last = request.runs
    sentences = [f"It was tried in {len(request.runs)} runs."] if before else []
    for run in before:
        same = " with the same settings and other random numbers" if run.settings == last.settings else ""
        sentences.append(f"Run {run.number}{same} did not pass: {run.failures}.")
    if last.earlier_checks:
        attempts = wording.counted(len(last.earlier_checks), "attempt")
        sentences.append(f"In run {last.number}, {attempts} before the last did not pass.")
    if request.status == ACCEPTED and request.attempt_count > 1:
        sentences.append(wording.CHOSEN)
    return sentences


def _retrained(request: TakenRequest, history: History, *, is_held: bool) -> list[str]:
    """Return sentences on a network that was trained from nothing without the request's examples."""
    run = history.retraining
    if run is None or request.number not in history.left_out_by(run):
        if request.status == ACCEPTED:
            return []
        return [f"The model in use was trained {'on' if is_held else 'without'} its examples."]
    sentences = []
    if request.runs[-1:] != [run]:
        retained = wording.counted(run.started["retain"], "example")
        sentences.append(
            f"Run {run.number} trained a new network from nothing on the {retained} left: the examples of this request "
            "were not among them."
        )
    since = [each.number for each in history.accepted if each.number > run.number]
    if since:
        changes = f", changed by {wording.runs(since).lower()} since"
        sentences.append(f"The model in use is the network of run {run.number}{changes}.")
    else:
        sentences.append(f"The model in use is the network of run {run.number}.")
    return sentences
