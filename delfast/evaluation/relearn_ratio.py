"""The ratio of relearning: how much more of a set a network regains than networks that never saw it.

Every network has measurements of N examples at several times: at time 0, before the finetuning, and after it began.
They are parts that are right, in [0, 1], or losses. Each measurement has a log score: the log odds of the mean part
that is right, or minus the log of the mean loss. The log ratio to one never-seen network is the difference of their
scores, of the means over the times after 0. A network that begins below the never-seen ones is measured from where it
begins: the difference of the scores at time 0 is taken off then.

The variance from the sample of examples is that of the paired differences, plus that of an example more for each
network, half right and half wrong: Haldane's 1/2, which the log odds include. Without pairing the sum of the two is at
least 1 / (a + 1/2) + 1 / (b + 1/2) for each network, a right and b wrong (Gart & Zweifel, "On the Bias of Various
Estimators of the Logit and Its Variance With Application to Quantal Bioassay", Biometrika, 1967), so that no interval
is without width where all examples are right or all are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from delfast.evaluation.intervals import Figure, student

MIN_EXAMPLES = 2  # that a never-seen network was not trained on, since a variance needs two
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
    """Compare a network's measurements (times, N) with those of others, each on examples that it was not trained on.

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
    level, start = _Differences.of(levels), _Differences.of(starts)
    from_start = level.less(start)
    chosen = from_start if start.logs.mean() < 0 else level
    count, examples = len(levels), chosen.influence.shape[1]
    return Comparison(
        chosen.logs.mean().item(),
        # the larger of both, since the examples also decide which of both it is
        max(level.sampling(), from_start.sampling()),
        (chosen.logs.var() * (1 + 1 / count)).item() if count > 1 else 0.0,
        (examples - 1, count - 1),
    )


def corrected(forgotten: Comparison, general: Comparison) -> Comparison:
    """Return the comparison without the advantage that the network also has on examples that no network has seen.

    An advantage is taken off as far as it goes towards a ratio of 1. A disadvantage is not added: a network that is
    worse in general is not expected to be worse at wrong labels. The variance of the advantage counts in every case,
    since the control examples decide how much is taken off: where that is nothing, the interval is too wide.
    """
    taken = min(max(general.log, 0.0), max(forgotten.log, 0.0))
    sampling = forgotten.sampling + general.sampling
    return Comparison(forgotten.log - taken, sampling, forgotten.networks, forgotten.degrees)


@dataclass(frozen=True, eq=False)
class _Score:
    """A log score, each value's influence on it (n,), and that of the two halves of the added example (2,)."""

    log: Tensor
    influence: Tensor
    added: Tensor


@dataclass(frozen=True, eq=False)
class _Differences:
    """The differences of a network's score and those of K others: logs (K,), influence of the examples (K, N).

    own, others: influence (K, 2) of the added example, of the network and of the others.
    """

    logs: Tensor
    influence: Tensor
    own: Tensor
    others: Tensor

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, ...]]) -> _Differences:
        return cls(*(torch.stack(column) for column in zip(*pairs, strict=True)))

    def less(self, start: _Differences) -> _Differences:
        """Return these differences from those at the beginning."""
        return _Differences(
            self.logs - start.logs,
            self.influence - start.influence,
            self.own - start.own,
            self.others - start.others,
        )

    def sampling(self) -> float:
        """Return the variance of the mean difference (delta method)."""
        networks, examples = self.influence.shape
        drawn = self.influence.mean(0).square().sum() / (examples * (examples - 1))
        # the network is the same in each pair; the others are independent of each other
        added = self.own.mean(0).square().sum() + self.others.square().sum() / networks**2
        return (drawn + added).item()


def _difference(own: Tensor, other: Tensor, where: Tensor, is_loss: bool) -> tuple[Tensor, ...]:
    """Return the difference of two scores, each example's influence on it (N,), and those of the added examples (2,).

    Examples outside ``where`` have an influence of 0.
    """
    first, second = _score(own, is_loss), _score(other, is_loss)
    influence = torch.zeros(len(where), dtype=torch.float64)
    influence[where] = (first.influence - second.influence) * (len(where) / len(own))
    return first.log - second.log, influence, first.added, second.added


def _score(values: Tensor, is_loss: bool) -> _Score:
    if is_loss:
        mean = values.mean()
        return _Score(-mean.log(), -(values - mean) / mean, values.new_zeros(2))
    # Haldane's half, so that odds of 0 and infinity do not occur
    count = len(values) + 1
    part = (values.sum() + 0.5) / count
    halves = torch.stack([1 / part, -1 / (1 - part)]) / (count * math.sqrt(2))
    return _Score(part.logit(), (values - part) / (part * (1 - part)), halves)
