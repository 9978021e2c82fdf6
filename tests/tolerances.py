"""Tolerances from an error budget, not tuned until the tests pass.

A result may be at most twice as far from float64 as the same computation by PyTorch in the same precision, plus one
rounding of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Largest elementwise |result - exact| / |exact|; where exact is 0 the result must be 0."""
    result, exact = result.double(), exact.double()
    if exact.numel() == 0:
        return 0.0
    zero = exact == 0
    if bool((result[zero] != 0).any()):
        return float("inf")
    error = ((result - exact).abs() / exact.abs())[~zero]
    return float(error.max()) if error.numel() else 0.0


def assert_within_budget(result: Tensor, exact: Tensor, same_precision: Tensor) -> None:
    """``exact``: in float64. ``same_precision``: PyTorch's own, in the precision of ``result``."""
    assert result.shape == exact.shape
    allowed = 2 * relative_error(same_precision, exact) + torch.finfo(result.dtype).eps
    error = relative_error(result, exact)
    assert error <= allowed, f"relative error {error:.3g}, the budget allows {allowed:.3g}"


def relative_l2(result: Tensor, exact: Tensor) -> float:
    """‖result - exact‖ / ‖exact‖: for sums whose terms cancel, where an element's own size says little of its error."""
    norm = float(exact.double().norm())
    error = float((result.double() - exact.double()).norm())
    return error / norm if norm else error


def assert_l2_within_budget(result: Tensor, exact: Tensor, same_precision: Tensor) -> None:
    """As assert_within_budget, for the whole tensor."""
    assert result.shape == exact.shape
    allowed = 2 * relative_l2(same_precision, exact) + torch.finfo(result.dtype).eps
    error = relative_l2(result, exact)
    assert error <= allowed, f"relative L2 error {error:.3g}, the budget allows {allowed:.3g}"
