"""G, the mean gradient over a set of examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from delfast.batches import LossFn, evaluating, per_example_losses, warn_about_loader
from delfast.errors import InputError
from delfast.naming import trainable_parameters, unwrap


def mean_gradient(
    model: nn.Module, loader: Iterable[Any], loss_fn: LossFn | None = None, what: str = "forget set"
) -> tuple[dict[str, Tensor], int]:
    """G = (1/|S|) Σ ∇ℓ(x) over every example of ``loader`` once (DEL paper, section 3), and |S|.

    The model runs in eval mode, without its DDP and compile wrappers, and is left as it was: ``.grad``, modes,
    ``requires_grad``, hooks. Batches are summed and divided once, so the last short batch counts as what it is. Under
    DDP nothing is exchanged: give every process the whole set, and all get the same G.

    Returns plain name -> gradient, float32 (float64 for float64 parameters), shape of the parameter; zero for a
    parameter that the loss does not use. Raises InputError for an empty set and for labels out of range.
    """
    warn_about_loader(loader, what)
    network = unwrap(model)
    parameters = trainable_parameters(network)
    total = _zeros_like(parameters)
    examples = 0
    with evaluating(network), torch.inference_mode(False), torch.enable_grad():
        for batch in loader:
            losses = per_example_losses(network, batch, loss_fn)
            examples += losses.numel()
            # autograd.grad and not backward(): .grad and the hooks of optimizers on it stay out of this
            gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
            used = [(name, grad) for name, grad in zip(parameters, gradients, strict=True) if grad is not None]
            for name, grad in used:
                total[name] += grad
    if not examples:
        raise InputError(f"expected a {what} of at least one example, got none; check its loader")
    for grad in total.values():
        grad /= examples
    return total, examples


def _zeros_like(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums in float32 at least, in each parameter's own strides."""
    return {
        name: torch.zeros_like(
            parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False
        )
        for name, parameter in parameters.items()
    }
