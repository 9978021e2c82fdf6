"""The ratio of relearning against computations by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from delfast.evaluation.intervals import student
from delfast.evaluation.relearn_ratio import Comparison, compare, corrected


def answers(*parts: float, count: int = 100) -> Tensor:
    """Right answers, float64 (times, count): at each time the first part of the examples."""
    return torch.stack([(torch.arange(count) < round(part * count)).double() for part in parts])


def everywhere(others: list[Tensor]) -> list[Tensor]:
    return [torch.ones(other.shape[1], dtype=torch.bool) for other in others]


def odds(right: float, count: int = 100) -> float:
    return (right + 0.5) / (count - right + 0.5)


def ratio(own: Tensor, *others: Tensor, is_loss: bool = False) -> float:
    found = compare(own, others, everywhere(list(others)), is_loss)
    assert found is not None
    return math.exp(found.log)


def test_the_ratio_is_that_of_the_odds_after_the_beginning() -> None:
    # means over the times after 0: 90 and 60 of 100
    own, other = answers(0.6, 0.8, 1.0), answers(0.5, 0.6, 0.6)
    assert ratio(own, other) == pytest.approx(odds(90) / odds(60))
    assert ratio(own, own) == 1
    # of several networks the geometric mean
    assert ratio(own, other, answers(0.5, 0.7, 0.7)) == pytest.approx(odds(90) / math.sqrt(odds(60) * odds(70)))


def test_a_network_that_begins_below_is_measured_from_where_it_begins() -> None:
    """It hides 100 % behind 10 %: it comes no further than the others, but from afar."""
    own, other = answers(0.1, 0.7), answers(0.7, 0.7)
    assert ratio(own, other) == pytest.approx(odds(70) / odds(10))
    stays = answers(0.1, 0.1)
    assert ratio(stays, other) == pytest.approx(1)
    # above, nothing is taken off
    assert ratio(answers(0.9, 0.9), other) == pytest.approx(odds(90) / odds(70))


def test_odds_of_0_and_1_have_a_ratio() -> None:
    assert ratio(answers(0.0, 1.0), answers(0.0, 0.0)) == pytest.approx(odds(100) / odds(0))


def test_losses_have_the_ratio_of_their_means() -> None:
    own, other = torch.full((2, 10), 0.5), torch.full((2, 10), 2.0)
    assert ratio(own.double(), other.double(), is_loss=True) == pytest.approx(4)
    assert compare(own - 1, [other], everywhere([other]), True) is None


def test_a_network_is_compared_on_what_it_did_not_know() -> None:
    own = answers(0.5, 0.5)
    knows_half = answers(0.5, 1.0)  # it knew the first half, and now knows all
    unknown = torch.arange(100) >= 50
    found = compare(own, [knows_half], [unknown], False)
    assert found is not None and found.log == pytest.approx(math.log(odds(0, 50) / odds(50, 50)))
    few = torch.arange(100) >= 99
    assert compare(own, [knows_half], [few], False) is None
    both = compare(own, [knows_half, own], [few, unknown], False)
    assert both is not None and both.log == 0 and both.networks == 0  # one is left


def test_the_sampling_variance_is_that_of_a_bootstrap() -> None:
    generator = torch.Generator().manual_seed(0)
    own, other = ((torch.rand(1, 60, generator=generator) < part).double().repeat(2, 1) for part in (0.8, 0.6))
    found = compare(own, [other], everywhere([other]), False)
    assert found is not None
    drawn = []
    for _ in range(800):
        rows = torch.randint(60, (60,), generator=generator)
        again = compare(own[:, rows], [other[:, rows]], everywhere([other]), False)
        assert again is not None
        drawn.append(again.log)
    # Haldane's half pulls the bootstrap's values together, by some percent
    assert torch.tensor(drawn).std().item() == pytest.approx(math.sqrt(found.sampling), rel=0.15)


def haldane(right: float, count: int) -> float:
    """The variance of the log odds of ``right`` of ``count`` (Gart & Zweifel, 1967)."""
    return 1 / (right + 0.5) + 1 / (count - right + 0.5)


@pytest.mark.parametrize(("own", "other", "count"), [(1, 1, 5), (1, 1, 28), (1, 0, 28), (0, 0, 10), (0.5, 1, 10)])
def test_no_interval_is_narrower_than_that_of_its_odds(own: float, other: float, count: int) -> None:
    """Where all answers of a network are right, or all wrong, the examples vary no longer, but the odds do."""
    networks = [answers(other, other, other, count=count) for _ in range(4)]
    found = compare(answers(own, own, own, count=count), networks, everywhere(networks), False)
    assert found is not None
    least = haldane(own * count, count) + haldane(other * count, count) / 4
    assert found.sampling >= 0.9 * least  # what the same examples do to both networks cancels
    assert compare(networks[0], networks, everywhere(networks), False) is not None
    figure = found.figure()
    assert figure.low is not None and figure.high is not None and figure.high > 5 * figure.value > 25 * figure.low


def test_the_beginning_counts_whether_it_is_taken_off_or_not() -> None:
    """A start just below and just above the others' have variances alike."""
    other = answers(0.5, 0.6)
    below, above = (compare(answers(start, 0.9), [other], everywhere([other]), False) for start in (0.49, 0.51))
    assert below is not None and above is not None
    assert below.log > above.log and below.sampling == pytest.approx(above.sampling, rel=0.05)


def test_the_interval_has_both_variances() -> None:
    one = answers(0.7, 0.7)
    others = [answers(part, part) for part in (0.6, 0.7, 0.75)]
    found = compare(one, others, everywhere(others), False)
    assert found is not None
    logs = torch.tensor([math.log(odds(70) / odds(right)) for right in (60, 70, 75)], dtype=torch.float64)
    assert found.networks == pytest.approx((logs.var() * 4 / 3).item()) and found.degrees == (99, 2)
    figure = Comparison(math.log(2), 0.0, 0.04, (99, 2)).figure()
    assert figure.high == pytest.approx(2 * math.exp(0.2 * student(2)))
    # Satterthwaite: (0.04 + 0.04)^2 / (0.04^2 / 99 + 0.04^2 / 2) = 7.8
    figure = Comparison(math.log(2), 0.04, 0.04, (99, 2)).figure()
    assert figure.low == pytest.approx(2 * math.exp(-student(7) * math.sqrt(0.08)))


def test_networks_of_one_kind_have_1_in_their_interval() -> None:
    """Five networks of one kind, on the same examples of different difficulty: each beside the four others."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        difficulty = torch.rand(80, generator=generator)
        ability = 0.3 * torch.randn(5, generator=generator)
        networks = [
            (torch.rand(3, 80, generator=generator) < torch.sigmoid(4 * difficulty - 1 + a)).double() for a in ability
        ]
        found = compare(networks[0], networks[1:], everywhere(networks[1:]), False)
        assert found is not None
        figure = found.figure()
        assert figure.low is not None and figure.high is not None
        inside += figure.low <= 1 <= figure.high
    assert inside >= 55


def test_a_general_advantage_is_taken_off_and_a_disadvantage_is_not_added() -> None:
    forgotten = Comparison(math.log(6), 0.01, 0.02, (99, 3))
    for general, left in ((2.0, 3.0), (10.0, 1.0), (0.5, 6.0)):
        found = corrected(forgotten, Comparison(math.log(general), 0.03, 0.0, (99, 3)))
        assert math.exp(found.log) == pytest.approx(left)
        assert found.sampling == pytest.approx(0.04)  # also where nothing is taken off: that was estimated too
    below = Comparison(math.log(0.5), 0.01, 0.02, (99, 3))
    assert corrected(below, forgotten).log == below.log
