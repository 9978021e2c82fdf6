"""Copies of networks, also of those that ``copy.deepcopy`` refuses."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

from delfast.errors import InputError, one_line

M = TypeVar("M", bound=nn.Module)


def copy_of(network: M) -> M:
    """Return a deep copy of a network, whose modules may keep computed tensors.

    ``copy.deepcopy`` refuses computed tensors, such as the last weight that ``torch.nn.utils.weight_norm`` and
    ``spectral_norm`` keep. Their values are copied; the copy's forward pass computes them again. Raises InputError for
    a network that cannot be copied.
    """
    computed = (
        value
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    )
    try:
        return copy.deepcopy(network, {id(value): value.detach().clone() for value in computed})
    except (RuntimeError, TypeError) as error:  # torch's for a computed tensor, Python's for a lock or a file
        raise InputError(
            f"expected a network that copy.deepcopy can copy, got one that it cannot ({one_line(error)}); delete "
            "attributes other than parameters and buffers"
        ) from error
