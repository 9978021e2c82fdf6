"""The comparer itself: it must let rounding pass and catch an error."""

import pytest
import torch

from tests.tolerances import assert_l2_within_budget, assert_within_budget, relative_error, relative_l2


def test_rounding_passes_and_an_error_does_not() -> None:
    exact = torch.rand(100, dtype=torch.float64) + 1
    rounded = exact.float()
    assert_within_budget(rounded, exact, rounded)
    wrong = rounded.clone()
    wrong[50] *= 1 + 1e-5
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(wrong, exact, rounded)


def test_a_zero_must_be_a_zero() -> None:
    exact = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert relative_error(torch.tensor([0.0, 1.0]), exact) == 0
    assert relative_error(torch.tensor([1e-30, 1.0]), exact) == float("inf")


def test_a_nan_is_never_within_budget() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([1.0, float("nan"), 1.0]), exact, exact.float())


def test_l2_lets_cancellation_pass_and_catches_an_error() -> None:
    exact = torch.rand(100, dtype=torch.float64) + 1
    exact[7] = 1e-12  # what is left where large terms cancel
    rounded = exact.float()
    cancelled = rounded.clone()
    cancelled[7] = 1e-7
    assert relative_error(cancelled, exact) > 1e4 and relative_l2(cancelled, exact) < 1e-7
    assert_l2_within_budget(cancelled, exact, rounded)
    for wrong, value in ((50, 1.001), (50, float("nan"))):
        spoilt = rounded.clone()
        spoilt[wrong] *= value
        with pytest.raises(AssertionError, match="budget"):
            assert_l2_within_budget(spoilt, exact, rounded)


def test_l2_of_nothing_is_zero() -> None:
    assert relative_l2(torch.empty(0), torch.empty(0)) == 0
    assert relative_l2(torch.full((2,), 3.0), torch.zeros(2)) > 0
