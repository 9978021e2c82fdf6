"""The ratio of relearning: how much more of a set a network regains than networks that never saw it.

Every network has measurements of N examples at several times: at time 0, before the finetuning, and after it began.
They are parts that are right, in [0, 1], or losses. Each measurement has a log score: the log odds of the mean part
that is right, or minus the log of the mean loss. The log ratio to one never-seen network is the difference of their
scores, of the means over the times after 0. A network that begins below the never-seen ones is measured from where it
begins: the difference of the scores at time 0 is taken off then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from delfast.evaluation.intervals import Figure, student

MIN_EXAMPLES = 2  # that a never-seen network did not know, since a variance needs two
MAX_EXPONENT = 700.0  # exp is finite below 709


@dataclass(frozen=True)
class Comparison:
    """A log ratio, the variance from the sample of examples, and that between K never-seen networks, 0 for one.

    degrees: degrees of freedom of the two variances.
    """

    log: float
    sampling: float
    networks: float
    degrees: tuple[int, int]

    def figure(self) -> Figure:
        """Return the ratio with Student's interval, of Satterthwaite's (1946) degrees of freedom."""
        variance = self.sampling + self.networks
        parts = zip((self.sampling, self.networks), self.degrees, strict=True)
        weights = sum(part * part / degrees for part, degrees in parts if part > 0)
        degrees = max(1, math.floor(variance**2 / weights)) if weights > 0 else self.degrees[0]
        half = student(min(degrees, 10_000)) * math.sqrt(variance)
        return Figure(*(math.exp(min(max(x, -MAX_EXPONENT), MAX_EXPONENT)) for x in self._limits(half)))

    def _limits(self, half: float) -> tuple[float, float, float]:
        return self.log, self.log - half, self.log + half


def compare(own: Tensor, others: Sequence[Tensor], unknown: Sequence[Tensor], is_loss: bool) -> Comparison | None:
    """Compare a network's measurements (times, N) with those of others, each on the examples that it did not know.

    unknown: bool (N,) for each of ``others``. Others with fewer than ``MIN_EXAMPLES`` are left out. None if none is
    left, and for losses whose mean is not above 0, which have no ratio.
    """
    levels, starts = [], []
    for other, known_not in zip(others, unknown, strict=True):
        if int(known_not.sum()) < MIN_EXAMPLES:
            continue
        pair = [values[:, known_not] for values in (own, other)]
        if is_loss and any(bool((values[1:].mean() <= 0) | (values[0].mean() <= 0)) for values in pair):
            return None
        levels.append(_difference(pair[0][1:].mean(0), pair[1][1:].mean(0), known_not, is_loss))
        starts.append(_difference(pair[0][0], pair[1][0], known_not, is_loss))
    if not levels:
        return None
    (level, level_influence), (start, start_influence) = (
        tuple(torch.stack(column) for column in zip(*each, strict=True)) for each in (levels, starts)
    )
    logs, influence = level, level_influence
    if start.mean() < 0:
        logs, influence = level - start, level_influence - start_influence
    count = len(logs)
    return Comparison(
        logs.mean().item(),
        (influence.mean(0).var() / influence.shape[1]).item(),
        (logs.var() * (1 + 1 / count)).item() if count > 1 else 0.0,
        (influence.shape[1] - 1, count - 1),
    )


def corrected(forgotten: Comparison, general: Comparison) -> Comparison:
    """Return the comparison without the advantage that the network also has on examples that no network has seen.

    An advantage is taken off as far as it goes towards a ratio of 1. A disadvantage is not added: a network that is
    worse in general is not expected to be worse at wrong labels.
    """
    taken = min(max(general.log, 0.0), max(forgotten.log, 0.0))
    sampling = forgotten.sampling + (general.sampling if taken > 0 else 0.0)
    return Comparison(forgotten.log - taken, sampling, forgotten.networks, forgotten.degrees)


def _difference(own: Tensor, other: Tensor, where: Tensor, is_loss: bool) -> tuple[Tensor, Tensor]:
    """Return the difference of two scores, and each example's influence on it (N,), 0 outside ``where``.

    The variance of the influences over N, divided by N, is that of the difference (delta method).
    """
    (a, b), (c, d) = _score(own, is_loss), _score(other, is_loss)
    influence = torch.zeros(len(where), dtype=torch.float64)
    influence[where] = (b - d) * (len(where) / len(own))
    return a - c, influence


def _score(values: Tensor, is_loss: bool) -> tuple[Tensor, Tensor]:
    """Return the log score of values (n,), and each value's influence on it, with a mean of 0."""
    mean = values.mean()
    if is_loss:
        return -mean.log(), -(values - mean) / mean
    # Haldane's half, so that odds of 0 and infinity do not occur
    part = (values.sum() + 0.5) / (len(values) + 1)
    return part.logit(), (values - mean) / (part * (1 - part))
