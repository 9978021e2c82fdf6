"""Pages from Jinja2 templates: HTML in one self-contained file, and Markdown.

Every value that a template prints is escaped and put on one line, so that names, reasons and titles are shown as text,
whatever they hold. Only ``Markup`` is printed without change: SVG and the results of macros.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from delfast.errors import printable
from delfast.experiments.reports.tables import markdown_table, markdown_text
from delfast.extras import extra

with extra("a report"):
    import matplotlib
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from matplotlib.figure import Figure

SHARED = "delfast.experiments.reports"  # the package with the base template, its style and its macros


def render(package: str, template: str, **values: Any) -> str:
    """Render ``package``/templates/``template``, in HTML or Markdown by the suffix, to text that ends with a newline.

    Templates of ``package`` may extend and import those of ``SHARED``.
    """
    environment = _environment(package, template.endswith(".html"))
    return environment.get_template(template).render(script=Markup(own_script()), **values).strip() + "\n"


@lru_cache
def _environment(package: str, is_html: bool) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, SHARED))]),
        autoescape=is_html,
        finalize=_literally(printable if is_html else markdown_text),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["table"] = _table_in_markdown
    environment.filters["anchor"] = anchor
    environment.filters["code"] = _code_in_markdown
    return environment


def _literally(escape: Callable[[str], str]) -> Callable[[Any], Any]:
    """Return the function through which every printed value passes."""

    def finalize(value: Any) -> Any:
        return value if isinstance(value, Markup) else escape(str(value))

    return finalize


def _table_in_markdown(rows: list[list[str]], columns: list[str], text_columns: int = 1) -> Markup:
    """Return rows of plain text as a Markdown table; its first ``text_columns`` are aligned to the left."""
    return Markup(markdown_table(columns, [[markdown_text(str(cell)) for cell in row] for row in rows], text_columns))


def _code_in_markdown(text: str) -> Markup:
    """Return text for a line of a fenced block, where Markdown has no escapes."""
    return Markup(printable(text))


def own_script() -> str:
    """Return the one script of a page, with its tags."""
    template = _environment(SHARED, True).get_template("sort.js")
    return f"<script>\n{template.render()}\n</script>"


def anchor(text: str) -> str:
    """Return text as an id of HTML: letters, digits and hyphens."""
    return "".join(character if character.isalnum() else "-" for character in text)


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """Draw a figure as SVG to stand inside a page, with a text for screen readers.

    ``name`` is unique in the page: it begins every id, since ids of two drawings may not be equal.
    """
    stream = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["Arial", "DejaVu Sans"]}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # no date: the same figures give the same file
    with matplotlib.rc_context(settings):
        figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]  # HTML has neither an XML declaration nor namespaces
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text, count=2)
    text = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    size, rest = re.match(r'<svg( width="[^"]*" height="[^"]*")', text), text[len("<svg") :]
    assert size is not None  # matplotlib's first attributes
    # without a size in points the drawing takes its container's width
    rest = re.sub(r' (width|height)="[\d.]+pt"', "", rest, count=2)
    return Markup('<svg role="img" aria-label="{}"').format(label) + Markup(rest)
