"""Results of the work of a ledger. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One threshold and the measured value.

    Parameters
    ----------
    name : str
        "outside_mask" (elements changed outside the mask and the last layer), "test_drop" (percentage points),
        "attack_advantage" (0 to 1), "earlier_attack_advantage" (the worst of the forget sets of earlier runs),
        "relearn_ratio", or "method" if the method itself failed.
    value : float or None
        The measured value; None if it could not be measured.
    limit : float or None
        The largest value that holds.
    held : bool
        Whether the value is at most the limit; for "earlier_attack_advantage" whether ``low`` is. A value that was not
        measured holds with ``accept_unmeasured`` alone, except that of earlier sets, which always holds.
    set : str
        The set that was measured: "test", "forget", "model", or "run 3" for the forget set of an earlier run. For
        "method" it is the error.
    low : float, optional
        Lower end of the value's 95 % interval; None where there is none.
    high : float, optional
        Upper end.
    before : float, optional
        The same figure of the model before the run; None if it has none.
    reason : str, optional
        Why there is no value; for "earlier_attack_advantage" also how many sets have none.

    Examples
    --------
    >>> from delfast.ledger import Check
    >>> Check("test_drop", 0.4, 2.0, True, "test").held
    True
    """

    name: str
    value: float | None
    limit: float | None
    held: bool
    set: str
    low: float | None = None
    high: float | None = None
    before: float | None = None
    reason: str | None = None

    @property
    def held_before(self) -> bool:
        """Whether the model before the run held the threshold too, so that the figure shows no forgetting."""
        shows = self.name in ("attack_advantage", "relearn_ratio") and self.value is not None
        return shows and self.held and self.before is not None and self.limit is not None and self.before <= self.limit


@dataclass(frozen=True)
class RunResult:
    """Result of one run of a ledger.

    Parameters
    ----------
    number : int
        Number of the run.
    accepted : bool
        Whether the thresholds held, so that the ledger's newest model is the run's.
    requests : tuple of int
        Numbers of the requests that the run took up.
    settings : mapping
        The method and settings of the accepted attempt, or of the last one.
    checks : tuple of Check
        Each threshold of that attempt, with the measured value.
    advice : tuple of str
        For a rejected run: what failed, and what would help.
    model : str
        File of the newest accepted model, relative to the ledger's directory: the one to use.

    Examples
    --------
    >>> from delfast.ledger import RunResult
    >>> RunResult(1, True, (1,), {"method": "del"}, (), (), "runs/0001/1/model.safetensors").accepted
    True
    """

    number: int
    accepted: bool
    requests: tuple[int, ...]
    settings: Mapping[str, Any]
    checks: tuple[Check, ...]
    advice: tuple[str, ...]
    model: str


@dataclass(frozen=True)
class HeldFile:
    """A file of a ledger that holds requested examples.

    Parameters
    ----------
    file : str
        Path relative to the ledger.
    digest : str
        SHA-256 (hex) of its content, as recorded.
    bytes : int
        Its size; 0 if it is gone already.
    requests : tuple of int
        Numbers of the requests whose examples it holds.
    why : str
        The kind of file, and how it holds them.

    Examples
    --------
    >>> from delfast.ledger import HeldFile
    >>> HeldFile("models/0000.safetensors", "0" * 64, 4096, (1,), "the model before run 1").requests
    (1,)
    """

    file: str
    digest: str
    bytes: int
    requests: tuple[int, ...]
    why: str
