"""The SVC attacks: answers known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from delfast.errors import InputError
from delfast.evaluation import (
    accuracy_and_loss,
    evaluate,
    membership_inference,
    modified_entropy,
    predictions,
    svc_attacks,
)
from tests.evaluation.samples import batches, made, make_model

FEATURES = ["correctness", "confidence", "entropy", "m_entropy", "prob"]


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
    """The attack calls some examples non-members by its noise, and new members as often as new non-members."""
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
