"""The versions that a ledger's entries record."""

from __future__ import annotations

from typing import Any

VERSIONS = ("delfast", "torch", "numpy", "python", "platform")


def versions(**facts: str) -> dict[str, Any]:
    """Return the versions of this process, and the given facts beside them."""
    from delfast.provenance import provenance  # imports torch, which most commands of a ledger do without

    found = provenance()
    return {**{name: found[name] for name in VERSIONS}, **facts}
