"""The report of a ledger: one self-contained HTML page, and Markdown with the same content in short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

from delfast._version import __version__
from delfast.experiments.reports.pages import render
from delfast.files import make_output_dir, write_text
from delfast.ledger.evidence import COLUMNS as CHECK_COLUMNS
from delfast.ledger.report import answer, wording
from delfast.ledger.report.figures import figures_of
from delfast.ledger.report.history import KEPT_IDS, History, TakenRequest, read_history
from delfast.ledger.report.sections import sections_of
from delfast.ledger.report.sets import SET_COLUMNS
from delfast.ledger.report.verdict import forgetting_of
from delfast.ledger.results import HeldFile
from delfast.ledger.store import Entry

HTML, MARKDOWN = "report.html", "report.md"
SHOWN_REQUESTS = KEPT_IDS  # requests with a section; the page names the command for older ones
SHOWN_ROWS = 1000  # requests in the timeline
FORGETTING = "forgetting (all examples of the run)"
TIMELINE = ["request", "received, UTC", "status", FORGETTING, "decided, UTC", "due", "reason", "examples", "run"]
SHOWN_CURVES = 10  # runs with drawn relearning curves, the newest: a drawing takes about a tenth of a second


def write_report(entries: Iterable[Entry], holding: Sequence[HeldFile], output_dir: Path) -> None:
    """Write ``report.html`` and ``report.md`` of a ledger's entries, in order, to a directory.

    ``holding``: the files that still hold requested examples.
    """
    markdown, page = make_report(entries, holding, today=datetime.now(timezone.utc).date())
    make_output_dir(output_dir)
    write_text(output_dir / MARKDOWN, markdown)
    write_text(output_dir / HTML, page)


def make_report(entries: Iterable[Entry], holding: Sequence[HeldFile], *, today: date) -> tuple[str, str]:
    """Return the report of a ledger's entries as Markdown and as HTML; ``today`` (UTC): for due dates that passed."""
    values = _values(read_history(entries), holding, today)
    return render("delfast.ledger.report", "ledger.md", **values), render(
        "delfast.ledger.report", "ledger.html", **values
    )


def _values(history: History, holding: Sequence[HeldFile], today: date) -> dict[str, Any]:
    """Return everything that the templates print."""
    requests = list(history.requests.values())
    runs = list(history.runs.values())
    created = history.created
    drawn = {run.number for run in [run for run in runs if run.figures is not None][-SHOWN_CURVES:]}
    return {
        "name": "" if created is None else created.payload["job"]["name"],
        "history": history,
        "answer": answer.answer(history),
        "summary": answer.summary(history, holding, today),
        "thresholds": answer.threshold_rows(runs),
        "threshold_columns": answer.COLUMNS,
        "about": _about(history),
        "timeline": [_timeline_row(request, history, today) for request in requests[-SHOWN_ROWS:]],
        "timeline_columns": TIMELINE,
        "figures": figures_of(runs),
        "sections": sections_of(requests[-SHOWN_REQUESTS:], history, holding, drawn, today),
        "left_out": max(0, len(requests) - SHOWN_REQUESTS),
        "left_out_rows": max(0, len(requests) - SHOWN_ROWS),
        "holders": [[held.file, wording.listed(held.requests), held.why, f"{held.digest[:16]}…"] for held in holding],
        "purged": [[file, wording.date(time)] for file, time in history.purged.items()],
        "set_columns": SET_COLUMNS,
        "check_columns": CHECK_COLUMNS,
        "wording": wording,
        "version": __version__,
    }


def _about(history: History) -> list[tuple[str, str]]:
    if history.created is None:
        return []
    payload = history.created.payload
    return [
        ("Job", f"{payload['job']['name']} ({payload['job']['path']})"),
        ("Job file's digest", payload["job"]["digest"]),
        ("Training set", wording.counted(payload["examples"], "example")),
        (
            "Digest of the data",
            f"{payload['data']}. It covers all identifiers, the sizes of both sets, and at most 64 evenly spaced "
            "examples of each: other changes of the data are not found by it",
        ),
        ("First model", f"{payload['model']['file']}, digest {payload['model']['digest']}"),
        (
            "Identifiers",
            "stored as keyed hashes (HMAC-SHA-256)" if payload["hash_ids"] else "stored as they were given",
        ),
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


def _timeline_row(request: TakenRequest, history: History, today: date) -> list[str]:
    run = request.runs[-1] if request.runs else None
    return [
        str(request.number),
        wording.date(request.time),
        wording.REQUEST_STATUS[request.status],
        forgetting_of(request, history),
        "" if run is None or not run.decided else wording.date(run.decided),
        wording.due(request, today),
        request.reason or "",
        f"{request.count:,}",
        "" if run is None else str(run.number),
    ]
