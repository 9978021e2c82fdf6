"""The command line: every command is registered in ``delfast.cli.commands``.

torch and every other large package are imported by the command that needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from delfast.errors import InputError, one_line, printable
from delfast.experiments.interrupts import Stopped, stopping

BAD_INPUT, FAILURE = 2, 1
INVALID_PATH = (errno.ENAMETOOLONG, errno.ELOOP)  # the path itself is at fault, not the disk
EXTRA = (
    "typer",
    "rich",
    "tomli",
    "torchvision",
    "sklearn",
    "matplotlib",
    "vit_pytorch",
    "PIL",
    "scipy",
    "einops",
    "jinja2",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. ``arguments`` default to those of the process.

    0: success. 1: a failure, or ``verify`` found a change outside the mask. 2: bad input. 130: interrupted (Ctrl-C).
    143: terminated (SIGTERM). An error is one line on standard error; with DELFAST_DEBUG=1 it is raised instead.
    """
    try:
        with stopping():
            from delfast.cli.commands import run

            return run(arguments)
    except InputError as error:
        return _fail(error, str(error), BAD_INPUT)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            return _fail(error, one_line(error), FAILURE)
        hint = f"'{error.name}' is not installed; the command line needs: pip install 'delfast[experiments]'"
        return _fail(error, hint, FAILURE)
    except KeyboardInterrupt as error:  # outside the main thread, whose signals alone ``stopping`` handles
        return _fail(error, "interrupted", Stopped.INTERRUPTED)
    except Stopped as error:
        return _fail(error, str(error), error.exit_code)
    except OSError as error:
        where = f" ('{error.filename}')" if error.filename else ""
        code = BAD_INPUT if error.errno in INVALID_PATH else FAILURE
        return _fail(error, f"{error.strerror or one_line(error)}{where}", code)
    except Exception as error:
        return _fail(error, f"{type(error).__name__}: {one_line(error)}", FAILURE)


def _fail(error: BaseException, message: str, code: int) -> int:
    if os.environ.get("DELFAST_DEBUG") == "1":
        raise error
    print(f"delfast: error: {printable(message)}", file=sys.stderr)
    return code
