"""The report of a ledger: one self-contained HTML page, and Markdown with the same content in short."""

from delfast.ledger.report.page import HTML, MARKDOWN, make_report, write_report

__all__ = ["HTML", "MARKDOWN", "make_report", "write_report"]
