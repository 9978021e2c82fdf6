"""Copies of networks."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

from delfast.errors import InputError
from delfast.files import one_line

M = TypeVar("M", bound=nn.Module)


def copy_of(network: M) -> M:
    """``copy.deepcopy``, also of a network whose modules keep computed tensors, which ``deepcopy`` refuses.

    ``torch.nn.utils.weight_norm`` and ``spectral_norm`` keep the weight that they computed last. Its value is copied; a
    forward pass of the copy computes the weight again. InputError, in one line, for a network that cannot be copied.
    """
    computed = (
        value
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    )
    try:
        return copy.deepcopy(network, {id(value): value.detach().clone() for value in computed})
    except (RuntimeError, TypeError) as error:  # of torch for a computed tensor; of Python for a lock or a file
        raise InputError(
            f"expected a network that copy.deepcopy can copy, it cannot ({one_line(error)}); delete what it keeps "
            "besides parameters and buffers"
        ) from error
