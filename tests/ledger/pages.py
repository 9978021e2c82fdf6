"""Pages of a ledger's report as text, and ledgers with changed entries, for tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

from delfast.ledger import Entry
from tests.ledger.histories import Writer


class Page(HTMLParser):
    """The text, links, scripts and ids of a page, whose tags must be closed in order."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown, self.links, self.scripts, self.ids, self.tables = "", [], [], [], 0
        self.open_tags: list[str] = []
        self.feed(text)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        assert tag not in ("iframe", "object", "embed", "form")
        for name, value in attributes:
            assert not name.startswith("on")  # scripts in attributes
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
        self.tables += tag == "table"
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag
        self.shown += " " if tag in ("dt", "dd", "th", "td", "li", "p", "code") else ""

    def handle_data(self, data: str) -> None:
        if self.open_tags[-1:] == ["script"]:
            self.scripts.append(data.strip())
        elif self.open_tags[-1:] != ["style"]:
            self.shown += data


def words(text: str) -> str:
    """Return text with single spaces."""
    return re.sub(r"\s+", " ", text)


def changed(entries: Sequence[Entry], change: Any) -> list[Entry]:
    """Return entries with changed payloads; the chain of hashes does not hold then, and is not read."""
    writer = Writer()
    for entry in entries:
        payload = entry.payload
        change(entry.event, payload)
        writer(entry.event, payload, entry.run)
    return writer.entries
