"""The report of a ledger: one self-contained HTML page, and Markdown with the same content in short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from delfast._version import __version__
from delfast.experiments.reports.pages import render
from delfast.files import make_output_dir, write_text
from delfast.ledger.report import wording
from delfast.ledger.report.figures import figures_of
from delfast.ledger.report.history import KEPT_IDS, STATUSES, History, Run, TakenRequest, read_history
from delfast.ledger.report.sections import SET_COLUMNS, section_of
from delfast.ledger.requests import ACCEPTED, PENDING, REJECTED
from delfast.ledger.results import HeldFile
from delfast.ledger.store import Entry
from delfast.ledger.words import THRESHOLDS, amount, failure, is_unsure, verdict

HTML, MARKDOWN = "report.html", "report.md"
SHOWN_REQUESTS = KEPT_IDS  # requests with a section; the page names the command for older ones
SHOWN_ROWS = 1000  # requests in the timeline
SHOWN_REJECTIONS = 3  # rejected runs in the answer, the newest
SHOWN_CURVES = 10  # runs with drawn relearning curves, the newest: a drawing takes about a tenth of a second
Rows = list[list[str]]


def write_report(entries: Iterable[Entry], holding: Sequence[HeldFile], output_dir: Path) -> None:
    """Write ``report.html`` and ``report.md`` of a ledger's entries, in order, to a directory.

    ``holding``: the files that still hold requested examples.
    """
    markdown, page = make_report(entries, holding)
    make_output_dir(output_dir)
    write_text(output_dir / MARKDOWN, markdown)
    write_text(output_dir / HTML, page)


def make_report(entries: Iterable[Entry], holding: Sequence[HeldFile]) -> tuple[str, str]:
    """Return the report of a ledger's entries as Markdown and as HTML."""
    values = _values(read_history(entries), holding)
    return render("delfast.ledger.report", "ledger.md", **values), render(
        "delfast.ledger.report", "ledger.html", **values
    )


def _values(history: History, holding: Sequence[HeldFile]) -> dict[str, Any]:
    """Return everything that the templates print."""
    requests = list(history.requests.values())
    runs = list(history.runs.values())
    created = history.created
    drawn = {run.number for run in [run for run in runs if run.figures is not None][-SHOWN_CURVES:]}
    return {
        "name": "" if created is None else created.payload["job"]["name"],
        "history": history,
        "answer": _answer(history),
        "summary": _summary(history, holding),
        "thresholds": _thresholds(runs),
        "worst": _worst(runs),
        "about": _about(history),
        "timeline": [_timeline_row(request) for request in requests[-SHOWN_ROWS:]],
        "figures": figures_of(runs),
        "sections": [section_of(request, history, holding, drawn) for request in requests[-SHOWN_REQUESTS:]],
        "left_out": max(0, len(requests) - SHOWN_REQUESTS),
        "left_out_rows": max(0, len(requests) - SHOWN_ROWS),
        "holders": [[held.file, wording.listed(held.requests), held.why, f"{held.digest[:16]}…"] for held in holding],
        "purged": [[file, wording.date(time)] for file, time in history.purged.items()],
        "set_columns": SET_COLUMNS,
        "wording": wording,
        "version": __version__,
    }


# ---- the answer


def _answer(history: History) -> str:
    """One sentence: how many requests there are, and how they stand."""
    if not history.requests:
        return "No request has been received."
    counts = {status: len(history.having(status)) for status in STATUSES}
    parts = [
        f"{count:,} {status}" for status, count in counts.items() if count or status in (ACCEPTED, REJECTED, PENDING)
    ]
    return f"{wording.counted(len(history.requests), 'forget request')}: {', '.join(parts)}."


def _summary(history: History, holding: Sequence[HeldFile]) -> list[str]:
    """Return sentences on the thresholds in accepted runs, on rejected runs, and on requests that are still open."""
    open_requests = [request for request in history.requests.values() if request.status != ACCEPTED]
    accepted = [run for run in history.runs.values() if run.status == ACCEPTED]
    rejected = {request.runs[-1].number: request.runs[-1] for request in open_requests if request.status == REJECTED}
    sentences = [*_kept(accepted), *map(_rejection, list(rejected.values())[-SHOWN_REJECTIONS:])]
    held = {number for each in holding if each.file == history.model for number in each.requests}
    for numbers, state in (
        ([request.number for request in open_requests if request.number in held], "was trained on these examples"),
        (
            [request.number for request in open_requests if request.number not in held],
            "was retrained without these examples",
        ),
    ):
        if numbers:
            sentences.append(f"Not carried out: {wording.requests(numbers)}. The model in use {state}.")
    return sentences


def _kept(accepted: list[Run]) -> list[str]:
    """Return sentences on the thresholds in accepted runs."""
    if not accepted:
        return []
    checks = [check for run in accepted for check in run.checks]
    unsure = sum(is_unsure(check) for check in checks)
    runs = "accepted run" if len(accepted) == 1 else wording.counted(len(accepted), "accepted run")
    sentences = [f"In the {runs}, {verdict(checks)}."]
    if unsure:
        sentences.append(
            f"For {unsure} of the {len(checks)} figures of these runs, the 95 % interval reaches above the limit: the "
            "measurement cannot exclude that the limit was passed."
        )
    if blind := sum(check.held_before for check in checks):
        sentences.append(
            f"For {blind} of the {len(checks)} figures, the model before the run was within the limit too: these do "
            "not show that anything was forgotten."
        )
    return sentences


def _rejection(run: Run) -> str:
    """One sentence on a rejected run: what did not hold."""
    failed = [failure(check) for check in run.checks if not check.held] or ["it was stopped and then abandoned"]
    requests = wording.requests(run.requests)
    return f"Run {run.number} ({requests}) was rejected: {'; '.join(failed)}. The model from before it was kept."


def _thresholds(runs: list[Run]) -> Rows:
    """A row for each threshold: its newest limit, how often it held, and the largest figure of an accepted run."""
    rows = []
    for name, threshold in THRESHOLDS.items():
        asked = [(run, check) for run in runs if (check := run.asked(name)) is not None]
        if not asked:
            continue
        values = [
            (check.value, run.number) for run, check in asked if run.status == ACCEPTED and check.value is not None
        ]
        value, number = max(values, default=(None, 0))
        largest = "" if value is None else f"{amount(value, threshold)} (run {number})"
        held = sum(check.held and check.value is not None for _, check in asked)
        limit = amount(asked[-1][1].limit, threshold)
        rows.append([threshold.title, limit, f"{held} of {wording.counted(len(asked), 'run')}", largest])
    return rows


def _worst(runs: list[Run]) -> str:
    """One sentence: the figure of an accepted run that is the farthest from its best value, measured by its limit."""
    found = [
        ((check.value - THRESHOLDS[check.name].best) / (check.limit - THRESHOLDS[check.name].best), run.number, check)
        for run in runs
        if run.status == ACCEPTED
        for check in run.checks
        if check.value is not None and check.limit is not None and check.limit > THRESHOLDS[check.name].best
    ]
    if not found:
        return ""
    _, number, check = max(found, key=lambda each: each[:2])
    return f"Worst figure of an accepted run: {failure(check)}, in run {number}."


def _about(history: History) -> list[tuple[str, str]]:
    if history.created is None:
        return []
    payload = history.created.payload
    return [
        ("Job", f"{payload['job']['name']} ({payload['job']['path']})"),
        ("Job file's digest", payload["job"]["digest"]),
        ("Training set", f"{payload['examples']:,} examples, digest {payload['data']}"),
        ("First model", f"{payload['model']['file']}, digest {payload['model']['digest']}"),
        ("Identifiers", "stored as keyed hashes (HMAC)" if payload["hash_ids"] else "stored as they were given"),
        ("Reference models", _references(history)),
        ("Created", wording.date(history.created.time)),
        ("Newest entry", f"number {history.entry_count:,}, {wording.date(history.last_time)}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in payload["versions"].items())),
    ]


def _references(history: History) -> str:
    """Return how many reference models there are, and how many were deleted."""
    if not history.references:
        return "none; the per-example attack and the relearning ratio need them"
    gone = len(history.references & history.purged.keys())
    return f"{len(history.references) - gone}" + (f", and {gone} that were deleted" if gone else "")


def _timeline_row(request: TakenRequest) -> list[str]:
    run = request.runs[-1] if request.runs else None
    decided = "" if run is None or not run.decided else wording.date(run.decided)
    return [
        str(request.number),
        wording.date(request.time),
        f"{request.count:,}",
        request.status,
        "" if run is None else str(run.number),
        decided,
        request.due or "",
        request.reason or "",
    ]
