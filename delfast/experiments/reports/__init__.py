"""Tables of an unlearning run; plots are in ``reports.plots``, which needs matplotlib."""

from delfast.extras import extra

with extra("delfast.experiments.reports"):
    from delfast.experiments.reports.tables import (
        FIELDS,
        METHOD_COLUMNS,
        markdown_table,
        markdown_text,
        method_rows,
        selection_words,
        terminal_table,
        terminal_text,
    )

__all__ = [
    "FIELDS",
    "METHOD_COLUMNS",
    "markdown_table",
    "markdown_text",
    "method_rows",
    "selection_words",
    "terminal_table",
    "terminal_text",
]
