"""Which parameters compete: those whose names match the patterns of ``include`` and ``exclude``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from delfast.arguments import describe
from delfast.errors import InputError
from delfast.mask import Mask
from delfast.naming import plain_name

Patterns = str | Sequence[str]
"""A glob pattern of plain parameter names, or several: ``*`` stands for any characters, dots included."""


def check_patterns(include: Patterns | None, exclude: Patterns | None) -> dict[str, list[str]]:
    """Return the given patterns as lists, by "include" and "exclude". InputError for anything else than str."""
    given = {"include": include, "exclude": exclude}
    return {what: _as_list(what, patterns) for what, patterns in given.items() if patterns is not None}


def patterns_of(mask: Mask) -> dict[str, list[str]]:
    """Return the patterns with which the mask was localized, as ``check_patterns`` returned them."""
    return check_patterns(mask.metadata.get("include"), mask.metadata.get("exclude"))


def competing_parameters(
    network: nn.Module, parameters: Mapping[str, Tensor], patterns: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """Return those of the parameters, by plain name, that compete. InputError if none does, or on several devices.

    ``patterns`` are those of ``check_patterns``; a pattern that matches no parameter of the network, trainable or not,
    is an InputError.
    """
    kept = left_in(network, parameters, patterns)
    if not kept:
        raise InputError(
            "expected include and exclude to leave a trainable parameter, got patterns that leave none; widen include "
            "or narrow exclude"
        )
    _refuse_several_devices(kept)
    return kept


def _refuse_several_devices(parameters: Mapping[str, Tensor]) -> None:
    """Raise InputError unless the parameters, which are ranked together, are on one device."""
    places: dict[torch.device, str] = {}
    for name, parameter in parameters.items():
        places.setdefault(parameter.device, name)
    if len(places) > 1:
        found = ", ".join(f"'{name}' on {device}" for device, name in places.items())
        raise InputError(
            f"expected all parameters that compete on one device, got {found}; score a copy of the model on one "
            "device, and apply the mask to this one"
        )


def left_in(
    network: nn.Module, parameters: Mapping[str, Tensor], patterns: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """Return those of the parameters, by plain name, that the patterns leave in.

    One of its names must match a pattern of "include", if there are any, and none of its names a pattern of "exclude".
    A tied parameter has several names.
    """
    if not patterns:
        return dict(parameters)
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    for what, each in patterns.items():
        for pattern in each:
            if not any(_matches(known, [pattern]) for known in names.values()):
                raise InputError(
                    f"expected {what} to match names of parameters, such as '{next(iter(parameters), '')}', got "
                    f"'{pattern}', which matches none; fix it (* stands for any characters, dots included)"
                )
    include, exclude = patterns.get("include"), patterns.get("exclude", [])
    return {
        name: parameter
        for name, parameter in parameters.items()
        if (include is None or _matches(names[id(parameter)], include)) and not _matches(names[id(parameter)], exclude)
    }


def _matches(names: Collection[str], patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _as_list(what: str, patterns: Any) -> list[str]:
    found = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(found, (list, tuple)) or not all(isinstance(pattern, str) for pattern in found):
        raise InputError(
            f"expected {what} to be a pattern of parameter names or a list of patterns, got {describe(patterns)}; pass "
            "str, such as '*.mlp.*'"
        )
    return list(found)
