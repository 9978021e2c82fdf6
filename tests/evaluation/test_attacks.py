"""Predictions, the SVC attacks, U-LiRA, KL to the oracle, run time and changed parameters: answers known by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from delfast.errors import InputError
from delfast.evaluation import (
    accuracy_and_loss,
    changed_fraction,
    evaluate,
    kl_divergence,
    kl_to_oracle,
    logit_confidences,
    membership_inference,
    modified_entropy,
    predictions,
    relative_time,
    svc_attacks,
    tpr_at_fpr,
    u_lira,
    u_lira_leave_one_out,
)
from delfast.evaluation.lira import VARIANCE_FLOOR

FEATURES = ["correctness", "confidence", "entropy", "m_entropy", "prob"]


def make_model(seed: int = 0, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, classes))


def batches(count: int = 50, size: int = 7, seed: int = 1) -> list[tuple[Tensor, ...]]:
    numbers = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(count, 5, generator=numbers), torch.randint(0, 4, (count,), generator=numbers)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def made(count: int, scale: float, seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Predictions of random logits, the true class's raised by ``scale``."""
    numbers = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (count,), generator=numbers)
    logits = torch.randn(count, classes, generator=numbers)
    logits[torch.arange(count), targets] += scale
    return logits.log_softmax(1), targets


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def below(x: float) -> float:
    """The standard normal's distribution function."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


# Predictions


def test_predictions_are_the_log_softmax_of_every_example_in_order() -> None:
    model, data = make_model(), batches()
    log_probabilities, targets = predictions(model, data)
    expected = model.eval()(torch.cat([inputs for inputs, _ in data])).detach().log_softmax(1)
    assert log_probabilities.dtype == torch.float32 and targets.dtype == torch.int64
    assert not log_probabilities.requires_grad
    torch.testing.assert_close(log_probabilities, expected)
    assert torch.equal(targets, torch.cat([labels for _, labels in data]))
    triples = [(torch.arange(len(labels)), inputs, labels) for inputs, labels in data]
    assert torch.equal(predictions(model, triples)[0], log_probabilities)


def test_predictions_take_small_integers_and_half_precision() -> None:
    model, data = make_model().bfloat16(), batches()
    log_probabilities, targets = predictions(model, [(x.bfloat16(), y.to(torch.int32)) for x, y in data])
    assert log_probabilities.dtype == torch.float32 and targets.dtype == torch.int64
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(50))


def both(model: nn.Module) -> Any:
    return kl_to_oracle(model, model, batches())


@pytest.mark.parametrize("use", [lambda model: predictions(model, batches()), both])
def test_models_are_left_as_they_were(use: Any) -> None:
    model = make_model().train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    use(model)
    assert [module.training for module in model] == [True, False, True, True] and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_an_oracle_is_left_as_it_was_and_after_an_error_too() -> None:
    model, oracle = make_model(0).train(), make_model(1).eval()
    kl_to_oracle(model, oracle, batches())
    with pytest.raises(InputError, match="data set, the model: expected labels in"):
        kl_to_oracle(model, oracle, [(x, y + 4) for x, y in batches()])
    with pytest.raises(InputError, match="data set: expected labels in"):
        predictions(model, [(x, y + 4) for x, y in batches()])
    assert model.training and model[2].training and not oracle.training and not oracle[2].training


def test_bad_sets_and_outputs_are_refused() -> None:
    model, data = make_model(), batches()
    for empty in ([], [(data[0][0][:0], data[0][1][:0])]):
        with pytest.raises(InputError, match="data set: expected at least one example, got none"):
            predictions(model, empty)
        with pytest.raises(InputError, match="data set: expected at least one example, got none"):
            kl_to_oracle(model, model, empty)
    with pytest.raises(InputError, match="data set: expected batches"):
        predictions(model, [{"input": data[0][0]}])
    with pytest.raises(InputError, match=r"got \(7, 4\) of the model and \(7, 3\) of the oracle"):
        kl_to_oracle(model, make_model(classes=3), [(x, y % 3) for x, y in data])
    broken = make_model()
    with torch.no_grad():
        broken[3].bias[0] = float("nan")
    with pytest.raises(InputError, match="data set: expected finite outputs"):
        predictions(broken, data)
    with pytest.raises(InputError, match="data set, the oracle: expected finite outputs"):
        kl_to_oracle(model, broken, data)


def test_logit_confidences_are_log_odds_and_exact_where_p_rounds_to_1() -> None:
    log_probabilities, targets = made(40, 1.0, seed=0)
    odds = torch.logit(log_probabilities.double().exp()[torch.arange(40), targets])
    scaled = logit_confidences(log_probabilities, targets)
    assert scaled.dtype == torch.float64
    torch.testing.assert_close(scaled, odds, rtol=1e-5, atol=1e-5)
    sure = torch.tensor([[60.0, 0.0, 0.0], [0.0, 60.0, 0.0]]).log_softmax(1)  # float32: p is 1, log p is 0
    found = logit_confidences(sure, torch.tensor([0, 0], dtype=torch.int32))
    torch.testing.assert_close(found, torch.tensor([60 - math.log(2), -60.0], dtype=torch.float64))


@pytest.mark.parametrize("use", [logit_confidences, modified_entropy])
def test_what_are_no_predictions_is_refused(use: Any) -> None:
    good, targets = made(6, 1.0, seed=0)
    for bad, labels, message in (
        (good[:0], targets[:0], "at least one example, got none"),
        (good[:, :1], targets, r"at least two classes, got torch.float32 \(6, 1\)"),
        (good[0], targets, r"at least two classes, got torch.float32 \(4,\)"),
        (good.long(), targets, "got torch.int64"),
        (good.exp(), targets, "got a row that sums to .*; pass log_softmax of logits, or log of probabilities"),
        (good.exp().round().log(), targets, "finite log-probabilities, got NaN or infinity"),
        (good, targets[:5], r"integer targets \(N,\), got \(6, 4\) and torch.int64 \(5,\)"),
        (good, targets.float(), "integer targets"),
        (good, targets + 4, r"expected labels in \[0, 4\)"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            use(bad, labels)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("predictions: ")


# The SVC attacks


def test_modified_entropy_is_the_formula() -> None:
    log_probabilities, targets = made(30, 0.5, seed=3)
    p = log_probabilities.double().exp()
    for row, label, found in zip(
        p.tolist(), targets.tolist(), modified_entropy(log_probabilities, targets), strict=True
    ):
        expected = -(1 - row[label]) * math.log(row[label])
        expected -= sum(q * math.log(1 - q) for i, q in enumerate(row) if i != label)
        assert found.item() == pytest.approx(expected, rel=1e-5)
    by_hand = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    expected = -0.3 * math.log(0.7) - 0.2 * math.log(0.8) - 0.1 * math.log(0.9)
    assert modified_entropy(by_hand, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-12)


def test_modified_entropy_tells_sure_and_right_from_sure_and_wrong() -> None:
    sure = torch.tensor([[80.0, 0.0, 0.0], [80.0, 0.0, 0.0]]).log_softmax(1)
    right, wrong = modified_entropy(sure, torch.tensor([0, 1])).tolist()
    assert 0 <= right < 1e-60
    # -(1 - p_y) log p_y = 80, and -p_0 log(1 - p_0) = 80 - log 2; the third class adds nothing
    assert wrong == pytest.approx(160 - math.log(2), rel=1e-6)


@pytest.mark.long
def test_svc_attacks_are_the_described_classifiers() -> None:
    """Equal numbers: nothing is subsampled, and a plain transcription gives the same figures."""
    from sklearn.svm import SVC

    sets = [made(60, scale, seed) for seed, scale in enumerate((3.0, 1.0, 2.0))]
    found = svc_attacks(*sets)
    assert list(found) == FEATURES
    features: dict[str, list[Tensor]] = {name: [] for name in FEATURES}
    for log_probabilities, targets in sets:
        p = log_probabilities.double().exp()
        features["correctness"].append((p.argmax(1) == targets).double()[:, None])
        features["confidence"].append(p[torch.arange(60), targets][:, None])
        features["entropy"].append(Categorical(probs=p).entropy()[:, None])
        features["m_entropy"].append(modified_entropy(log_probabilities, targets)[:, None])
        features["prob"].append(p)
    for name, (retain, test, forget) in features.items():
        attack = SVC(C=3, kernel="rbf", gamma="auto")
        attack.fit(torch.cat([retain, test]).numpy(), [1] * 60 + [0] * 60)
        assert found[name] == pytest.approx(100 * (1 - attack.predict(forget.numpy()).mean())), name


def test_the_confidence_attack_is_membership_inference() -> None:
    """Also where the larger set is subsampled."""
    model, sets = make_model(), [batches(count, seed=count) for count in (90, 40, 30)]
    retain, test, forget = (predictions(model, data) for data in sets)
    for seed in (0, 1):
        found = svc_attacks(retain, test, forget, seed)
        confidences = [accuracy_and_loss(model, data).confidences for data in sets]
        assert found["confidence"] == membership_inference(*confidences, seed)
        assert found["confidence"] == evaluate(model, sets[2], sets[0], sets[1], seed=seed).mia
        assert found == svc_attacks(retain, test, forget, seed)


def test_svc_attacks_separate_what_can_be_separated() -> None:
    """Members: sure and right. Non-members: unsure and wrong."""
    members = (torch.tensor([[9.0, 0.0, 0.0]]).expand(50, 3).log_softmax(1), torch.zeros(50, dtype=torch.int64))
    outsiders = (torch.tensor([[0.0, 0.5, 0.0]]).expand(80, 3).log_softmax(1), torch.zeros(80, dtype=torch.int64))
    assert svc_attacks(members, outsiders, members) == dict.fromkeys(FEATURES, 0.0)
    assert svc_attacks(members, outsiders, outsiders) == dict.fromkeys(FEATURES, 100.0)
    mixed = (torch.cat([members[0][:3], outsiders[0][:1]]), torch.zeros(4, dtype=torch.int64))
    assert svc_attacks(members, outsiders, mixed) == dict.fromkeys(FEATURES, 25.0)


def test_features_differ_in_what_they_see() -> None:
    """Sure and right against sure and wrong: entropy sees no difference, the others see nothing else."""
    right = (torch.tensor([[9.0, 0.0, 0.0]]).expand(40, 3).log_softmax(1), torch.zeros(40, dtype=torch.int64))
    wrong = (right[0], right[1] + 1)
    on_right, on_wrong = svc_attacks(right, wrong, right), svc_attacks(right, wrong, wrong)
    for name in ("correctness", "confidence", "m_entropy"):
        assert (on_right[name], on_wrong[name]) == (0, 100)
    for name in ("entropy", "prob"):  # the same features: one answer for both
        assert on_right[name] == on_wrong[name]


def test_identical_distributions_leave_the_svc_attacks_guessing() -> None:
    """How often it calls non-member is its noise; but it does so of new members and new non-members alike."""
    retain, test = made(300, 1.0, seed=0), made(300, 1.0, seed=1)
    as_members, as_non_members = (svc_attacks(retain, test, made(3000, 1.0, seed)) for seed in (2, 3))
    apart = svc_attacks(made(300, 4.0, seed=0), test, made(3000, 4.0, seed=2))
    for name in FEATURES:
        assert abs(as_members[name] - as_non_members[name]) < 4, name
        assert apart[name] < 20, name


def test_svc_attacks_refuse_bad_sets() -> None:
    good = made(10, 1.0, seed=0)
    empty = (good[0][:0], good[1][:0])
    for sets, message in (
        ((empty, good, good), "retain set: expected at least one example"),
        ((good, empty, good), "test set: expected at least one example"),
        ((good, good, empty), "forget set: expected at least one example"),
        ((good, (good[0].exp(), good[1]), good), "test set: expected log-probabilities"),
        ((good, good, (good[0], good[1][:3])), "forget set: expected logits"),
        ((good, good, made(10, 1.0, 0, classes=3)), "the same classes in all three sets, got .*'forget': 3"),
    ):
        with pytest.raises(InputError, match=message):
            svc_attacks(*sets)


# U-LiRA


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


# KL to the oracle


def test_kl_is_that_of_torch_distributions_and_of_the_oracle_first() -> None:
    method, oracle = made(70, 1.0, seed=0)[0], made(70, 2.0, seed=1)[0]
    expected = torch_kl(Categorical(logits=oracle.double()), Categorical(logits=method.double())).mean().item()
    assert kl_divergence(method, oracle) == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(oracle, method) != pytest.approx(expected, rel=1e-2)
    assert kl_divergence(method, method) == 0
    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl_divergence(quarter, half) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


def test_kl_to_oracle_is_the_mean_over_examples_whatever_the_batches() -> None:
    model, oracle, data = make_model(0), make_model(1), batches()
    expected = kl_divergence(predictions(model, data)[0], predictions(oracle, data)[0])
    assert kl_to_oracle(model, oracle, data) == pytest.approx(expected, rel=1e-9) and expected > 0.01
    assert kl_to_oracle(model, oracle, batches(size=50)) == pytest.approx(expected, rel=1e-5)
    assert kl_to_oracle(model, oracle, iter(data)) == pytest.approx(expected, rel=1e-9)  # one pass
    assert kl_to_oracle(model, model, data) == 0


def test_kl_refuses_bad_input() -> None:
    good = made(6, 1.0, seed=0)[0]
    for method, oracle, message in (
        (good, good[:5], r"the same examples and classes, got \(6, 4\) of the model and \(5, 4\) of the oracle"),
        (good[:0], good[:0], "the model: expected at least one example"),
        (good.exp(), good, "the model: expected log-probabilities"),
        (good, good.exp(), "the oracle: expected log-probabilities"),
        (good, torch.full_like(good, float("nan")), "the oracle: expected finite"),
    ):
        with pytest.raises(InputError, match=message):
            kl_divergence(method, oracle)


# Cost


def test_relative_time_is_a_ratio() -> None:
    assert relative_time(3.0, 12.0) == 0.25 and relative_time(0, 2) == 0
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="the method's seconds, finite and at least 0, got"):
            relative_time(seconds, 1.0)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="the retraining's seconds, finite and above 0, got"):
            relative_time(1.0, seconds)


def test_changed_fraction_counts_scalars_bit_by_bit() -> None:
    before = {"a": torch.zeros(2, 3), "b": torch.tensor(float("nan")), "c": torch.zeros(3, dtype=torch.bfloat16)}
    after = {name: value.clone() for name, value in before.items()}
    assert changed_fraction(before, after, before) == 0  # NaN equals itself
    after["a"][0, 1] = -0.0
    after["c"][2] = 1.0
    assert changed_fraction(before, after, ["a", "b", "c"]) == 2 / 10
    assert changed_fraction(before, after, ["a", "a"]) == 1 / 6
    assert changed_fraction(before, after, ["b"]) == 0
    after["a"] = after["a"].t().contiguous().t()  # other strides, the same values
    assert changed_fraction(before, after, iter(["a"])) == 1 / 6
    complex_one = {"z": torch.tensor([1 + 2j, 3 + 4j])}
    assert changed_fraction(complex_one, {"z": torch.tensor([1 + 2j, 3 + 5j])}, ["z"]) == 1 / 4


def test_changed_fraction_of_a_network() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[3].weight.add_(1)
        model[1].running_mean.add_(1)  # a buffer
    names = [name for name, _ in model.named_parameters()]
    assert changed_fraction(before, model.state_dict(), names) == 64 / (5 * 16 + 16 + 32 + 64 + 4)


def test_changed_fraction_refuses_states_of_different_networks() -> None:
    state = {"a": torch.zeros(2)}
    for before, after, names, message in (
        (state, state, [], "at least one scalar, got none"),
        ({"a": torch.zeros(0)}, {"a": torch.zeros(0)}, ["a"], "at least one scalar, got none"),
        ({}, state, ["a"], "'a' is not in the one before"),
        (state, {}, ["a"], "'a' is not in the one after"),
        (state, {"a": torch.zeros(3)}, ["a"], r"'a' is \(2,\) torch.float32 before and \(3,\) torch.float32 after"),
        (state, {"a": torch.zeros(2).double()}, ["a"], "and .* torch.float64 after"),
    ):
        with pytest.raises(InputError, match=message):
            changed_fraction(before, after, names)
