"""Figures with their 95 % intervals: proportions, means, differences, areas under a ROC curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)  # 1.96
STEPS = 200  # of a bisection: more than float64 has bits


@dataclass(frozen=True)
class Figure:
    """A measured value with the limits of its 95 % interval.

    Parameters
    ----------
    value : float
        The estimate.
    low : float, optional
        Lower limit; None where one example, or none, gives no interval.
    high : float, optional
        Upper limit; None with ``low``.

    Examples
    --------
    >>> from delfast.evaluation import Figure
    >>> Figure(50.0, 23.7, 76.3).as_dict()
    {'value': 50.0, 'low': 23.7, 'high': 76.3}
    >>> print(Figure(50.0, 23.7, 76.3))
    50.00 (23.70 to 76.30)
    """

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return self.text(2)

    def text(self, digits: int) -> str:
        """Return the value and its interval as text.

        Parameters
        ----------
        digits : int
            Number of digits after the point.

        Returns
        -------
        str
            Such as "50.0 (23.7 to 76.3)"; the value alone if there is no interval.

        Examples
        --------
        >>> from delfast.evaluation import Figure
        >>> Figure(50.0, 23.7, 76.3).text(0)
        '50 (24 to 76)'
        """
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"

    def as_dict(self) -> dict[str, Any]:
        """Return the three values by name.

        Returns
        -------
        dict of str to float or None
            Plain values, ready for JSON.
        """
        return asdict(self)

    def scaled(self, factor: float) -> Figure:
        """Return the figure in another unit; ``factor`` > 0.

        Parameters
        ----------
        factor : float
            Size of the old unit in the new one, above 0.

        Returns
        -------
        Figure
            Value and limits times ``factor``.
        """
        return self.mapped(lambda x: factor * x)

    def mapped(self, function: Callable[[float], float]) -> Figure:
        """Return the figure of an increasing function of the value.

        Parameters
        ----------
        function : callable
            Increasing function of one float.

        Returns
        -------
        Figure
            The function of the value and of both limits.
        """
        limits = [None if limit is None else function(limit) for limit in (self.low, self.high)]
        return Figure(function(self.value), *limits)


def proportion(successes: float, count: float) -> Figure:
    """Return successes / count, count > 0, with Wilson's score interval.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", Journal of the American Statistical
    Association, 1927. Neither number needs to be whole: a weighted sample has an effective count.
    """
    p, spread = successes / count, Z * Z / count
    middle = (p + spread / 2) / (1 + spread)
    half = math.sqrt(spread * p * (1 - p) + spread * spread / 4) / (1 + spread)
    # exact at the ends, where rounding would leave 1e-17
    return Figure(p, middle - half if p > 0 else 0.0, middle + half if p < 1 else 1.0)


def difference(first: Figure, second: Figure) -> Figure:
    """Return first - second of two independent proportions, with Newcombe's hybrid score interval.

    Newcombe, "Interval Estimation for the Difference Between Independent Proportions: Comparison of Eleven Methods",
    Statistics in Medicine, 1998, method 10.
    """
    value = first.value - second.value
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Figure(value, None, None)
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Figure(value, value - below, value + above)


def mean(sums: Tensor, counts: Tensor | None = None) -> Figure:
    """Return the mean over a sample of N > 0 with Student's interval: of values, or of sums over counts.

    sums: (N,). counts: (N,), the number of units that each sum is over, such as an example's tokens; the mean is then
    over all units, and its variance that of a ratio estimator (Cochran, "Sampling Techniques", 1977, section 6.3), so
    that the units of one example need not be independent. "Student", "The Probable Error of a Mean", Biometrika, 1908.
    """
    total, n = sums.double(), len(sums)
    units = total.new_ones(n) if counts is None else counts.double()
    value = (total.sum() / units.sum()).item()
    if n < 2:
        return Figure(value, None, None)
    residuals = (total - value * units) / units.mean()
    half = student(n - 1) * math.sqrt(residuals.square().sum().item() / (n - 1) / n)
    return Figure(value, value - half, value + half)


def auc(positives: Tensor, negatives: Tensor) -> Figure:
    """Return the area under the ROC curve of two samples of scores, each with at least one, with Newcombe's interval.

    The area is the probability that a positive scores higher, ties counted as half (Mann & Whitney, 1947). The limits
    are the areas A at which the estimate is Z standard deviations off, by Hanley and McNeil's variance for equal
    numbers: Newcombe, "Confidence Intervals for an Effect Size Measure Based on the Mann-Whitney Statistic. Part 2",
    Statistics in Medicine, 2006, method 5. Unlike Hanley and McNeil's own, the interval has a width at 0 and 1.
    """
    ordered = negatives.double().sort().values
    below = _ranks(ordered, positives.double(), right=False)
    upto = _ranks(ordered, positives.double(), right=True)
    m, n = len(positives), len(negatives)
    value = ((below + upto) / 2).mean().item() / n
    shared = (m + n) / 2 - 1

    def off(area: float) -> float:
        spread = 1 + shared * (1 - area) / (2 - area) + shared * area / (1 + area)
        return (value - area) ** 2 - Z * Z * area * (1 - area) * spread / (m * n)

    low = _bisected(off, 0.0, value) if value > 0 else 0.0
    high = _bisected(off, 1.0, value) if value < 1 else 1.0
    return Figure(value, low, high)


@cache
def student(degrees: int, level: float = LEVEL) -> float:
    """Return the t with P(-t < T < t) = level, of Student's distribution with a whole number of degrees of freedom.

    The probability is a finite sum: Abramowitz & Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        return math.inf
    if degrees > 1000:  # off by less than 0.002 there
        return NormalDist().inv_cdf((1 + level) / 2)
    high = 1.0
    while _student_probability(high, degrees) < level:
        high *= 2
    return _bisected(lambda t: _student_probability(t, degrees) - level, 0.0, high)


def _student_probability(t: float, degrees: int) -> float:
    """Return P(-t < T < t)."""
    angle = math.atan2(t, math.sqrt(degrees))
    square, odd = math.cos(angle) ** 2, degrees % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 1.0)
    if odd and degrees > 1:
        total = term
    for k in range(2 + odd, degrees - 1, 2):
        term *= square * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _ranks(ordered: Tensor, values: Tensor, *, right: bool) -> Tensor:
    """Return for each value how many of the ordered ones are below it, with ``right`` also those equal to it."""
    return torch.searchsorted(ordered, values, right=right).double()


def _bisected(function: Callable[[float], float], outside: float, inside: float) -> float:
    """Return the point between two at which the function changes its sign."""
    sign = function(outside) > 0
    for _ in range(STEPS):
        middle = (outside + inside) / 2
        if (function(middle) > 0) == sign:
            outside = middle
        else:
            inside = middle
    return (outside + inside) / 2
