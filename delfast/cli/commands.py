"""The commands, in the order of ``delfast --help``, and the function that runs a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, cast

import typer

from delfast._version import __version__
from delfast.cli import ledger, steps, tools
from delfast.cli.console import start_log
from delfast.errors import InputError
from delfast.experiments.interrupts import Stopped

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
# click's UsageError, or the copy of it in newer versions of typer; BadParameter is a subclass
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def run(arguments: Sequence[str] | None) -> int:
    """Run one command line and return its exit code. Usage errors become InputError."""
    start_log()
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="delfast", standalone_mode=False)
    except typer.Abort:  # older versions of typer raise it for a KeyboardInterrupt outside the main thread
        raise KeyboardInterrupt from None
    except _UsageError as error:
        command = "delfast" if error.ctx is None else error.ctx.command_path
        message = error.format_message() or "Missing command."  # "" where a group printed its help instead
        raise InputError(f"{message} (see `{command} --help`)") from None
    if code == Stopped.INTERRUPTED:  # newer versions return it
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"delfast {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Find the channels of a network that hold what it memorised of a forget set, and make the network unlearn it."""


for command in (
    *(steps.train, steps.oracle, steps.localize, steps.unlearn, steps.evaluate),
    *(tools.init_job, tools.compare, tools.sequence, tools.verify, tools.bench, tools.doctor, tools.demo),
):
    app.command()(command)
app.add_typer(ledger.app, name="ledger")
