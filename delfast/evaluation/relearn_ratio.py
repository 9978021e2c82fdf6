"""The ratio of relearning: how much more of a set a network regains than networks that never saw it.

Every network has measurements of N examples at several times: at time 0, before the finetuning, and after it began.
They are parts that are right, in [0, 1], or losses. Each measurement has a log score: the log odds of the mean part
that is right, or minus the log of the mean loss. The log ratio to one never-seen network is the difference of their
scores, of the means over the times after 0.

The ratio estimates the memory m(t) of the examples in the network's score. r(t) is the score of networks that never saw
the examples. A network that was trained on more also has a general advantage A, on examples that no network has seen.
Its score is r(t) + A + m(t): the difference of the scores is d = A + m(t) after the beginning and d0 = A + m(0) at time
0. The smaller one of d0 and A is taken off, as far as the ratio stays at 1 or more:

- d0 < A: the network hid at time 0 what comes back later, m(0) < 0. The log ratio is d - d0 = m(t) - m(0). A has
  cancelled.
- d0 >= A > 0: the network has a general advantage. The log ratio is d - A = m(t).
- d0 >= 0 >= A: the network has no general advantage. The log ratio is d. A negative A counts as 0, since a network that
  is worse in general is not expected to be worse at wrong labels.

At each boundary both formulas are equal. A is estimated on control examples at time 0, since the finetuning can harm a
network. The smaller of two estimates is biased downwards, so the ratio of a network without memory is above a limit by
chance more often than one estimate alone would be, and more often with fewer examples. The interval shows it.

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


def compare(
    own: Tensor, others: Sequence[Tensor], unknown: Sequence[Tensor], is_loss: bool, general: Comparison | None = None
) -> Comparison | None:
    """Compare a network's measurements (times, N) with those of others, each on examples that it was not trained on.

    unknown: bool (N,) for each of ``others``. Others with fewer than ``MIN_EXAMPLES`` are left out. general: what
    ``general_advantage`` returns, which is taken off. None if no other network is left, and for losses
    whose mean is not above 0, which have no ratio.
    """
    level = _compared(own[1:].mean(0), [other[1:].mean(0) for other in others], unknown, is_loss)
    start = _compared(own[0], [other[0] for other in others], unknown, is_loss)
    if level is None or start is None:
        return None
    from_start = level.less(start)
    after, before = (each.logs.mean().item() for each in (level, start))
    advantage = 0.0 if general is None else max(general.log, 0.0)
    taken = min(before, advantage)
    return Comparison(
        after - min(taken, max(after, 0.0)),
        # the larger of both, and that of the advantage, since the examples also decide which one it is; where the
        # advantage does not count, the interval is too wide
        max(level.sampling(), from_start.sampling()) + (0.0 if general is None else general.sampling),
        (from_start if before < advantage else level).networks(),
        level.degrees(),
    )


def general_advantage(own: Tensor, others: Sequence[Tensor], is_loss: bool) -> Comparison | None:
    """Compare a network's measurements (N,) with those of others, on examples that no network was trained on.

    The log ratio is negative for a network that is worse in general. None as in ``compare``.
    """
    level = _compared(own, others, [torch.ones(len(own), dtype=torch.bool)] * len(others), is_loss)
    if level is None:
        return None
    return Comparison(level.logs.mean().item(), level.sampling(), level.networks(), level.degrees())


def worst(ratios: Sequence[Figure]) -> Figure | None:
    """Return the highest ratio of those whose lower limit is above 1, or else the one with the highest lower limit.

    The highest value of several is above 1 by chance, most of all where few examples are right; of those with evidence
    for memory none may be left out. None without a ratio.
    """
    evident = [ratio for ratio in ratios if ratio.low is not None and ratio.low > 1]
    if evident:
        return max(evident, key=lambda ratio: ratio.value)
    return max(ratios, key=lambda ratio: ratio.low or 0.0, default=None)


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

    def networks(self) -> float:
        """Return the variance of the mean difference between never-seen networks, 0 for one."""
        count = len(self.logs)
        return (self.logs.var() * (1 + 1 / count)).item() if count > 1 else 0.0

    def degrees(self) -> tuple[int, int]:
        """Return the degrees of freedom of both variances."""
        return self.influence.shape[1] - 1, len(self.logs) - 1


def _compared(own: Tensor, others: Sequence[Tensor], unknown: Sequence[Tensor], is_loss: bool) -> _Differences | None:
    """Return the differences of the scores of measurements (N,); None as in ``compare``."""
    pairs = []
    for other, where in zip(others, unknown, strict=True):
        if int(where.sum()) < MIN_EXAMPLES:
            continue
        if is_loss and any(bool(values[where].mean() <= 0) for values in (own, other)):
            return None
        pairs.append(_difference(own[where], other[where], where, is_loss))
    return _Differences.of(pairs) if pairs else None


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
