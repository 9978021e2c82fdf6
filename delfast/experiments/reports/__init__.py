"""Tables and plots of an unlearning run."""

from delfast.extras import extra

with extra("delfast.experiments.reports"):
    from delfast.experiments.reports.plots import plot_accuracies, plot_selection
    from delfast.experiments.reports.tables import (
        METHOD_COLUMNS,
        markdown_table,
        markdown_text,
        method_rows,
        terminal_table,
        terminal_text,
    )

__all__ = [
    "METHOD_COLUMNS",
    "markdown_table",
    "markdown_text",
    "method_rows",
    "plot_accuracies",
    "plot_selection",
    "terminal_table",
    "terminal_text",
]
