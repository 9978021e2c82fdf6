"""The names of the events that a ledger's entries record. docs/ledger.md lists what each holds."""

from __future__ import annotations

CREATED = "created"
RECEIVED = "received"
REFERENCES = "references"  # a reference was trained
PURGED = "purged"

# of runs, in order
STARTED = "started"
BASELINE = "baseline"
RESUMED = "resumed"
LOCALIZED = "localized"
UNLEARNED = "unlearned"
VERIFIED = "verified"
AUDITED = "audited"
FAILED = "failed"
ACCEPTED = "accepted"
REJECTED = "rejected"
