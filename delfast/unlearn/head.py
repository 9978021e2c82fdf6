"""Which layer is the classifier head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from delfast.batches import LossFn, device_of, evaluating, inputs_and_targets, per_example_losses
from delfast.errors import InputError
from delfast.naming import unique_parameters, unwrap


def find_head(model: nn.Module, batch: Any, loss_fn: LossFn | None = None) -> str:
    """The name of the Linear that makes the logits: the last one that runs in a forward pass on ``batch``.

    InputError if no Linear runs (name the head then).
    """
    network = unwrap(model)
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with evaluating(network), torch.no_grad():
            if loss_fn is None:
                network(inputs_and_targets(batch, device_of(network))[0])
            else:
                per_example_losses(network, batch, loss_fn)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise InputError("expected a Linear that makes the logits, none ran; name the classifier head: head='...'")
    return ran[-1]


def head_parameters(model: nn.Module, head: str) -> dict[str, Tensor]:
    """The head's trainable parameters by plain name. InputError if the model has no module of this name."""
    network = unwrap(model)
    modules = dict(network.named_modules())
    if head not in modules:
        raise InputError(f"expected head to be a module of the model, got '{head}'; pass one of its names")
    own = {id(parameter) for parameter in modules[head].parameters()}
    return {
        name: parameter
        for name, parameter in unique_parameters(network.named_parameters())
        if id(parameter) in own and parameter.requires_grad
    }
