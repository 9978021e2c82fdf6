"""Reset: masked entries back to a fresh initialization."""

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
from delfast.naming import plain_name, unique_parameters, unwrap
from delfast.seeding import seeded
from delfast.sole_use import used_alone

Init = Callable[[], nn.Module] | nn.Module | Mapping[str, Tensor] | Literal["reset_parameters"]
"""Where fresh values come from: a factory, a second model, a state dict, or modules' own ``reset_parameters``."""


@used_alone
@torch.no_grad()
def reset_(model: nn.Module, mask: Mask, init: Init, seed: int = 0) -> None:
    """θ_j ← θ⁰_j for every masked j, in place (DEL paper, section 3). Other entries and all buffers stay as they are.

    init: a factory, called under a private generator seeded with ``seed`` (the usual way, for a network's constructor
        may initialize differently from its modules' ``reset_parameters``: torchvision's ResNet-18 does); a second
        model; a state dict; or "reset_parameters", run on a copy of the model under the same generator. The values are
        those that follow ``torch.manual_seed(seed)``; torch's own generators are left alone. A seed that the factory
        sets itself has no effect here.
    seed: choose one that training did not begin from: a factory may give the values of that beginning again.

    Raises InputError, with nothing changed, if the mask is of another architecture or if ``init`` does not cover a
    masked parameter with the same shape.
    """
    check_type("mask", mask, Mask, "a delfast.Mask")
    seed = check_seed(seed)
    targets = dict(unique_parameters(unwrap(model).named_parameters()))
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
    """Plain name -> fresh values. A state dict may name a tied parameter by any of its names, so keep them all."""
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
    """The state dict of a fresh network, buffers included: of a factory, called as ``reset_`` does, or of a model.

    InputError for an ``init`` that is neither.
    """
    return _make_network(init, seed, "pass a factory of it, or a second model").state_dict()


def _make_network(init: Any, seed: int, advice: str) -> nn.Module:
    """The network that a factory makes under the seed, or the one given, without its wrappers."""
    if callable(init) and not isinstance(init, nn.Module):
        with seeded(seed):
            init = init()
    if not isinstance(init, nn.Module):
        raise InputError(f"expected init to make a whole network, got {type(init).__name__}; {advice}")
    return unwrap(init)


def _reset_parameters_of_copy(model: nn.Module, needed: list[str]) -> nn.Module:
    """A copy of ``model`` whose modules have reset themselves; InputError for a needed parameter of one that cannot."""
    fresh = copy_of(model)
    parameters = {plain_name(name): (name, parameter) for name, parameter in fresh.named_parameters()}
    owners = {name: fresh.get_submodule(parameters[name][0].rpartition(".")[0]) for name in needed}
    for name, owner in owners.items():
        if not callable(getattr(owner, "reset_parameters", None)):
            raise InputError(
                f"'{name}' belongs to a {type(owner).__name__}, which has no reset_parameters(); "
                "pass a factory of the network as init"
            )
        parameters[name][1].fill_(math.nan)  # what stays of it was not reset
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
