"""U-LiRA and the offline LiRA: answers known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.evaluation import (
    logit_confidences,
    offline_lira,
    predictions,
    tpr_at_fpr,
    u_lira,
    u_lira_leave_one_out,
)
from delfast.evaluation.intervals import auc
from delfast.evaluation.lira import VARIANCE_FLOOR
from tests.evaluation.samples import batches, make_model


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def below(x: float) -> float:
    """The standard normal's distribution function."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


def test_u_lira_reaches_the_bayes_accuracy_of_two_gaussians() -> None:
    """Each example's Gaussians lie elsewhere, a distance of 1.5 apart: no threshold for all would do."""
    examples, distance = 20_000, 1.5
    where = 10 * normal(0, examples)
    unlearned, retrained = where + distance + normal(1, 256, examples), where + normal(2, 256, examples)
    attacked = where + distance + normal(3, examples), where + normal(4, examples)
    found = u_lira(unlearned, retrained, *attacked, fpr=5)
    assert found.accuracy == pytest.approx(100 * below(distance / 2), abs=1)
    # at 5 % false positives the threshold is at the 95 % quantile, 1.645
    assert found.fpr == 5 and found.tpr == pytest.approx(100 * below(distance - 1.645), abs=2)
    # log of the ratio: distance * (x - where) - distance^2 / 2
    expected = distance * (attacked[0] - where) - distance**2 / 2
    assert (found.unlearned_scores - expected).abs().mean() < 0.2
    assert found.unlearned_scores.shape == found.retrained_scores.shape == (examples,)


def test_u_lira_uses_the_variances() -> None:
    """One mean, deviations 1 and 2: the densities meet where x^2 (1 - 1/4) / 2 = log 2."""
    examples = 20_000
    found = u_lira(normal(0, 256, examples), 2 * normal(1, 256, examples), normal(2, examples), 2 * normal(3, examples))
    meet = math.sqrt(8 * math.log(2) / 3)
    bayes = ((2 * below(meet) - 1) + 2 * (1 - below(meet / 2))) / 2
    assert found.accuracy == pytest.approx(100 * bayes, abs=1)


@pytest.mark.parametrize("fixed", [False, True])
def test_u_lira_is_at_50_where_nothing_differs(fixed: bool) -> None:
    same = normal(0, 4, 300)
    found = u_lira(same, same, same[0], same[1], fixed_variance=fixed)
    assert found.accuracy == 50 and found.tpr == 0 and not found.unlearned_scores.any()
    shape = (5, 20_000)
    found = u_lira(normal(1, *shape), normal(2, *shape), normal(3, 20_000), normal(4, 20_000), fixed_variance=fixed)
    assert found.accuracy == pytest.approx(50, abs=1)
    uneven = u_lira(normal(1, 3, 20_000), normal(2, 9, 20_000), normal(3, 20_000), normal(4, 20_000))
    assert uneven.accuracy == pytest.approx(50, abs=1)


@pytest.mark.parametrize("fixed", [False, True])
def test_u_lira_is_at_100_where_all_is_separated(fixed: bool) -> None:
    unlearned, retrained = 20 + normal(0, 8, 200), normal(1, 8, 200)
    found = u_lira(unlearned, retrained, 20 + normal(2, 200), normal(3, 200), fixed_variance=fixed)
    assert found.accuracy == 100 and found.tpr == 100
    swapped = u_lira(retrained, unlearned, 20 + normal(2, 200), normal(3, 200), fixed_variance=fixed)
    assert swapped.accuracy == 0 and swapped.tpr == 0


def test_u_lira_stays_finite_where_shadows_agree() -> None:
    """No variance: the floor's. At the middle neither kind is likelier."""
    unlearned, retrained = torch.full((2, 3), 1.0), torch.zeros(2, 3)
    found = u_lira(unlearned, retrained, torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.0, 0.0]))
    half = 0.5 / VARIANCE_FLOOR
    torch.testing.assert_close(found.unlearned_scores, torch.tensor([half, 0.0, -half], dtype=torch.float64))
    assert found.accuracy == pytest.approx(100 * (0.5 + 1) / 2)


def test_a_fixed_variance_is_the_mean_of_the_examples_and_helps_few_shadows() -> None:
    unlearned, retrained = torch.tensor([[0.0, 10.0], [2.0, 14.0]]), torch.tensor([[-1.0, 7.0], [1.0, 9.0]])
    x = torch.tensor([0.5, 11.0])
    found = u_lira(unlearned, retrained, x, x, fixed_variance=True)
    # unlearned: means 1 and 12, variances 2 and 8, mean 5; retrained: means 0 and 8, variances 2 and 2
    same = math.log(2 / 5) / 2
    expected = [same - 0.5**2 / 10 + 0.5**2 / 4, same - 1**2 / 10 + 3**2 / 4]
    torch.testing.assert_close(found.unlearned_scores, torch.tensor(expected, dtype=torch.float64))
    examples = 20_000
    shadows, attacked = (
        (2 + normal(0, 3, examples), normal(1, 3, examples)),
        (2 + normal(2, examples), normal(3, examples)),
    )
    own, fixed = (u_lira(*shadows, *attacked, fixed_variance=value).accuracy for value in (False, True))
    assert fixed > own + 3


def test_u_lira_attacks_several_networks_at_once() -> None:
    unlearned, retrained, attacked = 1 + normal(0, 6, 50), normal(1, 6, 50), 1 + normal(2, 3, 50)
    found = u_lira(unlearned, retrained, attacked, normal(3, 50))
    assert found.unlearned_scores.shape == (3, 50) and found.retrained_scores.shape == (50,)
    alone = u_lira(unlearned, retrained, attacked[1], normal(3, 50))
    assert torch.equal(found.unlearned_scores[1], alone.unlearned_scores)
    # float32 and float64 are the same attack
    other = u_lira(*(each.float() for each in (unlearned, retrained, attacked, normal(3, 50))))
    torch.testing.assert_close(other.unlearned_scores, found.unlearned_scores, rtol=1e-4, atol=1e-4)


def test_leaving_one_out_is_the_attack_on_each_pair() -> None:
    unlearned, retrained = 1 + normal(0, 5, 40), normal(1, 4, 40)
    found = u_lira_leave_one_out(unlearned, retrained, fpr=10)
    assert found.unlearned_scores.shape == found.retrained_scores.shape == (4, 40)
    for i in range(4):
        kept = [[j for j in range(n) if j != i] for n in (5, 4)]
        one = u_lira(unlearned[kept[0]], retrained[kept[1]], unlearned[i], retrained[i])
        assert torch.equal(found.unlearned_scores[i], one.unlearned_scores)
        assert torch.equal(found.retrained_scores[i], one.retrained_scores)
    right = (found.unlearned_scores > 0).double().mean() + (found.retrained_scores < 0).double().mean()
    assert found.accuracy == pytest.approx(50 * right.item())
    assert found.tpr == tpr_at_fpr(found.unlearned_scores, found.retrained_scores, 10)


@pytest.mark.parametrize("fixed", [False, True])
def test_leaving_one_out_is_not_biased(fixed: bool) -> None:
    """Three of each: the fewest, where leaving one out without its pair would give some 42 to 47."""
    found = u_lira_leave_one_out(normal(0, 3, 20_000), normal(1, 3, 20_000), fixed_variance=fixed)
    assert found.accuracy == pytest.approx(50, abs=1)


def test_tpr_at_fpr_counts() -> None:
    negatives, positives = torch.arange(100.0), torch.tensor([98.0, 98.5, 99.0, 99.5])
    for fpr, expected in ((0, 25), (0.99, 25), (1, 75), (2, 100)):
        assert tpr_at_fpr(positives, negatives, fpr) == expected, fpr
    # 29 % of 100 is 29, though 0.29 * 100 is not
    assert tpr_at_fpr(torch.tensor([70.5, 69.5]), negatives, 29) == 50
    # ties: a threshold that lets one pass lets all of them pass
    assert tpr_at_fpr(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0]), 40) == 50


def test_u_lira_refuses_bad_input() -> None:
    u, r, x = normal(0, 3, 5), normal(1, 3, 5), normal(2, 5)
    nan = torch.full((5,), float("nan"))
    infinite = u.clone()
    infinite[1, 2] = float("inf")
    for arguments, message in (
        ((u[:1], r, x, x), "unlearned: expected at least 2 models for the attack's shadows, got 1; train more"),
        ((u, r[:0], x, x), "retrained: expected at least 2 models for the attack's shadows, got 0"),
        ((u[0], r, x, x), r"unlearned: expected \(models, examples\), got \(5,\)"),
        ((u, r[:, :4], x, x), r"retrained: expected the same examples .* 5 as in the first array, got \(3, 4\)"),
        ((u, r, x[:4], x), r"attacked_unlearned: expected the same examples.*got \(4,\)"),
        ((u, r, x, x[:, None]), "attacked_retrained: expected the same examples"),
        ((u, r, u[:0], x), "attacked_unlearned: expected the same examples for every model, at least one"),
        ((u[:, :0], r[:, :0], x[:0], x[:0]), "unlearned: expected the same examples for every model, at least one"),
        ((infinite, r, x, x), "unlearned: expected finite logit-scaled confidences.*logit_confidences"),
        ((u, r, x, nan), "attacked_retrained: expected finite logit-scaled confidences"),
        ((u.long(), r, x, x), "unlearned: expected finite logit-scaled confidences, got torch.int64"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            u_lira(*arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="retrained: expected at least 3 models for the attack's shadows, got 2"):
        u_lira_leave_one_out(u, r[:2])
    for fpr in (-1, 100, float("nan")):
        with pytest.raises(InputError, match="expected fpr in percent, at least 0 and below 100"):
            u_lira(u, r, x, x, fpr=fpr)
    with pytest.raises(InputError, match="finite score of positives"):
        tpr_at_fpr(x[:0], x, 1)
    with pytest.raises(InputError, match="finite score of negatives"):
        tpr_at_fpr(x, nan, 1)


def test_from_networks_to_the_attack() -> None:
    """The arrays as the docstrings describe them."""
    data = batches()
    unlearned, retrained = (
        torch.stack([logit_confidences(*predictions(make_model(seed), data)) for seed in seeds])
        for seeds in (range(3), range(3, 6))
    )
    found = u_lira_leave_one_out(unlearned, retrained)
    assert 0 <= found.accuracy <= 100 and found.unlearned_scores.shape == (3, 50)


def test_offline_lira_reaches_the_area_of_two_gaussians() -> None:
    """Each example's Gaussian lies elsewhere; members lie 1.5 above. The area is F(1.5 / sqrt(2))."""
    examples, distance = 20_000, 1.5
    where = 10 * normal(0, examples)
    references = where + normal(1, 64, examples)
    members = offline_lira(where + distance + normal(2, examples), references)
    others = offline_lira(where + normal(3, examples), references)
    area = auc(members, others)
    assert area.value == pytest.approx(below(distance / math.sqrt(2)), abs=0.01)
    # the score of one that was never seen is a standard normal, that of a member lies 1.5 above
    assert others.mean().abs() < 0.05 and others.std() == pytest.approx(1, abs=0.03)
    assert members.mean() == pytest.approx(distance, abs=0.05)
    assert tpr_at_fpr(members, others, 5) == pytest.approx(100 * below(distance - 1.645), abs=2)


def test_offline_lira_uses_the_references_that_never_saw_the_example() -> None:
    references = torch.tensor([[0.0, 0.0, 5.0], [2.0, 4.0, 6.0], [90.0, 8.0, 7.0], [4.0, 90.0, 90.0]])
    knew = references == 90
    knew[0, 2] = knew[1, 2] = True  # one is left for the last example
    x = torch.tensor([6.0, 4.0, 1.0])
    found = offline_lira(x, references, knew)
    # means 2 and 4, sums of squares 8 and 32, over 2 + 2 degrees of freedom
    spread = math.sqrt(10 * (1 + 1 / 3))
    assert found[:2].tolist() == pytest.approx([4 / spread, 0]) and found[2].isnan()
    own = offline_lira(x, references, knew, fixed_variance=False)
    assert own[0].item() == pytest.approx(4 / math.sqrt(4 * (1 + 1 / 3))) and own[2].isnan()


def test_examples_with_different_numbers_of_references_are_comparable() -> None:
    """Half of them have two references, half have eight: scores of both are standard normal."""
    knew = torch.zeros(8, 40_000, dtype=torch.bool)
    knew[2:, :20_000] = True
    found = offline_lira(normal(0, 40_000), normal(1, 8, 40_000), knew)
    assert found[:20_000].std() == pytest.approx(1, abs=0.03) and found[20_000:].std() == pytest.approx(1, abs=0.03)


def test_offline_lira_stays_finite_where_references_agree() -> None:
    found = offline_lira(torch.tensor([1.0, 0.0]), torch.zeros(2, 2))
    assert found.tolist() == pytest.approx([1 / math.sqrt(1.5 * VARIANCE_FLOOR), 0])


def test_offline_lira_refuses_bad_input() -> None:
    r, x = normal(0, 3, 5), normal(1, 5)
    for arguments, message in (
        ((x, r[:0]), "references: expected at least 1 models"),
        ((x[:4], r), r"attacked: expected the same examples.*got \(4,\)"),
        ((r, r), r"attacked: expected \(examples,\) of one network, got \(3, 5\)"),
        ((x, r, r), r"expected members to be bool \(3, 5\), got torch.float64 \(3, 5\)"),
        ((x, r, torch.zeros(5, dtype=torch.bool)), r"expected members to be bool \(3, 5\), got torch.bool \(5,\)"),
        ((x, r * float("inf")), "references: expected finite logit-scaled confidences"),
    ):
        with pytest.raises(InputError, match=message):
            offline_lira(*arguments)
