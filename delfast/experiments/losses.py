"""Mean losses of a network whose job has a loss of its own, and therefore no accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from delfast.batches import LossFn, device_of, per_example_losses
from delfast.device_checks import DeviceChecks
from delfast.errors import InputError
from delfast.eval_mode import evaluating
from delfast.evaluation import Metrics, gaps
from delfast.execution import Execution, Precision
from delfast.feeding import feed


@dataclass(frozen=True)
class Losses:
    """Mean of ``loss_fn`` over the examples of the forget, retain and test sets, in its own unit."""

    forget_loss: float
    retain_loss: float
    test_loss: float

    def as_dict(self) -> dict[str, float]:
        """Return the values by name, as ``Metrics.as_dict``."""
        return asdict(self)


def gaps_between(metrics: Metrics | Losses, oracle: Metrics | Losses) -> dict[str, float]:
    """Return the gaps oracle - method of ``delfast.evaluation.gaps``; none without accuracies."""
    return gaps(metrics, oracle) if isinstance(metrics, Metrics) and isinstance(oracle, Metrics) else {}


def mean_losses(model: nn.Module, sets: Mapping[str, Iterable[Any]], loss_fn: LossFn, precision: Precision) -> Losses:
    """Measure the mean loss on each set in eval mode, without gradients; the model is left as it was.

    InputError for an empty set, and for a loss that is not finite.
    """
    found = {f"{name}_loss": _mean_loss(model, batches, name, loss_fn, precision) for name, batches in sets.items()}
    return Losses(**found)


def _mean_loss(model: nn.Module, batches: Iterable[Any], name: str, loss_fn: LossFn, precision: Precision) -> float:
    device, execution = device_of(model), Execution(precision)
    sums, count = [], 0
    checks = DeviceChecks(device)
    with evaluating(model), torch.no_grad(), checks:
        for batch in feed(batches, device):
            losses = per_example_losses(model, batch, loss_fn, execution)
            sums.append(losses.double().sum())
            count += len(losses)
    checks.read()
    if not count:
        raise InputError(f"{name} set: expected at least one example, got none")
    mean = float(torch.stack(sums).sum()) / count
    if not math.isfinite(mean):
        raise InputError(f"{name} set: expected a finite loss, got {mean}; train with a lower rate")
    return mean
