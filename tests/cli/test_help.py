"""``--help`` of every command: it imports no large package, and lists the names that the registries hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from typer.main import get_command
from typer.models import CommandInfo

from delfast._version import __version__
from delfast.cli import main, names
from delfast.cli.commands import app
from delfast.experiments.networks import NAMES
from delfast.localization import BUDGET, STRATEGIES, Criterion
from delfast.unlearning import METHODS


def names_of(commands: list[CommandInfo]) -> list[str]:
    """Return the names as they are typed."""
    found = [(command.name, command.callback) for command in commands if command.callback is not None]
    return [name or callback.__name__.replace("_", "-") for name, callback in found]


COMMANDS = names_of(app.registered_commands)
for group in app.registered_groups:
    assert group.typer_instance is not None
    COMMANDS += [
        str(group.name),
        *(f"{group.name} {name}" for name in names_of(group.typer_instance.registered_commands)),
    ]
LARGE = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "torchvision", "safetensors", "PIL"}
ALL_HELP = f"""
import json, sys
from delfast.cli import main
for command in ([], *(name.split() for name in {COMMANDS})):
    assert main([*command, "--help"]) == 0
print(json.dumps(sorted(sys.modules)))
"""


def test_help_imports_no_large_package() -> None:
    done = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert "delfast.cli.tools" in modules and not modules & LARGE
    own = {name for name in modules if name.startswith("delfast.") and not name.startswith("delfast.cli")}
    assert own == {"delfast._version", "delfast.errors", "delfast.experiments", "delfast.experiments.interrupts"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ("nothing", "delfast"),
        ("train --nothing", "delfast train"),
        ("ledger run", "delfast ledger run"),
        ("ledger", "delfast ledger"),
    ],
)
def test_a_usage_error_names_the_help_of_its_command(
    arguments: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"delfast: error: \S.* \(see `{command} --help`\)\n", error)


def test_the_listed_names_are_those_of_the_registries() -> None:
    assert names.NETWORKS == NAMES
    assert tuple(METHODS) == names.METHODS
    assert tuple(STRATEGIES) == names.STRATEGIES
    assert get_args(Criterion) == names.CRITERIA
    assert names.BUDGET == BUDGET


def arguments_of(command: Any, name: str) -> Iterator[tuple[str, str | None]]:
    """Yield the full name of every argument below a command, and its metavar."""
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            yield f"{name} {parameter.name}", parameter.metavar
    for part, each in getattr(command, "commands", {}).items():
        yield from arguments_of(each, f"{name} {part}")


def test_arguments_are_shown_in_one_form() -> None:
    """Without a metavar, an argument is shown in capitals or not: that depends on the version of typer."""
    shown = dict(arguments_of(get_command(app), "delfast"))
    assert len(shown) > 10
    assert [name for name, metavar in shown.items() if metavar is None or not metavar.isupper()] == []


def test_version_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"delfast {__version__}\n"
