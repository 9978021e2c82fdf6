"""KL to the oracle: answers known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from delfast.errors import InputError
from delfast.evaluation import (
    kl_divergence,
    kl_to_oracle,
    predictions,
)
from tests.evaluation.samples import batches, made, make_model


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
