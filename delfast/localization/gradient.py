"""Gradients over a set of examples: G, their mean, and what batches are added up into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from delfast.batches import LossFn, check_differentiable, detached, evaluating, per_example_losses
from delfast.errors import InputError


class GradientSums(Protocol):
    """What batches are added up into."""

    def add(self, batch: Any) -> int:
        """Add a batch; its number of examples."""

    def mean(self, examples: int) -> dict[str, Tensor]:
        """Plain name -> sum / examples, float32 (float64 for float64 parameters), like the parameter."""


class MeanGradient:
    """Σ ∇ℓ(x): zero for a parameter that the loss does not use."""

    def __init__(self, network: nn.Module, parameters: Mapping[str, Tensor], loss_fn: LossFn | None) -> None:
        self.network = network
        self.parameters = dict(parameters)
        self.loss_fn = loss_fn
        self.sums = _zeros_like(parameters)

    def add(self, batch: Any) -> int:
        with torch.inference_mode(False), torch.enable_grad():
            losses = per_example_losses(self.network, detached(batch), self.loss_fn)
            check_differentiable(losses)
            # autograd.grad and not backward(): .grad and the hooks of optimizers on it stay out of this
            gradients = torch.autograd.grad(losses.sum(), list(self.parameters.values()), allow_unused=True)
        used = [(name, grad) for name, grad in zip(self.parameters, gradients, strict=True) if grad is not None]
        for name, grad in used:
            self.sums[name] += grad
        return losses.numel()

    def mean(self, examples: int) -> dict[str, Tensor]:
        return {name: total / examples for name, total in self.sums.items()}


def add_all(sums: GradientSums, network: nn.Module, loader: Iterable[Any], what: str) -> int:
    """Add every batch of ``loader`` once, in eval mode; |S|. InputError if there is no example."""
    examples = 0
    with evaluating(network, gradients=True):
        for batch in loader:
            examples += sums.add(batch)
    if not examples:
        raise InputError(f"expected a {what} of at least one example, got none; check its loader")
    return examples


def _zeros_like(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums in float32 at least, in each parameter's own strides."""
    with torch.inference_mode(False):  # they are added to outside it
        return {
            name: torch.zeros_like(
                parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False
            )
            for name, parameter in parameters.items()
        }
