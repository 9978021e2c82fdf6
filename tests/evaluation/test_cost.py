"""Run time and changed parameters: answers known by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from delfast.errors import InputError
from delfast.evaluation import (
    changed_fraction,
    relative_time,
)
from tests.evaluation.samples import make_model


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
        (state, state, [], "at least one element, got none"),
        ({"a": torch.zeros(0)}, {"a": torch.zeros(0)}, ["a"], "at least one element, got none"),
        ({}, state, ["a"], "'a' is not in the one before"),
        (state, {}, ["a"], "'a' is not in the one after"),
        (state, {"a": torch.zeros(3)}, ["a"], r"'a' is \(2,\) torch.float32 before and \(3,\) torch.float32 after"),
        (state, {"a": torch.zeros(2).double()}, ["a"], "and .* torch.float64 after"),
    ):
        with pytest.raises(InputError, match=message):
            changed_fraction(before, after, names)
