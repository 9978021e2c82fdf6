"""The commands of a ledger: ``ledger init | add | list | show | run | references | purge | verify | report``.

Only commands that take a job import torch: the others answer at once, also for a ledger of very many requests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
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
COLUMNS = "{:>8}  {:<8}  {:>5}  {:>8}  {:<20}  {:<10}  {}"  # of fixed width, so that a list is printed while it is read
SHOWN_IDS = 20


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
            lines = (line.strip() for line in _text(ids).splitlines())
            number = opened.add([line for line in lines if line], reason=reason, due=due)
            _print(f"added request {number}")
        elif requests is not None:
            numbers = opened.add_requests(_json_objects(requests))
            _print(f"added requests {numbers[0]} to {numbers[-1]}" if numbers else "the file holds no request")
        _print(f"head: {opened.head}")


@app.command("list")
def list_requests(ledger: LedgerDir, as_json: AsJson = False) -> None:
    """List the requests and their states; with --json one JSON object a line."""
    from delfast.ledger import Ledger

    with Ledger.open(ledger) as opened, _pipe():
        if as_json:
            line = json.JSONEncoder(ensure_ascii=False)  # made once: json.dumps makes one at each call
            for request in opened.requests():
                sys.stdout.write(line.encode(vars(request)) + "\n")
            return
        sys.stdout.write(COLUMNS.format("request", "status", "run", "examples", "received (UTC)", "due", "reason\n"))
        for request in opened.requests():
            sys.stdout.write(_row(request) + "\n")


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
        bool, typer.Option("--escalate", help="where the thresholds do not hold, try the job's other settings in order")
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
    from delfast.ledger.starting import LocalizeOn
    from delfast.ledger.words import check_sentence, verdict

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
        for check in result.checks:
            _print(f"{check.name}: {check_sentence(check)}")
        for line in result.advice:
            _print(f"- {line}")
        accepted = f"accepted, {verdict(result.checks)}" if result.accepted else "REJECTED, the model stays as it was"
        _print(f"run {result.number}: {accepted}")
        _print(f"the model in use: {ledger / result.model}")
        _print(f"head: {opened.head}")
    if not result.accepted:
        raise typer.Exit(1)


@app.command()
def references(
    ledger: LedgerDir,
    job: OwnJob,
    count: Annotated[int, typer.Option(min=1, help="number of reference models to have")] = 8,
    hash_ids: KeyFile = None,
    device: Device = "auto",
) -> None:
    """Train reference models, each on a random half of the examples, for the audits of all runs."""
    from delfast.ledger import Ledger

    with Ledger.open(ledger, job=job, hash_ids=hash_ids) as opened:
        made = opened.train_references(count, device=device, watch=log.info)
        numbers = f": {made[0]} to {made[-1]}" if made else "; there are enough"
        _print(f"trained {len(made)} reference models{numbers}")
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
        for each in plan:
            numbers = ", ".join(map(str, each.requests))
            _print(f"{each.file} ({each.bytes:,} bytes): {each.why}; requests {numbers}")
        if yes:
            opened.purge(plan)
            _print(f"deleted {len(plan)} files; copies elsewhere are yours to delete")
            _print(f"head: {opened.head}")
        else:
            _print(f"{len(plan)} files; --yes deletes them" if plan else "no file of an accepted request is left")


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
    _print(f"head: {result.head}")
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
        Path | None,
        typer.Option("--job", help="your own job file: the report then names the requests in each reference model"),
    ] = None,
    hash_ids: KeyFile = None,
) -> None:
    """Write report.html and report.md: the requests, what was done, and the evidence. Prints the head."""
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


def _json_objects(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of '{path}' is no JSON ({one_line(error)}); correct it") from None
        if not isinstance(fields, dict):
            raise InputError(f"expected a JSON object on line {number} of '{path}', got {type(fields).__name__}")
        yield fields


# ---- output


def _print(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")


@contextmanager
def _pipe() -> Iterator[None]:
    """End quietly when the reader of standard output has enough, such as ``head``."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


def _row(request: Request) -> str:
    run = "-" if request.run is None else request.run
    received = f"{request.time[:19].replace('T', ' ')}"
    reason = printable(request.reason or "")
    return COLUMNS.format(
        request.number, request.status, run, request.count, received, request.due or "-", reason
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
        yield f"{entry.time}{run} {entry.event}: {_figures(entry)}"


def _figures(entry: Entry) -> str:
    """Return the fields of a payload that are single values, and how many values the lists have."""
    fields = {name: value for name, value in entry.payload.items() if value is not None and not isinstance(value, dict)}
    return ", ".join(
        f"{len(value)} {name}" if isinstance(value, list) else f"{name} {value}" for name, value in fields.items()
    )


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
