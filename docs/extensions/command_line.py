"""The directive ``command-line``: every command of ``delfast`` with its options, read from the typer application."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.rst import escape
from typer.main import get_command

from delfast.cli.commands import app as delfast_app

Command = Any  # click's class, or the copy of it in newer versions of typer: no common import


def commands(command: Command, name: str) -> Iterator[tuple[str, Command]]:
    """Yield every command below a group that is not hidden, with its full name, in the order of ``--help``."""
    for part, each in getattr(command, "commands", {}).items():
        if getattr(each, "commands", None):
            yield from commands(each, f"{name} {part}")
        elif not each.hidden:
            yield f"{name} {part}", each


def marked_up(text: str) -> str:
    """Return help text as reStructuredText: `code` in single backticks, everything else literally."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(f"``{part}``" if number % 2 else escape(part) for number, part in enumerate(parts))


def sentences(text: str) -> str:
    """Return the help of a parameter as sentences: "number  [default: 1; required]" becomes "number. Default: 1. …"."""
    found = re.fullmatch(r"(?P<text>.*?)(?:\s*\[(?P<notes>(?:default|required|env var|x|[\d.]+<)[^\[]*)\])?", text)
    assert found is not None  # matches any line
    notes = filter(None, map(str.strip, (found["notes"] or "").split(";")))
    marked = (re.sub(r"^default: (.*)$", r"default: `\1`", note) for note in notes)
    parts = [found["text"], *(note[:1].upper() + note[1:] for note in marked)]
    return " ".join(marked_up(part) + "." * (not part.endswith(".")) for part in parts if part)


def page(name: str, command: Command) -> Iterator[str]:
    """Yield the reStructuredText of one command."""
    context = command.context_class(command, info_name=name)
    yield from (name, "-" * len(name), "", f".. program:: {name}", "")
    for paragraph in re.split(r"\n\s*\n", (command.help or "").strip()):
        yield from (marked_up(" ".join(paragraph.split())), "")
    yield from (".. code-block:: text", "", f"   {' '.join([name, *command.collect_usage_pieces(context)])}", "")
    for names, text in filter(None, (each.get_help_record(context) for each in command.params)):
        yield from (f".. option:: {names}", "", f"   {sentences(text)}", "")


class CommandLine(SphinxDirective):
    """Print every command of ``delfast``."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each command."""
        lines = [line for name, each in commands(get_command(delfast_app), "delfast") for line in page(name, each)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
