"""Bit patterns of a tensor, by which NaN equals itself and 0 differs from -0."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """Return the bit patterns as integers of the same shape; complex tensors have one more dimension, of size 2."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.contiguous().view(_BITS[real.element_size()])
