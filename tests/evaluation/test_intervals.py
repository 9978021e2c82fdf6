"""Intervals: published values, and other packages' results."""

from __future__ import annotations

import math

import pytest
import torch

from delfast.evaluation.intervals import Figure, auc, difference, mean, proportion, student


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval(successes: int, count: int, low: float, high: float) -> None:
    """The last two are of table 1 in Newcombe, Statistics in Medicine 1998, "... for the Single Proportion"."""
    found = proportion(successes, count)
    assert found.value == successes / count
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_newcombes_interval(first: tuple[int, int], second: tuple[int, int], low: float, high: float) -> None:
    """Method 10 in table II of the paper that introduces it."""
    found = difference(proportion(*first), proportion(*second))
    assert found.value == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_students_t_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 5, 10, 29, 400):
        assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)
    assert student(5000) == pytest.approx(stats.t.ppf(0.975, 5000), rel=1e-3) and student(0) == math.inf


def test_the_interval_of_a_mean_is_students() -> None:
    # Student's own example: the first ten differences of table I, mean 0.75 and s.d. 1.70 (with n) in the paper
    sleep = torch.tensor([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    found = mean(sleep)
    half = 2.262157 * sleep.double().std().item() / math.sqrt(10)
    assert found.value == pytest.approx(0.75) and found.low == pytest.approx(0.75 - half, rel=1e-6)
    assert mean(sleep, torch.ones(10)) == found
    assert mean(torch.tensor([2.0])) == Figure(2.0, None, None)


def test_the_mean_over_units_weighs_by_units() -> None:
    """Two kinds of examples: 1 of 1, and 0 of 3. All units of an example agree, so n is the number of examples."""
    sums, counts = torch.tensor([1.0, 0.0] * 20), torch.tensor([1.0, 3.0] * 20)
    found = mean(sums, counts)
    # value 1/4; residuals (1 - 1/4) / 2 and (0 - 3/4) / 2
    half = student(39) * math.sqrt(40 * 0.375**2 / 39 / 40)
    assert found.value == 0.25 and found.high == pytest.approx(0.25 + half)


def test_the_area_is_the_probability_and_its_interval_covers_it() -> None:
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])).value == 0.875
    apart = auc(torch.arange(10.0) + 10, torch.arange(10.0))
    # at 1 the limit solves (1 - A)^2 = z^2 V(A), V with N* = 9 and mn = 100
    assert apart.value == 1 and apart.high == 1 and apart.low is not None
    a = apart.low
    variance = a * (1 - a) * (1 + 9 * (1 - a) / (2 - a) + 9 * a / (1 + a)) / 100
    assert 1 - a == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-5)
    same = auc(torch.arange(10.0), torch.arange(10.0))
    assert same.value == 0.5 and same.low is not None and same.high == pytest.approx(1 - same.low)
    generator, distance, covered = torch.Generator().manual_seed(0), 1.0, 0
    truth = (1 + math.erf(distance / 2)) / 2  # the normal distribution's function at distance / sqrt(2)
    for _ in range(400):
        positives = torch.randn(30, generator=generator) + distance
        found = auc(positives, torch.randn(40, generator=generator))
        assert found.low is not None and found.high is not None
        covered += found.low <= truth <= found.high
    assert 370 <= covered <= 396  # 95 % of 400 are 380


def test_an_increasing_function_maps_the_limits() -> None:
    assert Figure(0.5, 0.25, 0.75).scaled(100) == Figure(50.0, 25.0, 75.0)
    assert Figure(2.0, None, None).mapped(math.sqrt).low is None
