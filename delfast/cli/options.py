"""Options that several commands have, and the conversion of their text to values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from delfast.cli.console import log
from delfast.cli.names import STRATEGIES
from delfast.errors import InputError

if TYPE_CHECKING:  # imports torch
    from delfast.execution import CudaGraphs
    from delfast.jobs import Job

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, as `delfast train` writes it")]
OutputDir = Annotated[Path, typer.Option(help="directory that the results are written to")]
OptionalOutputDir = Annotated[
    Path | None, typer.Option(help="directory to write summary.json to (default: results are only printed)")
]
DataDir = Annotated[
    Path | None, typer.Option(help="directory of downloaded data and decoded images (default: ~/.cache/delfast)")
]
JobFile = Annotated[
    Path | None,
    typer.Option("--job", metavar="JOB.py", help="your job file; it is executed (`delfast init-job` writes one)"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Graphs = Annotated[
    str, typer.Option(help="on, off, or auto: capture passes in CUDA graphs where a device has them and that pays")
]
PassPrecision = Annotated[str, typer.Option(help="fp32, or bf16: the forward pass under autocast")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="seed of everything random")]
StepSeed = Annotated[
    int | None, typer.Option(min=0, max=2**31 - 1, help="seed of this step (default: derived from the run's)")
]


@contextmanager
def executing(path: Path | None) -> Iterator[Job | None]:
    """Execute a job file, log that, and name its file and line in errors inside the context; None without a path."""
    if path is None:
        yield None
        return
    from delfast.jobs import read_job

    log.info(f"executing the job file '{path}'")
    job = read_job(path)
    with job.naming_errors():
        yield job


def refuse_beside_job(options: Mapping[str, object]) -> None:
    """Raise InputError for an option about pictures that is given beside --job."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InputError(f"expected --job without --{given[0]}, got both: the job file has the data and the network")


def resolved(source: str) -> str:
    """Return the data or the forget set with an absolute path: later commands may run in another working directory."""
    kind, colon, path = source.partition(":")
    return f"{kind}:{os.path.realpath(os.path.expanduser(path))}" if colon and kind in ("folder", "file") else source


def channels_last_for(choice: str, model: str) -> bool:
    """Return whether to use the channels-last memory format; "auto" is on for networks of convolutions."""
    if choice not in ("auto", "on", "off"):
        raise InputError(f"expected --channels-last to be auto, on or off, got '{choice}'")
    return choice == "on" or (choice == "auto" and model.startswith("resnet"))


def cuda_graphs_for(choice: str) -> CudaGraphs:
    """Return the library's value of --cuda-graphs."""
    values: dict[str, CudaGraphs] = {"auto": "auto", "on": True, "off": False}
    if choice not in values:
        raise InputError(f"expected --cuda-graphs to be auto, on or off, got '{choice}'")
    return values[choice]


def hyperparameters(method: str, settings: list[str]) -> dict[str, Any]:
    """Parse each ``NAME=VALUE`` to the type of the method's field of that name."""
    from delfast.unlearning import make_method

    types: dict[str, Any] = {name: type(value) for name, value in asdict(make_method(method, {})).items()}
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        try:
            found[name] = types.get(name, str)(text)
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(f"expected --set NAME=VALUE, as alpha=0.9, got '{setting}'")
    return found


def localization(strategy: str | None, top_h: str | None, **chosen: str | None) -> dict[str, Any]:
    """Return the given options of ``localize``.

    InputError for an unknown strategy, and for a strategy together with a criterion or granularity of its own.
    """
    options: dict[str, Any] = {**chosen, "top_h": _parse_top_h(top_h)}
    options = {name: value for name, value in options.items() if value is not None}
    if strategy is not None and (strategy not in STRATEGIES or options.keys() & {"criterion", "granularity"}):
        raise InputError(
            f"expected --strategy to be one of {', '.join(STRATEGIES)}, without --criterion and --granularity, "
            f"got '{strategy}'"
        )
    return options


def _parse_top_h(text: str | None) -> int | float | None:
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise InputError(f"expected --top-h as a count (16) or a fraction (0.1), got '{text}'") from None
