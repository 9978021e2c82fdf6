"""Predictions and what reads them: answers known by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from delfast.errors import InputError
from delfast.evaluation import (
    kl_to_oracle,
    logit_confidences,
    modified_entropy,
    predictions,
)
from tests.evaluation.samples import batches, made, make_model


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
    with pytest.raises(InputError, match="data set: the model: expected labels in"):
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
    with pytest.raises(InputError, match="data set: the oracle: expected finite outputs"):
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
