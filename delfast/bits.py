"""Bit patterns of a tensor, by which NaN equals itself and 0 differs from -0."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = {"cpu": 2**16}  # elements that are hashed at a time: few enough for a cache
_LARGEST_PIECE = 2**21  # elsewhere, where each piece costs launches
_FACTORS = (-7046029254386353131, -4658895280553007687)  # odd: 0x9E3779B97F4A7C15 and 0xBF58476D1CE4E5B9 as int64


def bits(tensor: Tensor) -> Tensor:
    """Return the bit patterns as integers of the same shape; complex tensors have one more dimension, of size 2."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.contiguous().view(_BITS[real.element_size()])


def checksum(tensor: Tensor) -> Tensor:
    """Return a checksum of a tensor's values and of their order: int64 (), on its device, the same on every device.

    It is the sum modulo 2**64 of a hash of each bit pattern and its place, as in the finalizer of splitmix64.
    """
    flat = bits(tensor.detach()).flatten()
    size = _PIECE.get(flat.device.type, _LARGEST_PIECE)
    keys = torch.arange(min(size, len(flat)), device=flat.device) * _FACTORS[0]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, piece in enumerate(torch.split(flat, size) if len(flat) else ()):
        mixed = piece + keys[: len(piece)]  # int64
        mixed += _wrapped(number * size * _FACTORS[0])
        mixed ^= mixed >> 29
        mixed *= _FACTORS[1]
        mixed ^= mixed >> 32
        total += mixed.sum()
    return total


def _wrapped(number: int) -> int:
    """Return an integer modulo 2**64 as int64."""
    return (number + 2**63) % 2**64 - 2**63
