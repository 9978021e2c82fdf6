"""Tables of an unlearning run; plots are in ``reports.plots``, which needs matplotlib."""

from delfast.extras import extra

with extra("delfast.experiments.reports"):
    from delfast.experiments.reports.tables import (
        FIELDS,
        markdown_table,
        markdown_text,
        method_table,
        selection_words,
        terminal_table,
        terminal_text,
    )

__all__ = [
    "FIELDS",
    "markdown_table",
    "markdown_text",
    "method_table",
    "selection_words",
    "terminal_table",
    "terminal_text",
]
