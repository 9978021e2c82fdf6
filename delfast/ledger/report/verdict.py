"""The verdict on one request in plain sentences: what was done, what the figures show, and what was tried before."""

from __future__ import annotations

from delfast.ledger.events import ACCEPTED, LOCALIZED, REJECTED
from delfast.ledger.evidence import BLIND, FAILED, HELD, RESULTS, UNMEASURED, UNSURE, title_of
from delfast.ledger.report import wording
from delfast.ledger.report.history import History, Run, TakenRequest

FORGETTING = ("attack_advantage", "relearn_ratio")
HEADS = {
    HELD: "Held",
    UNSURE: f"Held, but the interval passes the limit ({RESULTS[UNSURE]})",
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
            *_shown(run),
        ]
    elif run.status == REJECTED:
        sentences = [
            f"Not carried out yet, the request is open: run {run.number} did not pass ({run.failures}), so "
            f"{run.started['model']['file']} stayed in use."
        ]
    else:
        sentences = [f"Not carried out yet: run {run.number} has no result. It is at work, or it was stopped."]
    return [*sentences, *_tried(request), *_retrained(request, history, is_held=is_held)]


def forgetting_of(request: TakenRequest, history: History) -> str:
    """In a few words, whether forgetting is seen; empty for a request that is open and that no retraining left out.

    A figure shows it that was above its limit before the run, and is below it with its whole interval after the run.
    """
    retraining = history.retraining
    if retraining is not None and request.number in history.left_out_by(retraining):
        return "trained without them"
    if request.status != ACCEPTED:
        return ""
    measured = [(check, result) for check, result in request.runs[-1].results if check.name in FORGETTING]
    changed = [
        (check, result)
        for check, result in measured
        if check.before is not None and check.limit is not None and check.before > check.limit
    ]
    seen = [title_of(check).lower() for check, result in changed if result == HELD]
    if seen:
        return f"seen in {' and '.join(seen)}"
    return "undecided" if any(result == UNSURE for _, result in changed) else "not seen"


def deed(run: Run) -> str:
    """Describe in words what the newest attempt of a run did."""
    count = wording.counted(run.started["forget"], "example")
    if run.is_retrained:
        retained = wording.counted(run.started["retain"], "example")
        return f"a new network was trained from nothing on the {retained} left, without the {count} to forget"
    text = f"the method {run.settings['method']} changed the model to forget {count}"
    mask = run.last.get(LOCALIZED)
    return text if mask is None else f"{text}, in {100 * mask['selected'] / mask['total']:.1f} % of its elements"


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
        sentences.append(f"The model in use is that network, changed by {wording.runs(since).lower()} since.")
    else:
        sentences.append("The model in use is that network.")
    return sentences
