"""docs/troubleshooting.md: each message is one that the code prints."""

from __future__ import annotations

import re

import pytest

from tests import ROOT

TEXT = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^```text\n(.*?)\n```", TEXT, flags=re.MULTILINE | re.DOTALL)
OF_OTHERS = {  # printed by C++, or put together there: the page that explains them
    "terminate called without an active exception": "jobs.md",
    "torch could not allocate a tensor: …": "install.md",
}


def source() -> str:
    """Return the code of the package with adjacent literals joined, and every placeholder as "…"."""
    files = [*sorted((ROOT / "delfast").rglob("*.py")), *sorted((ROOT / "csrc/bindings").rglob("*.[hc]*"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    text = re.sub(r"\"\s*\n\s*f?\"", "", text)
    return re.sub(r"{[^{}]*(?:{[^{}]*}[^{}]*)*}|%s", "…", text)


SOURCE = source()


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_in_the_code(message: str) -> None:
    if message in OF_OTHERS:
        assert message in (ROOT / "docs" / OF_OTHERS[message]).read_text(encoding="utf-8")
        return
    parts = [part.strip(" '") for part in re.split("…", message)]
    longest = max(parts, key=len)
    assert len(longest) > 12 and "\n" not in message
    assert all(part in SOURCE for part in parts), [part for part in parts if part not in SOURCE]


def test_every_symptom_has_a_cause_and_a_fix() -> None:
    symptoms = re.split(r"^### ", TEXT.partition("## The result is not good")[0], flags=re.MULTILINE)[1:]
    assert len(symptoms) > 25 and len(MESSAGES) > 25
    assert [each.splitlines()[0] for each in symptoms if "**Cause.**" not in each or "**Fix.**" not in each] == []
