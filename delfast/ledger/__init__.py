"""A ledger of forget requests: the requests, what was done, and the evidence, in a directory of one model.

    ledger = Ledger.create("ledger", job="job.py", model="model.safetensors")
    ledger.add(["user-17"], reason="case 7", due="2026-12-31")
    ledger.run().accepted
    ledger.verify(head="...")   # the hash of the newest entry that a report printed

docs/ledger.md has the guide.
"""

from delfast.ledger.ledger import Ledger
from delfast.ledger.requests import Request, RequestDetails
from delfast.ledger.results import Check, HeldFile, RunResult
from delfast.ledger.store import Entry, Verification

__all__ = ["Check", "Entry", "HeldFile", "Ledger", "Request", "RequestDetails", "RunResult", "Verification"]
