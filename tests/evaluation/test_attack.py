"""The threshold attack: answers known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.evaluation import threshold_attack


def normal(seed: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_disjoint_sets_give_1() -> None:
    for members, others in ((5, 5), (40, 300), (2, 50)):
        found = threshold_attack(1 + torch.rand(members), torch.rand(others) - 1)
        assert found.value == 1 and found.high == 1 and found.low is not None and found.low < 1
    # 2 (accuracy - 1/2) of 20 + 20 without an error: Newcombe's interval of 1 - 0
    found = threshold_attack(torch.ones(20), torch.zeros(20))
    missed = 1.959964**2 / (20 + 1.959964**2)
    assert found.low == pytest.approx(1 - math.sqrt(2) * missed, abs=1e-6)


def test_equal_distributions_give_0_within_the_interval() -> None:
    values, covered = [], 0
    for seed in range(100):
        found = threshold_attack(normal(2 * seed, 100), normal(2 * seed + 1, 150), seed=seed)
        assert found.low is not None
        values.append(found.value)
        covered += found.low == 0
    # a value that is clamped to 0 leaves a small mean; without cross-validation it would be about 0.12
    assert covered >= 93 and sum(values) / 100 < 0.05
    assert threshold_attack(torch.ones(50), torch.ones(50)).value == 0


def test_two_gaussians_give_the_best_thresholds_advantage() -> None:
    """Members lie 1 above: the best threshold, midway, has 2 F(1/2) - 1."""
    found = threshold_attack(normal(0, 20_000) + 1, normal(1, 20_000))
    assert found.value == pytest.approx(math.erf(0.5 / math.sqrt(2)), abs=0.015)
    assert found.low is not None and found.high is not None and found.high - found.low < 0.03


def test_members_are_the_confident_ones() -> None:
    assert threshold_attack(torch.zeros(50), torch.ones(50)).value == 0


def test_a_result_below_guessing_has_an_interval() -> None:
    """Clamping both limits with the value would give 0 (0 to 0) in 1 to 3 of 100 cases."""
    for seed in range(300):
        found = threshold_attack(normal(2 * seed, 10), normal(2 * seed + 1, 200), seed=seed)
        assert found.low is not None and found.high is not None and found.high > 0.01, seed


def test_weights_balance_the_others() -> None:
    """Two classes, one of them easy: a forget set of the easy class shows nothing beside others of that class."""
    easy, hard = normal(0, 400) + 6, normal(1, 400)
    members, others = normal(2, 300) + 6, torch.cat([easy, hard])
    assert threshold_attack(members, others).value > 0.4
    weights = torch.tensor([1.0, 0.0]).repeat_interleave(400)
    assert threshold_attack(members, others, weights).low == 0
    # whole numbers of weights are repeated examples, except for the width of the interval
    doubled = threshold_attack(members, others, torch.full((800,), 2.0))
    assert doubled == threshold_attack(members, others)


def test_the_seed_chooses_the_folds() -> None:
    members, others = normal(0, 60) + 0.5, normal(1, 60)
    assert threshold_attack(members, others, seed=3) == threshold_attack(members, others, seed=3)
    assert len({threshold_attack(members, others, seed=seed).value for seed in range(5)}) > 1


def test_bad_input_is_refused() -> None:
    x = torch.rand(5)
    for arguments, message in (
        ((x[:1], x), r"expected members \(n,\) of at least two finite values, got torch.float32 \(1,\)"),
        ((x, x[:0]), "expected others"),
        ((x, torch.tensor([1.0, math.nan])), "expected others"),
        ((x, x, torch.zeros(5)), "expected a weight of at least 0, some above, for each of 5 others"),
        ((x, x, torch.ones(4)), "expected a weight"),
        ((x, x, -torch.ones(5)), "expected a weight"),
        (([1.0], x), "expected members to be a tensor"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            threshold_attack(*arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
