"""The part of the page on one request: the verdict, its runs, the evidence, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from markupsafe import Markup

from delfast.ledger.events import LOCALIZED, UNLEARNED, VERIFIED
from delfast.ledger.evidence import row_of, sentence_of
from delfast.ledger.report import plots, wording
from delfast.ledger.report.history import History, Run, TakenRequest
from delfast.ledger.report.sets import accuracies, class_rows, set_rows
from delfast.ledger.report.verdict import verdict_of
from delfast.ledger.results import HeldFile
from delfast.ledger.words import failure

SHOWN_IDS = 20  # identifiers of a request
COMPARABLE = ".safetensors"  # `delfast verify` reads these; other files have the form that the job's save gives them
Rows = list[list[str]]


@dataclass(frozen=True)
class Section:
    """The part of the page on one request."""

    number: int
    status: str
    verdict: list[str]
    facts: list[tuple[str, str]]
    ids: list[str]
    ids_left_out: int
    runs: list[dict[str, Any]]
    holders: Rows
    commands: list[str]
    not_repeatable: list[str]
    """Sentences on comparisons that no command can repeat."""


def sections_of(
    requests: Sequence[TakenRequest], history: History, holding: Sequence[HeldFile], drawn: set[int], today: date
) -> list[Section]:
    """Return the part on each of these requests; ``drawn``: numbers of the runs whose relearning curves are drawn.

    The first of a run's requests that has a part shows the drawings.
    """
    shown = {request.number for request in requests}
    drawers = {
        (next((number for number in run.requests if number in shown), None), run.number)
        for run in history.runs.values()
        if run.number in drawn
    }
    return [_section(request, history, holding, drawers, today) for request in requests]


def _section(
    request: TakenRequest,
    history: History,
    holding: Sequence[HeldFile],
    drawers: set[tuple[int | None, int]],
    today: date,
) -> Section:
    hashed = history.created is not None and history.created.payload["hash_ids"]
    is_held = any(held.file == history.model and request.number in held.requests for held in holding)
    commands, not_repeatable = _comparisons(request, history)
    return Section(
        number=request.number,
        status=request.status,
        verdict=verdict_of(request, history, is_held=is_held),
        facts=[
            ("Received", f"{wording.date(request.time)} UTC"),
            ("Examples", f"{request.count:,}"),
            ("Reason", request.reason or "none was given"),
            ("Due", wording.due(request, today) or "no date was given"),
        ],
        ids=[] if hashed else list(request.ids[:SHOWN_IDS]),
        ids_left_out=0 if hashed else max(0, request.count - SHOWN_IDS),
        runs=[_run(run, request, (request.number, run.number) in drawers) for run in reversed(request.runs)],
        holders=[[held.file, held.why] for held in holding if request.number in held.requests],
        commands=[f"delfast ledger verify . --head {history.head}", *commands],
        not_repeatable=not_repeatable,
    )


def _comparisons(request: TakenRequest, history: History) -> tuple[list[str], list[str]]:
    """Return commands that compare the models before and after each run, and sentences where there is none."""
    commands, sentences = [], []
    for run in request.runs:
        parts = [run.started["model"], run.artefact(UNLEARNED, "model"), run.artefact(UNLEARNED, "allowed")]
        files = [part["file"] for part in parts if part is not None]
        if len(files) < len(parts):  # the run has no model of its own
            continue
        gone = [file for file in files if file in history.purged]
        if gone:
            sentences.append(
                f"The models before and after run {run.number} can no longer be compared bit by bit, by anybody: "
                f"{', '.join(gone)} {'was' if len(gone) == 1 else 'were'} deleted. The figures stay as they were "
                "recorded."
            )
        elif all(file.endswith(COMPARABLE) for file in files):
            commands.append(f"delfast verify {' '.join(files)}")
        else:
            sentences.append(
                f"`delfast verify` cannot compare the models of run {run.number}: the job saves them in a form of its "
                f"own, {files[1]}. `delfast ledger verify` compares them with their digests."
            )
    return commands, sentences


def _run(run: Run, request: TakenRequest, is_drawn: bool) -> dict[str, Any]:
    """Return the page's content on one run of a request."""
    figures = run.figures
    return {
        "number": run.number,
        "status": run.status,
        "facts": _facts(run, request),
        "decided": wording.date(run.decided) if run.decided else "",
        "checks": [row_of(check, has_mask=run.has_mask) for check in run.checks],
        "sentences": [sentence_of(check, has_mask=run.has_mask, has_accuracy=run.has_accuracy) for check in run.checks],
        "missing": [] if figures is None else wording.missing(figures),
        "advice": run.result.get("advice", []),
        "sets": [] if figures is None else set_rows(figures, run.baseline.get("figures", {})),
        "classes": class_rows((figures or {}).get("classes") or {}),
        "curves": _curves(run) if is_drawn else [],
    }


def _facts(run: Run, request: TakenRequest) -> list[tuple[str, str]]:
    """Return the facts of one run, each with its name."""
    started = run.started
    others = [number for number in run.requests if number != request.number]
    facts = [
        ("Started", f"{wording.date(run.time)} UTC" + (", stopped and continued" if run.resumed else "")),
        ("Together with", wording.requests(others) if others else "no other request"),
        ("Examples to forget", f"{started['forget']:,}, and {started['retain']:,} to keep"),
    ]
    for settings, checks in run.earlier_checks:
        failed = "; ".join(failure(check) for check in checks if not check.held)
        facts.append(("Tried before", f"{wording.settings(settings)}: {failed}"))
    facts.append(("Settings", wording.settings(run.settings)))
    for name, figures in (("Accuracy before", run.baseline.get("figures")), ("Accuracy after", run.figures)):
        if figures and (text := accuracies(figures)):
            facts.append((name, text))
    facts.append(("Model before", _artefact(started["model"])))
    facts.append(("Model after", _artefact(run.artefact(UNLEARNED, "model"))))
    mask, verified = run.last.get(LOCALIZED), run.last.get(VERIFIED)
    if mask is not None:
        share = 100 * mask["selected"] / mask["total"]
        size = f"{mask['selected']:,} of {mask['total']:,} elements ({share:.1f} %)"
        facts.append(("Mask", f"{size}, chosen {_chosen_on(run)}; {_artefact(mask['mask'])}{_allowed(run)}"))
    if verified is not None:
        changed = wording.counted(verified["changed"], "element") + " changed"
        outside = f", {verified['outside']:,} outside the mask and the last layer" if run.has_mask else "; no mask"
        facts.append(("Compared bit by bit", changed + outside))
    seconds = {name: round(value, 1) for name, value in run.seconds.items()}
    steps = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    facts.append(("Seconds", f"{sum(seconds.values()):.1f} ({steps})"))
    facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in started["versions"].items())))
    return facts


def _allowed(run: Run) -> str:
    """Return the file to compare with, which has the last layer too; empty before it is recorded."""
    found = run.artefact(UNLEARNED, "allowed")
    if found is None:
        return ""
    return f"; what changed outside the mask and the last layer: compare with {found['file']}"


def _chosen_on(run: Run) -> str:
    if run.settings.get("strategy") == "weighted-grad-all":
        return "by the examples to forget and those to keep"
    examples = "all requests so far" if run.started["localize_on"] == "all" else "this run's requests"
    return f"by the examples of {examples}"


def _artefact(found: Mapping[str, Any] | None) -> str:
    return "not recorded" if found is None else f"{found['file']}, SHA-256 {found['digest']}"


def _curves(run: Run) -> list[tuple[Markup, str]]:
    """Return drawings of the relearning curves, with captions."""
    assert run.figures is not None  # the caller's run is audited
    return [
        (
            plots.draw_relearning(run, name, curves),
            f"Trained further on {_trained_on(name, curves)}: {_ratio(curves)}.",
        )
        for name, curves in sorted(run.figures["relearning"].items(), key=lambda item: (item[0] != "retain", item[0]))
        if "left_out" not in curves
    ]


def _ratio(curves: Mapping[str, Any]) -> str:
    return f"ratio {wording.interval(curves['ratio'], 2)}" if curves["ratio"] else "the ratio was not measured"


def _trained_on(name: str, curves: Mapping[str, Any]) -> str:
    if name == "retain":
        return "retained examples alone"
    part = f"{name.removeprefix('forget ')} of the forget set ({wording.counted(curves['trained_on'], 'example')})"
    return f"retained examples and {part}"
