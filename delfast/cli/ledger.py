"""The commands of a ledger: ``ledger init | add | list | show | run | references | purge | verify | report``.

Only commands that take a job import torch: the others answer at once, also for a ledger of very many requests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date, datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from delfast.cli.console import log
from delfast.cli.options import Device
from delfast.errors import InputError, one_line, printable

if TYPE_CHECKING:  # imports sqlite3
    from delfast.ledger import Entry, Request, RequestDetails

app = typer.Typer(no_args_is_help=True, help="Keep forget requests for one model, and the evidence of what was done.")

LedgerDir = Annotated[Path, typer.Argument(metavar="LEDGER", help="directory of the ledger")]
OwnJob = Annotated[Path, typer.Option("--job", help="your own job file: it is executed")]
KeyFile = Annotated[
    Path | None, typer.Option("--hash-ids", help="key file of a ledger that stores identifiers as HMACs")
]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable, on standard output")]
COLUMNS = "{:>8}  {:<8}  {:>5}  {:>8}  {:<20}  {:<19}  {}"  # of fixed width, so that a list is printed while it is read
SHOWN_IDS = 20
LISTS = {  # lists of a payload that `show` counts
    "ids": "example",
    "requests": "request",
    "excluded": "open request",
    "references": "reference",
    "attempts": "attempt",
    "files": "file",
}


@app.command()
def init(
    ledger: LedgerDir,
    job: OwnJob,
    model: Annotated[Path, typer.Option(help="checkpoint of the trained model; it is copied into the ledger")],
    hash_ids: Annotated[
        Path | None,
        typer.Option(
            help="store identifiers as HMAC-SHA-256 with the key in this file, outside the ledger; made if there is "
            "none. Other commands need it again"
        ),
    ] = None,
) -> None:
    """Make a ledger for a trained model."""
    from delfast.ledger import Ledger

    with Ledger.create(ledger, job=job, model=model, hash_ids=hash_ids) as made:
        _print(f"made the ledger '{ledger}' for {made.created['examples']} training examples")
        if made.job.loss_fn is not None and made.job.accept.test_drop is not None:
            _print("a job with a loss_fn has no accuracies: before `run`, define accept in it without test_drop")
        _print(f"head: {made.head}")


@app.command()
def add(
    ledger: LedgerDir,
    job: OwnJob,
    ids: Annotated[
        Path | None, typer.Option(help="file of the examples to forget, one identifier a line; - reads standard input")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            help="file of many requests instead, one JSON object a line: "
            '{"ids": ["17"], "reason": "case 7", "due": "2026-12-31"}; all are added or none; - reads standard input'
        ),
    ] = None,
    reason: Annotated[
        str | None, typer.Option(help="free text, stored as it is: write no personal data into it")
    ] = None,
    due: Annotated[str | None, typer.Option(help="date by which it is to be done, YYYY-MM-DD")] = None,
    hash_ids: KeyFile = None,
) -> None:
    """Add a forget request, or many."""
    from delfast.ledger import Ledger

    if (ids is None) == (requests is None) or (requests is not None and (reason is not None or due is not None)):
        raise InputError("expected --ids, with --reason and --due if wanted, or --requests alone; pass one of them")
    with Ledger.open(ledger, job=job, hash_ids=hash_ids) as opened:
        if ids is not None:
            found, lines = _read_ids(ids)
            with _naming_lines(ids, lines):
                number = opened.add(found, reason=reason, due=due)
            _print(f"added request {number}")
            dates = [due]
        elif requests is not None:
            given, lines = _read_requests(requests)
            with _naming_lines(requests, lines):
                numbers = opened.add_requests(given)
            _print(f"added {_numbered('request', numbers)}" if numbers else "the file holds no request")
            dates = [each["due"] for each in given]
        late = sorted(each for each in dates if each is not None and _is_past(each))
        if late:
            _print(f"{len(late)} overdue: the due date {late[0]} has passed")
        _print(f"head: {opened.head}")


@app.command("list")
def list_requests(ledger: LedgerDir, as_json: AsJson = False) -> None:
    """List the requests and their states; with --json one JSON object a line.

    Accepted: carried out. Rejected: not carried out yet, since the last run did not pass. Running, stopped: a run has
    no result yet. Pending: no run yet. The entries are read as they are, which is fast: `verify` checks them.
    """
    from delfast.ledger import Ledger

    with Ledger.open(ledger) as opened, _pipe():
        if as_json:
            line = json.JSONEncoder(ensure_ascii=False)  # made once: json.dumps makes one at each call
            for request in opened.requests():
                sys.stdout.write(line.encode(vars(request)) + "\n")
            return
        sys.stdout.write(COLUMNS.format("request", "status", "run", "examples", "received (UTC)", "due", "reason\n"))
        stopped = None
        for request in opened.requests():
            if request.status == "running" and stopped is None:
                stopped = not opened.is_working
            sys.stdout.write(_row(request, stopped=bool(stopped)) + "\n")
        if stopped:
            sys.stdout.write("stopped: continue with delfast ledger run\n")


@app.command()
def show(
    ledger: LedgerDir,
    number: Annotated[int | None, typer.Argument(metavar="N", help="number of the request")] = None,
    identifier: Annotated[str | None, typer.Option("--id", help="show the request that names this example")] = None,
    job: Annotated[
        Path | None, typer.Option("--job", help="your own job file: with it and the key, HMACs are shown as text")
    ] = None,
    hash_ids: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show one request: its examples, and every event about it."""
    from delfast.ledger import Ledger

    if (number is None) == (identifier is None):
        raise InputError("expected the number of a request, or --id ID; pass one of them")
    with Ledger.open(ledger, job=job, hash_ids=hash_ids) as opened:
        found = number if identifier is None else opened.find(identifier)
        if found is None:
            raise InputError(f"expected an example that a request names, got '{identifier}'; no request names it")
        details, model = opened.show(found), ledger / opened.model.relative_to(opened.path)
    with _pipe():
        if as_json:
            sys.stdout.write(json.dumps(_plain(details), ensure_ascii=False, indent=2) + "\n")
            return
        for line in _lines(details):
            _print(line)
        _print(f"the model in use: {model}")


@app.command()
def run(
    ledger: LedgerDir,
    job: OwnJob,
    request: Annotated[
        list[int] | None, typer.Option(metavar="N", help="a request to take up; repeatable (default: all open ones)")
    ] = None,
    pending: Annotated[bool, typer.Option("--pending", help="take up all open requests: the default")] = False,
    method: Annotated[str | None, typer.Option(help="method to use (default: the job's first setting)")] = None,
    budget: Annotated[float | None, typer.Option(help="fraction of the parameters to select, in (0, 1]")] = None,
    localize_on: Annotated[
        str | None, typer.Option(help="new: localize the requests taken up (default); all: with all accepted ones")
    ] = None,
    escalate: Annotated[
        bool,
        typer.Option(
            "--escalate",
            help="where the thresholds do not hold, try the job's other settings in order, and retraining last",
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="seed (default: derived from the run's number); use another than that of the training"),
    ] = None,
    accept_unmeasured: Annotated[
        bool,
        typer.Option("--accept-unmeasured", help="accept where a threshold cannot be measured on so few examples"),
    ] = False,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="end a run that was stopped, as rejected, and do nothing else")
    ] = False,
    hash_ids: KeyFile = None,
    device: Device = "auto",
) -> None:
    """Unlearn the open requests, audit the result, and accept or reject it: exit code 1 if it is rejected.

    A run that was stopped is continued by the same command without settings.
    """
    from delfast.ledger import Ledger
    from delfast.ledger.evidence import counted_results, result_of, table_lines
    from delfast.ledger.starting import LocalizeOn

    if pending and request:
        raise InputError("expected --request or --pending, got both; pass the numbers, or take up all open requests")
    with Ledger.open(ledger, job=job, hash_ids=hash_ids) as opened:
        if abandon:
            _print(f"run {opened.abandon()} is ended, as rejected; its requests are open")
            return
        result = opened.run(
            requests=request,
            method=method,
            budget=budget,
            localize_on=cast("LocalizeOn | None", localize_on),
            escalate=escalate or None,
            seed=seed,
            accept_unmeasured=accept_unmeasured or None,
            device=device,
            watch=log.info,
        )
        has_mask = _has_mask(opened.store.entries(run=result.number))
        for line in [*table_lines(result.checks, has_mask=has_mask), *(f"- {each}" for each in result.advice)]:
            _print(line)
        counts = "; ".join(counted_results(result_of(check, has_mask=has_mask) for check in result.checks))
        _print(
            f"run {result.number}: {'accepted' if result.accepted else 'REJECTED, the model stays as it was'}: {counts}"
        )
        _print(f"the model in use: {ledger / result.model}")
        _print(f"head: {opened.head}")
    if not result.accepted:
        raise typer.Exit(1)


@app.command()
def references(
    ledger: LedgerDir,
    job: OwnJob,
    count: Annotated[int, typer.Option(min=1, help="number of references to have")] = 8,
    hash_ids: KeyFile = None,
    device: Device = "auto",
) -> None:
    """Train reference models, each on a random half of the examples, for the audits of all runs."""
    from delfast.ledger import Ledger

    with Ledger.open(ledger, job=job, hash_ids=hash_ids) as opened:
        made = opened.train_references(count, device=device, watch=log.info)
        _print(f"trained {_numbered('reference', made)}" if made else "trained no reference; there are enough")
        _print(f"head: {opened.head}")


@app.command()
def purge(
    ledger: LedgerDir,
    job: OwnJob,
    yes: Annotated[bool, typer.Option("--yes", help="delete the files; without it they are only shown")] = False,
    hash_ids: KeyFile = None,
) -> None:
    """Show the files that still hold examples of accepted requests, and with --yes delete them."""
    from delfast.ledger import Ledger

    with Ledger.open(ledger, job=job, hash_ids=hash_ids) as opened:
        plan = opened.purge_plan()
        if yes:
            opened.purge(plan)  # refused while another process works, before anything is printed as if it was done
        for each in plan:
            numbers = f"{_noun(len(each.requests), 'request')} {', '.join(map(str, each.requests))}"
            _print(f"{'deleted ' if yes else ''}{each.file} ({each.bytes:,} bytes): {each.why}; {numbers}")
        files = f"{len(plan)} {_noun(len(plan), 'file')}"
        if yes:
            _print(f"deleted {files}; copies elsewhere are yours to delete")
            _print(f"head: {opened.head}")
        else:
            _print(f"{files}; --yes deletes them" if plan else "no file of an accepted request is left")


@app.command()
def verify(
    ledger: LedgerDir,
    head: Annotated[
        str | None, typer.Option(help="head that was printed earlier: finds a ledger rewritten or cut since")
    ] = None,
    files: Annotated[bool, typer.Option(help="compare the recorded files with their digests too")] = True,
) -> None:
    """Check every entry and recorded file of a ledger: exit code 1 if something was changed, else 0."""
    from delfast.ledger.verification import verify_directory

    result = verify_directory(ledger, head, files=files)
    for problem in result.problems:
        _print(problem)
    _print(f"entries that hold: {result.count}")
    # the hash before a damaged entry is no head to keep
    _print(f"{'head' if result.holds else 'hash of the last one that holds'}: {result.head}")
    if not result.holds:
        _print("the ledger does NOT hold")
        raise typer.Exit(1)
    if head is None:
        _print("the ledger holds; only --head finds one that was rewritten as a whole or cut at its end")
    else:
        _print("the ledger holds, and continues the one of that head")


@app.command()
def report(
    ledger: LedgerDir,
    output_dir: Annotated[Path, typer.Option(help="directory of the report; made if it does not exist")],
    job: Annotated[
        Path | None, typer.Option("--job", help="your own job file: with it the report names which references saw what")
    ] = None,
    hash_ids: KeyFile = None,
) -> None:
    """Write report.html and report.md: what was asked, what was done, and the evidence. Prints the head."""
    from delfast.ledger import Ledger
    from delfast.ledger.report import HTML

    with Ledger.open(ledger, job=job, hash_ids=hash_ids) as opened:
        opened.report(output_dir)
        _print(f"see {output_dir / HTML}")
        _print(f"head: {opened.head}")


# ---- input


def _text(path: Path) -> str:
    """Return the text of a file, or of standard input for "-"; UTF-8, with or without a byte order mark."""
    from delfast.files import read_text, reason

    try:
        return sys.stdin.buffer.read().decode("utf-8-sig") if str(path) == "-" else read_text(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{path}' ({reason(error)}); pass a text file or -") from None


def _read_ids(path: Path) -> tuple[list[str], dict[str, int]]:
    """Return the identifiers of a file, one a line, and the line of each."""
    stripped = ((number, line.strip()) for number, line in enumerate(_text(path).splitlines(), start=1))
    named = [(number, line) for number, line in stripped if line]
    return [line for _, line in named], {line: number for number, line in named}


def _read_requests(path: Path) -> tuple[list[Mapping[str, Any]], dict[str, int]]:
    """Return the requests of a file, one JSON object a line, and the line of each identifier."""
    from delfast.ledger.requests import read_request

    found: list[Mapping[str, Any]] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of '{path}' is no JSON ({one_line(error)}); correct it") from None
        if not isinstance(fields, dict):
            raise InputError(f"expected a JSON object on line {number} of '{path}', got {type(fields).__name__}")
        try:
            ids, reason, due = read_request(fields)
        except InputError as error:
            raise InputError(f"line {number} of '{path}': {error}") from None
        lines.update(dict.fromkeys(ids, number))
        found.append({"ids": ids, "reason": reason, "due": due})
    return found, lines


@contextmanager
def _naming_lines(path: Path, lines: Mapping[str, int]) -> Iterator[None]:
    """Add the line of the file to the error of an identifier that cannot be added."""
    from delfast.ledger.identifiers import RefusedIdentifier

    try:
        yield
    except RefusedIdentifier as error:
        raise InputError(f"line {lines[error.identifier]} of '{path}': {error}") from None


# ---- output


def _print(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")


def _noun(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _numbered(noun: str, numbers: Sequence[int]) -> str:
    """Return a noun with its numbers, which follow each other."""
    first, last = numbers[0], numbers[-1]
    return f"{noun} {first}" if len(numbers) == 1 else f"{noun}s {first} to {last}"


def _is_past(due: str) -> bool:
    """Return whether a due date (YYYY-MM-DD) has passed, by the clock of UTC."""
    return date.fromisoformat(due) < datetime.now(timezone.utc).date()


@contextmanager
def _pipe() -> Iterator[None]:
    """End quietly when the reader of standard output has enough, such as ``head``."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


def _has_mask(events: Iterable[Entry]) -> bool:
    """Return whether the last attempt of a run that ended was kept to a mask, by the entries of the run."""
    from delfast.ledger.events import LOCALIZED

    localized, tried = set(), 0
    for entry in events:
        if entry.event == LOCALIZED:
            localized.add(entry.payload["attempt"])
        tried = max(tried, entry.payload.get("attempt", 0))
    return tried in localized


def _row(request: Request, *, stopped: bool) -> str:
    """Return a line of ``list``; ``stopped``: no process is at work, so a run without a result was stopped."""
    run = "-" if request.run is None else request.run
    received = f"{request.time[:19].replace('T', ' ')}"
    reason = printable(request.reason or "")
    return COLUMNS.format(
        request.number,
        "stopped" if stopped and request.status == "running" else request.status,
        run,
        request.count,
        received,
        (request.due or "-") + (", overdue" if request.is_open and request.due and _is_past(request.due) else ""),
        reason,
    ).rstrip()


def _lines(details: RequestDetails) -> Iterator[str]:
    """Yield what ``show`` prints of a request."""
    request = details.request
    ids = details.ids if details.originals is None else details.originals
    more = f" and {len(ids) - SHOWN_IDS} more (--json prints all)" if len(ids) > SHOWN_IDS else ""
    kind = "HMACs" if details.originals is None else "examples"
    yield f"request {request.number}: {request.status}" + ("" if request.run is None else f" in run {request.run}")
    yield f"received: {request.time}"
    yield f"due: {request.due or '-'}"
    yield f"reason: {request.reason or '-'}"
    yield f"{kind} ({request.count}): {', '.join(ids[:SHOWN_IDS])}{more}"
    for entry in details.events:
        run = "" if entry.run is None else f" run {entry.run}"
        yield f"{entry.time}{run} {entry.event}: {_figures(entry)}".removesuffix(": ")
        if "checks" in entry.payload:
            yield from _checks(entry, [each for each in details.events if each.run == entry.run])


def _figures(entry: Entry) -> str:
    """Return the fields of a payload that are single values, and how many values some lists have."""
    parts = []
    for name, value in entry.payload.items():
        if isinstance(value, list):
            noun = LISTS.get(name)
            parts += [f"{len(value)} {_noun(len(value), noun)}"] if noun and value else []
        elif value is not None and not isinstance(value, dict):
            parts.append(f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def _checks(ended: Entry, events: Sequence[Entry]) -> Iterator[str]:
    """Yield the checks of a run that ended, as ``run`` prints them, and its advice."""
    from delfast.ledger import Check
    from delfast.ledger.evidence import table_lines

    checks = [Check(**each) for each in ended.payload["checks"]]
    lines = table_lines(checks, has_mask=_has_mask(events)) if checks else []
    for line in [*lines, *(f"- {each}" for each in ended.payload.get("advice", ()))]:
        yield f"    {line}"


def _plain(details: RequestDetails) -> dict[str, Any]:
    events = [
        {"number": each.number, "time": each.time, "event": each.event, "run": each.run, "payload": each.payload}
        for each in details.events
    ]
    return {
        "request": asdict(details.request),
        "ids": list(details.ids),
        "originals": None if details.originals is None else list(details.originals),
        "events": events,
    }
