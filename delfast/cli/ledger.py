"""The commands of a ledger: ``ledger init | add | list | show | run | references | purge | verify | report``.

Only commands that take a job import torch: the others answer at once, also for a ledger of very many requests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from delfast.cli.console import log
from delfast.cli.ledger_input import naming_lines, read_ids, read_requests
from delfast.cli.ledger_output import (
    COLUMNS,
    counted,
    is_past,
    kept_to_a_mask,
    lines_of,
    numbered,
    piped,
    plain,
    print_line,
    row,
)
from delfast.cli.options import Device
from delfast.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Keep forget requests for one model, and the evidence of what was done.")

LedgerDir = Annotated[Path, typer.Argument(metavar="LEDGER", help="directory of the ledger")]
OwnJob = Annotated[Path, typer.Option("--job", help="your own job file: it is executed")]
KeyFile = Annotated[
    Path | None, typer.Option("--hash-ids", help="key file of a ledger that stores identifiers as HMACs")
]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable, on standard output")]


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
        print_line(f"made the ledger '{ledger}' for {made.created['examples']} training examples")
        if made.job.loss_fn is not None and made.job.accept.test_drop is not None:
            print_line("a job with a loss_fn has no accuracies: before `run`, define accept in it without test_drop")
        print_line(f"head: {made.head}")


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
            found, lines = read_ids(ids)
            with naming_lines(ids, lines):
                number = opened.add(found, reason=reason, due=due)
            print_line(f"added request {number}")
            dates = [due]
        elif requests is not None:
            given, lines = read_requests(requests)
            with naming_lines(requests, lines):
                numbers = opened.add_requests(given)
            print_line(f"added {numbered('request', numbers)}" if numbers else "the file holds no request")
            dates = [each["due"] for each in given]
        late = sorted(each for each in dates if each is not None and is_past(each))
        if late:
            print_line(f"{len(late)} overdue: the due date {late[0]} has passed")
        print_line(f"head: {opened.head}")


@app.command("list")
def list_requests(ledger: LedgerDir, as_json: AsJson = False) -> None:
    """List the requests and their states; with --json one JSON object a line.

    Accepted: carried out. Rejected: not carried out yet, since the last run did not pass. Running, stopped: a run has
    no result yet. Pending: no run yet. The entries are read as they are, which is fast: `verify` checks them.
    """
    from delfast.ledger import Ledger

    with Ledger.open(ledger) as opened, piped():
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
            sys.stdout.write(row(request, stopped=bool(stopped)) + "\n")
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
    with piped():
        if as_json:
            sys.stdout.write(json.dumps(plain(details), ensure_ascii=False, indent=2) + "\n")
            return
        for line in lines_of(details):
            print_line(line)
        print_line(f"the model in use: {model}")


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
    from delfast.ledger.evidence import counted_results, figure_results, table_lines
    from delfast.ledger.starting import LocalizeOn

    if pending and request:
        raise InputError("expected --request or --pending, got both; pass the numbers, or take up all open requests")
    with Ledger.open(ledger, job=job, hash_ids=hash_ids) as opened:
        if abandon:
            print_line(f"run {opened.abandon()} is ended, as rejected; its requests are open")
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
        has_mask = kept_to_a_mask(opened.store.entries(run=result.number))
        for line in [*table_lines(result.checks, has_mask=has_mask), *(f"- {each}" for each in result.advice)]:
            print_line(line)
        counts = "; ".join(counted_results(figure_results(result.checks, has_mask=has_mask)))
        print_line(
            f"run {result.number}: {'accepted' if result.accepted else 'REJECTED, the model stays as it was'}: {counts}"
        )
        print_line(f"the model in use: {ledger / result.model}")
        print_line(f"head: {opened.head}")
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
        print_line(
            f"trained {numbered('reference model', made)}" if made else "trained no reference model; there are enough"
        )
        print_line(f"head: {opened.head}")


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
            numbers = f"request{'' if len(each.requests) == 1 else 's'} {', '.join(map(str, each.requests))}"
            print_line(f"{'deleted ' if yes else ''}{each.file} ({each.bytes:,} bytes): {each.why}; {numbers}")
        files = counted(len(plan), "file")
        if yes:
            print_line(f"deleted {files}; copies elsewhere are yours to delete")
            print_line(f"head: {opened.head}")
        else:
            print_line(f"{files}; --yes deletes them" if plan else "no file of an accepted request is left")


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
        print_line(problem)
    print_line(f"entries that hold: {result.count}")
    # the hash before a damaged entry is no head to keep
    print_line(f"{'head' if result.holds else 'hash of the last one that holds'}: {result.head}")
    if not result.holds:
        print_line("the ledger does NOT hold")
        raise typer.Exit(1)
    if head is None:
        print_line("the ledger holds; only --head finds one that was rewritten as a whole or cut at its end")
    else:
        print_line("the ledger holds, and continues the one of that head")


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
        print_line(f"see {output_dir / HTML}")
        print_line(f"head: {opened.head}")
