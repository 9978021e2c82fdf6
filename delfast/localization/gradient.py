"""The mean gradient G over a set of examples, accumulated batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from delfast.batches import LossFn, check_differentiable, detached, evaluating, per_example_losses
from delfast.errors import InputError


class GradientSums(Protocol):
    """An accumulator of gradients over batches."""

    def add(self, batch: Any) -> int:
        """Add a batch and return its number of examples."""

    def mean(self, examples: int) -> dict[str, Tensor]:
        """Return plain name -> sum / examples, in the parameter's shape; float32, or float64 for float64 parameters."""


class MeanGradient:
    """The sum Σ ∇ℓ(x) over the examples. It is zero for a parameter that the loss does not depend on."""

    def __init__(self, network: nn.Module, parameters: Mapping[str, Tensor], loss_fn: LossFn | None) -> None:
        self.network = network
        self.parameters = dict(parameters)
        self.loss_fn = loss_fn
        self.sums = _zeros_like(parameters)

    def add(self, batch: Any) -> int:
        with torch.inference_mode(False), torch.enable_grad():
            losses = per_example_losses(self.network, detached(batch), self.loss_fn)
            check_differentiable(losses)
            # not backward(): it would change .grad and call the hooks that optimizers register on it
            gradients = torch.autograd.grad(losses.sum(), list(self.parameters.values()), allow_unused=True)
        used = [(name, grad) for name, grad in zip(self.parameters, gradients, strict=True) if grad is not None]
        for name, grad in used:
            self.sums[name] += grad
        return losses.numel()

    def mean(self, examples: int) -> dict[str, Tensor]:
        return {name: total / examples for name, total in self.sums.items()}


def add_all(sums: GradientSums, network: nn.Module, loader: Iterable[Any], what: str) -> int:
    """Add every batch of ``loader`` once, in eval mode, and return |S|. InputError for a set without examples."""
    examples = 0
    with evaluating(network, gradients=True):
        for batch in loader:
            examples += sums.add(batch)
    if not examples:
        raise InputError(f"expected a {what} of at least one example, got none; check its loader")
    return examples


def _zeros_like(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros with each parameter's shape and strides, in float32 or wider."""
    with torch.inference_mode(False):  # the sums are changed outside inference mode
        return {
            name: torch.zeros_like(
                parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False
            )
            for name, parameter in parameters.items()
        }
