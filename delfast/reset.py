"""Reset masked entries to a new initialization."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from delfast.arguments import check_seed, check_type
from delfast.copies import copy_of
from delfast.errors import InputError
from delfast.mask import Mask
from delfast.naming import model_parameters, plain_name, unwrap
from delfast.seeding import seeded
from delfast.sole_use import used_alone

Init = Callable[[], nn.Module] | nn.Module | Mapping[str, Tensor] | Literal["reset_parameters"]
"""Source of new values: a factory, a second model, a state dict, or the modules' own ``reset_parameters``."""


@used_alone
@torch.no_grad()
def reset_(model: nn.Module, mask: Mask, init: Init, seed: int = 0) -> None:
    """Set the masked entries of a model to newly initialized values, in place: θ_j ← θ⁰_j for every masked j.

    Other entries and all buffers stay as they are.

    Parameters
    ----------
    model : torch.nn.Module
        The network to change.
    mask : Mask
        The entries to reset.
    init : callable, torch.nn.Module, Mapping of str to Tensor, or "reset_parameters"
        Source of the new values. A factory is called without arguments under a private generator seeded with ``seed``.
        Prefer a factory: a network's constructor may initialize differently from its modules' ``reset_parameters``, as
        torchvision's ResNet-18 does. "reset_parameters" calls these on a copy of the model under the same generator. A
        second model or a state dict supplies its own values.
    seed : int, default 0
        Seed in [0, 2^64). Choose one that training did not begin from, or a factory returns that beginning again. The
        values are those that follow ``torch.manual_seed(seed)``; torch's own generators are neither read nor changed.
        A seed that the factory sets itself has no effect.

    Raises
    ------
    InputError
        If the mask is of another architecture, or if ``init`` lacks a masked parameter or has it in another shape.
        Nothing is changed then.

    References
    ----------
    Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization", TMLR 2025,
    arXiv 2412.02432, section 3.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> model = torch.nn.Linear(2, 2)
    >>> mask = delfast.Mask.from_dense({"weight": torch.tensor([[1, 1], [0, 0]]), "bias": torch.tensor([0, 0])})
    >>> before = model.weight.detach().clone()
    >>> delfast.reset_(model, mask, lambda: torch.nn.Linear(2, 2), seed=1)
    >>> (model.weight != before).tolist()
    [[True, True], [False, False]]
    """
    check_type("mask", mask, Mask, "a delfast.Mask")
    seed = check_seed(seed)
    targets = model_parameters(unwrap(model))
    selected = [(name, parameter, part.for_ops) for name, parameter, part in mask.match(targets)]
    fresh = _fresh_values(model, init, seed, [name for name, _, _ in selected])
    for name, parameter, _ in selected:
        if name not in fresh:
            raise InputError(f"expected fresh values for '{name}', init has none; pass a factory of the same network")
        if fresh[name].shape != parameter.shape:
            raise InputError(
                f"expected fresh values for '{name}' of shape {tuple(parameter.shape)}, got "
                f"{tuple(fresh[name].shape)}; pass a factory of the same network"
            )
    for device in {parameter.device for _, parameter, _ in selected}:
        here = [entry for entry in selected if entry[1].device == device]
        torch.ops.delfast.masked_reset_(
            [parameter for _, parameter, _ in here],
            [fresh[name].to(parameter) for name, parameter, _ in here],
            torch.cat([part.bits.to(device) for _, _, part in here]),
            [part.by_row for _, _, part in here],
        )


def _fresh_values(model: nn.Module, init: Any, seed: int, needed: list[str]) -> dict[str, Tensor]:
    """Return new values by plain name. A state dict may name a tied parameter by any of its names, so keep them all."""
    if isinstance(init, Mapping):
        if not all(isinstance(value, Tensor) for value in init.values()):
            raise InputError("expected init to be a state dict (name -> tensor), got other values; pass the inner dict")
        return {plain_name(name): value.detach() for name, value in init.items()}
    if isinstance(init, str) and init == "reset_parameters":
        with seeded(seed):
            fresh = _reset_parameters_of_copy(unwrap(model), needed)
    else:
        fresh = _make_network(init, seed, "pass a factory, a model or a state dict")
    named = fresh.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter.detach() for name, parameter in named}


def fresh_state(init: Init, seed: int) -> dict[str, Tensor]:
    """Return the state dict, buffers included, of a model or of the network that a factory makes as in ``reset_``.

    Raises InputError for an ``init`` that is neither.
    """
    return _make_network(init, seed, "pass a factory of it, or a second model").state_dict()


def _make_network(init: Any, seed: int, advice: str) -> nn.Module:
    """Return, without its wrappers, the given network or the one that the given factory makes under the seed."""
    if callable(init) and not isinstance(init, nn.Module):
        with seeded(seed):
            init = init()
    if not isinstance(init, nn.Module):
        raise InputError(f"expected init to make a whole network, got {type(init).__name__}; {advice}")
    return unwrap(init)


def _reset_parameters_of_copy(model: nn.Module, needed: list[str]) -> nn.Module:
    """Copy ``model`` and reset the copy's modules; InputError if a needed parameter is not reset by its module."""
    fresh = copy_of(model)
    parameters = {plain_name(name): (name, parameter) for name, parameter in fresh.named_parameters()}
    owners = {name: fresh.get_submodule(parameters[name][0].rpartition(".")[0]) for name in needed}
    for name, owner in owners.items():
        if not callable(getattr(owner, "reset_parameters", None)):
            raise InputError(
                f"'{name}' belongs to a {type(owner).__name__}, which has no reset_parameters(); "
                "pass a factory of the network as init"
            )
        parameters[name][1].fill_(math.nan)  # NaN that remains afterwards shows what was not reset
    for module in fresh.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    now = {plain_name(name): parameter for name, parameter in fresh.named_parameters()}
    for name, owner in owners.items():
        if name not in now or bool(now[name].isnan().any()):
            raise InputError(
                f"expected reset_parameters() of the {type(owner).__name__} to reset '{name}', it does not; pass a "
                "factory of the network as init"
            )
    return fresh
