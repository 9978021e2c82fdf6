"""What the commands' options are, and how their text becomes values."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from delfast.errors import InputError
from delfast.unlearning import make_method

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, as `delfast train` writes it")]
OutputDir = Annotated[Path, typer.Option(help="where the results are written")]
OptionalOutputDir = Annotated[Path | None, typer.Option(help="where to write summary.json; printed only, if not given")]
DataDir = Annotated[
    Path | None, typer.Option(help="where downloaded data and decoded images lie (default: ~/.cache/delfast)")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="seed of everything random")]
StepSeed = Annotated[
    int | None, typer.Option(min=0, max=2**31 - 1, help="seed of this step (default: derived from the run's)")
]


def resolved(source: str) -> str:
    """The data or the forget set, with an absolute path: later commands may be run from elsewhere."""
    kind, colon, path = source.partition(":")
    return f"{kind}:{os.path.realpath(os.path.expanduser(path))}" if colon and kind in ("folder", "file") else source


def channels_last_for(choice: str, model: str) -> bool:
    """ "auto": for the networks that are mostly convolutions."""
    if choice not in ("auto", "on", "off"):
        raise InputError(f"expected --channels-last to be auto, on or off, got '{choice}'")
    return choice == "on" or (choice == "auto" and model.startswith("resnet"))


def hyperparameters(method: str, settings: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as the type that the method's field has."""
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


def parse_top_h(text: str | None) -> int | float | None:
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise InputError(f"expected --top-h as a count (16) or a fraction (0.1), got '{text}'") from None
