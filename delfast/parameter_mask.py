"""ParameterMask: the selected part of one parameter, as packed bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from delfast.ops.layout import channels_first, pack, row_length, unit_count, unpack
from delfast.sharding import is_dtensor, local_part, part_of, rows_of

Unit = Literal["row", "element"]


@dataclass(frozen=True, eq=False)
class ParameterMask:
    """The selected part of one parameter: packed bits over its units, rows or elements.

    A row has the elements of one channel, a slice along ``dim``. A parameter with ndim <= 1 has rows of one element.

    Parameters
    ----------
    shape : tuple of int
        The parameter's shape.
    unit : {"row", "element"}
        The unit that one bit stands for; always "row" for a parameter with ndim <= 1.
    bits : Tensor
        Packed bits: uint8 (ceil(units / 8),), least significant bit first; the bits past the last unit are zero.
        Elements are in row-major order of ``shape``.
    dim : int, default 0
        The dimension along which the channels lie; not 0 for layers that store their weight as (in, out).

    Examples
    --------
    >>> import torch
    >>> from delfast.parameter_mask import ParameterMask
    >>> part = ParameterMask((3, 2), "row", torch.tensor([0b101], dtype=torch.uint8))
    >>> part.channels, part.selected
    (2, 4)
    >>> part.dense().tolist()
    [[True, True], [False, False], [True, True]]
    """

    shape: tuple[int, ...]
    unit: Unit
    bits: Tensor
    dim: int = 0

    @property
    def units(self) -> int:
        """Number of units, rows or elements: each has a bit."""
        return unit_count(self.shape, self.dim) if self.unit == "row" else self.numel

    @property
    def numel(self) -> int:
        """Number of elements, selected or not."""
        return math.prod(self.shape)

    @property
    def channel_count(self) -> int:
        """Number of channels, selected or not; a parameter with ndim <= 1 has none."""
        return self.shape[self.dim] if len(self.shape) > 1 else 0

    @cached_property
    def flags(self) -> Tensor:
        """Unpacked bits: bool (units,)."""
        return unpack(self.bits, self.units)

    @cached_property
    def selected(self) -> int:
        """Number of selected elements."""
        return int(self.flags.sum()) * (row_length(self.shape, self.dim) if self.unit == "row" else 1)

    @cached_property
    def channels(self) -> int:
        """Number of whole channels of a parameter with ndim > 1 that are selected."""
        if len(self.shape) <= 1 or not self.numel:
            return 0
        return int((self.flags if self.unit == "row" else _rows(self.dense(), self.dim).all(dim=1)).sum())

    def dense(self) -> Tensor:
        """Return the selection as a dense mask.

        Returns
        -------
        Tensor
            Of dtype bool and the parameter's shape, on the device of ``bits``.
        """
        if self.unit == "element" or len(self.shape) <= 1 or not self.numel:
            return self.flags.reshape(self.shape)
        sizes = [-1 if dim == self.dim else 1 for dim in range(len(self.shape))]
        return self.flags.reshape(sizes).expand(self.shape).contiguous()

    def elements(self) -> ParameterMask:
        """Return the selection with one bit per element.

        Returns
        -------
        ParameterMask
            ``unit`` is "element"; this object itself if its unit is "element" already.
        """
        if self.unit == "element":
            return self
        return replace(self, unit="element", bits=pack(self.dense()))

    def part_of(self, parameter: Tensor) -> ParameterMask:
        """Return the mask of the part of a parameter that this process holds; nothing is exchanged.

        Parameters
        ----------
        parameter : Tensor
            The parameter, of this mask's shape: a DTensor, or a plain tensor, which is held as a whole.

        Returns
        -------
        ParameterMask
            Its shape is that of the part, which may be empty. It has the same unit: a row mask of a parameter that is
            split along another dimension than its channels has a bit for each row that this process holds a part of.
            This object itself for a plain tensor.
        """
        if not is_dtensor(parameter):
            return self
        shape = tuple(local_part(parameter).shape)
        if self.unit == "row" and shape:
            flags = rows_of(self.flags, parameter, self.dim)[: unit_count(shape, self.dim)]  # no units if it is empty
        else:
            flags = part_of(self.dense(), parameter)
        return replace(self, shape=shape, bits=pack(flags))

    @property
    def by_row(self) -> bool:
        """Whether a bit stands for a row of several elements; the masked ops treat any other bit as one element."""
        return self.unit == "row" and row_length(self.shape, self.dim) != 1

    @property
    def for_ops(self) -> ParameterMask:
        """The selection in a form that the masked ops accept: rows along dim 0, or single elements.

        Channels along another dimension become elements, so the ops need no transposed copy of the parameter.
        """
        return self if self.dim == 0 else self.elements()


def from_flags(shape: tuple[int, ...], flags: Tensor, dim: int = 0) -> ParameterMask:
    """Return the most compact ParameterMask of a bool tensor of this shape: by row if no row is selected in part.

    ``dim`` is the dimension along which the parameter's channels lie.
    """
    rows = _rows(flags.reshape(shape), dim) if len(shape) > 1 and flags.numel() else flags.reshape(-1, 1)
    whole = rows.all(dim=1)
    if torch.equal(whole, rows.any(dim=1)):
        return ParameterMask(shape, "row", pack(whole), dim)
    return ParameterMask(shape, "element", pack(flags), dim)


def _rows(flags: Tensor, dim: int) -> Tensor:
    """Reshape a dense mask with ndim > 1 to (rows, elements of a row)."""
    return channels_first(flags, dim).flatten(1)
