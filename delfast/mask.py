"""Mask: which parameters are selected. Packed bits, one per channel where whole channels are, else one per element."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from delfast.arguments import check_device, check_names, check_path, check_type
from delfast.errors import InputError
from delfast.files import one_line
from delfast.mask_file import FORMAT_VERSION, read_mask, write_mask
from delfast.naming import plain_name
from delfast.ops.layout import pack, row_length, unit_count, unpack

Unit = Literal["row", "element"]


@dataclass(frozen=True, eq=False)
class ParameterMask:
    """The selected part of one parameter: packed bits over its rows (output channels) or over its elements.

    Rows are the slices along ``dim``: 0, except for layers that keep their outputs elsewhere. A parameter with
    ndim <= 1 has rows of one element, so its unit is always "row". ``bits`` is uint8, as in delfast.ops.layout: one
    bit per row, or one per element in row-major order of ``shape``, the parameter's own.
    """

    shape: tuple[int, ...]
    unit: Unit
    bits: Tensor
    dim: int = 0

    @property
    def units(self) -> int:
        """Number of bits that count: rows or elements."""
        return unit_count(self.shape, self.dim) if self.unit == "row" else self.numel

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def channel_count(self) -> int:
        """Number of channels, selected or not; a parameter with ndim <= 1 has none."""
        return self.shape[self.dim] if len(self.shape) > 1 else 0

    @cached_property
    def flags(self) -> Tensor:
        """bool (units,)."""
        return unpack(self.bits, self.units)

    @cached_property
    def selected(self) -> int:
        """Number of selected scalars."""
        return int(self.flags.sum()) * (row_length(self.shape, self.dim) if self.unit == "row" else 1)

    @cached_property
    def channels(self) -> int:
        """Number of whole channels of a parameter with ndim > 1 that are selected."""
        if len(self.shape) <= 1 or not self.numel:
            return 0
        return int((self.flags if self.unit == "row" else _rows(self.dense(), self.dim).all(dim=1)).sum())

    def dense(self) -> Tensor:
        """bool, the parameter's shape."""
        if self.unit == "element" or len(self.shape) <= 1 or not self.numel:
            return self.flags.reshape(self.shape)
        sizes = [-1 if dim == self.dim else 1 for dim in range(len(self.shape))]
        return self.flags.reshape(sizes).expand(self.shape).contiguous()

    def elements(self) -> ParameterMask:
        """The same selection with one bit per element."""
        if self.unit == "element":
            return self
        return replace(self, unit="element", bits=pack(self.dense()))

    @property
    def by_row(self) -> bool:
        """What a bit stands for to the masked ops: a row of several elements, or one element."""
        return self.unit == "row" and row_length(self.shape, self.dim) != 1

    @property
    def for_ops(self) -> ParameterMask:
        """The same selection as the masked ops take it: they know rows along dim 0, and single elements.

        So a parameter with its channels along another dimension is changed where it is, without a transposed copy.
        """
        return self if self.dim == 0 else self.elements()


def from_flags(shape: tuple[int, ...], flags: Tensor, dim: int = 0) -> ParameterMask:
    """Return the most compact ParameterMask of a bool tensor of this shape: by rows if each is all or nothing.

    dim: the dimension of the parameter along which its channels lie.
    """
    rows = _rows(flags.reshape(shape), dim) if len(shape) > 1 and flags.numel() else flags.reshape(-1, 1)
    whole = rows.all(dim=1)
    if torch.equal(whole, rows.any(dim=1)):
        return ParameterMask(shape, "row", pack(whole), dim)
    return ParameterMask(shape, "element", pack(flags), dim)


def _rows(flags: Tensor, dim: int) -> Tensor:
    """(rows, elements of a row) of a dense mask with ndim > 1."""
    return flags.movedim(dim, 0).flatten(1)


@dataclass(frozen=True)
class LayerRow:
    """One line of Mask.table(): what is selected of one parameter."""

    name: str
    shape: tuple[int, ...]
    selected: int
    total: int
    channels: int
    of_channels: int


@dataclass(frozen=True, eq=False)
class Mask:
    """Which parameters of a network are selected: a value; every operation returns a new one.

    ``parameters``: plain parameter name (no ``module.`` or ``_orig_mod.``) -> ParameterMask, in the model's order,
    every trainable parameter included. ``metadata``: criterion, granularity, aggregate, budget, ... and provenance;
    plain JSON values.
    """

    parameters: Mapping[str, ParameterMask]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.parameters)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: part.shape for name, part in self.parameters.items()}

    @cached_property
    def selected(self) -> int:
        """Number of selected scalars."""
        return sum(part.selected for part in self.parameters.values())

    @cached_property
    def total(self) -> int:
        """P: number of scalars that competed."""
        return sum(part.numel for part in self.parameters.values())

    @cached_property
    def channels(self) -> int:
        """Number of whole channels (rows of parameters with ndim > 1) selected."""
        return sum(part.channels for part in self.parameters.values())

    @property
    def fraction(self) -> float:
        """selected / total, at most the budget."""
        return self.selected / self.total if self.total else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the packed bits."""
        return sum(part.bits.numel() for part in self.parameters.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the selection alone: names, shapes and dense bits. Metadata and packing do not count."""
        total = hashlib.sha256()
        for name in sorted(self.parameters):
            part = self.parameters[name]
            total.update(f"{name} {part.shape}".encode() + b"\0")
            total.update(part.elements().bits.cpu().numpy().tobytes())
        return total.hexdigest()

    def __repr__(self) -> str:
        return f"Mask({self.selected} of {self.total} parameters, {self.channels} channels, digest {self.digest[:12]})"

    def __getitem__(self, name: str) -> ParameterMask:
        check_type("a parameter's name", name, str, "a str")
        return self.parameters[plain_name(name)]

    def __contains__(self, name: str) -> bool:
        return isinstance(name, str) and plain_name(name) in self.parameters

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its bits on ``device``; itself if they are there."""
        device = check_device(device)
        if all(part.bits.device == device for part in self.parameters.values()):
            return self
        moved = {name: replace(part, bits=part.bits.to(device)) for name, part in self.parameters.items()}
        return Mask(moved, self.metadata)

    def match(self, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, ParameterMask]]:
        """(name, parameter, its mask) for every parameter with anything selected, checked against ``named``.

        Raises InputError, before yielding, if a selected one is missing from ``named``, frozen, or of another shape.
        """
        check_type("named", named, Mapping, "a mapping from names to parameters")
        found = []
        for name, part in self.parameters.items():
            if not part.selected:
                continue
            if name not in named:
                raise InputError(
                    f"mask selects entries of '{name}', which the model does not have; "
                    "pass the mask of this architecture (and its trainable parameters)"
                )
            self._check_shape(name, part, named[name])
            if isinstance(named[name], torch.nn.Parameter) and not named[name].requires_grad:
                raise InputError(
                    f"mask selects entries of '{name}', which is frozen (requires_grad=False); "
                    "unfreeze it, or localize the model as it is now"
                )
            found.append((name, named[name], part))
        return iter(found)

    @staticmethod
    def _check_shape(name: str, part: ParameterMask, parameter: Tensor) -> None:
        if tuple(parameter.shape) == part.shape:
            return
        channels = parameter.shape[part.dim] if 1 < len(part.shape) == parameter.ndim else part.channel_count
        if channels != part.channel_count:
            text = f"mask for '{name}' has {part.channel_count} channels, the parameter has {channels}"
        else:
            text = f"mask for '{name}' has shape {part.shape}, the parameter has {tuple(parameter.shape)}"
        raise InputError(f"{text}; pass the mask of this architecture")

    # Set operations, on masks of the same parameters. Where channels lie is as in ``self``.

    def union(self, other: Mask) -> Mask:
        """Entries selected by either."""
        return self._combine(other, torch.bitwise_or, "union")

    def intersection(self, other: Mask) -> Mask:
        """Entries selected by both."""
        return self._combine(other, torch.bitwise_and, "intersection")

    def jaccard(self, other: Mask) -> float:
        """|intersection| / |union| over scalars, in [0, 1]; 1 for two empty masks."""
        either = self.union(other).selected
        return self.intersection(other).selected / either if either else 1.0

    def _combine(self, other: Mask, combine: Callable[[Tensor, Tensor], Tensor], how: str) -> Mask:
        check_type("the other mask", other, Mask, "a delfast.Mask")
        if self.shapes != other.shapes:
            different = set(self.shapes.items()) ^ set(other.shapes.items())
            raise InputError(
                f"expected two masks of the same parameters, they differ in {sorted({n for n, _ in different})[:3]}; "
                "pass masks of one architecture"
            )
        parts = {}
        for name, mine in self.parameters.items():
            theirs = other.parameters[name]
            if (mine.unit, mine.dim) != (theirs.unit, theirs.dim):
                mine, theirs = mine.elements(), theirs.elements()
            parts[name] = replace(mine, bits=combine(mine.bits, theirs.bits.to(mine.bits.device)))
        return Mask(parts, {"made_by": how, "of": [dict(self.metadata), dict(other.metadata)]})

    def widen(
        self, names: list[str], shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, int] | None = None
    ) -> Mask:
        """Return this mask with the parameters ``names`` selected in full (the classifier head, for a finetune).

        dims: name -> the dimension of its channels; by default as in this mask, and 0 for a new name.
        """
        check_names("names", names)
        check_type("shapes", shapes, Mapping, "a mapping from names to shapes")
        for name in names:
            if name not in shapes:
                raise InputError(f"expected shapes to have '{name}', it does not; pass the shape of each name")
        parts = dict(self.parameters)
        for name in names:
            if name in parts and parts[name].shape != tuple(shapes[name]):
                raise InputError(
                    f"mask for '{name}' has shape {parts[name].shape}, the parameter has {tuple(shapes[name])}; "
                    "pass the mask of this architecture"
                )
            shape = tuple(shapes[name])
            dim = (dims or {}).get(name, parts[name].dim if name in parts else 0)
            flags = torch.ones(unit_count(shape, dim), dtype=torch.bool, device="cpu")
            parts[name] = ParameterMask(shape, "row", pack(flags), dim)
        return Mask(parts, {**self.metadata, "widened_by": list(names)})

    def table(self) -> list[LayerRow]:
        """What is selected of each parameter, in the model's order."""
        return [
            LayerRow(
                name,
                part.shape,
                part.selected,
                part.numel,
                part.channels,
                part.channel_count,
            )
            for name, part in self.parameters.items()
        ]

    # Other forms

    @classmethod
    def from_dense(
        cls,
        dense: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        dims: Mapping[str, int] | None = None,
    ) -> Mask:
        """Build a mask from name -> 0/1 tensor, the form that SalUn's and the DEL authors' code write and read.

        dense: tensors of any layout, or numpy arrays, of any dtype whose values are 0 and 1. Wrapper prefixes of the
            names are removed.
        dims: plain name -> the dimension along which a parameter's channels lie, 0 by default.

        Raises InputError for other values, for anything that is no tensor (None for a parameter without a mask), and
        for two names of one parameter.
        """
        if not isinstance(dense, Mapping):
            raise InputError(f"expected a dict (name -> 0/1 tensor), got {type(dense).__name__}; pass the inner dict")
        parts: dict[str, ParameterMask] = {}
        for key, value in dense.items():
            name = plain_name(str(key))
            if name in parts:
                raise InputError(f"expected one mask for '{name}', got two (with and without a prefix); leave one out")
            flags, dim = _flags(name, value), (dims or {}).get(name, 0)
            if not 0 <= dim < max(1, flags.ndim):
                raise InputError(f"expected a dim of '{name}' in [0, {max(1, flags.ndim)}), got {dim}; fix dims")
            parts[name] = from_flags(tuple(flags.shape), flags, dim)
        return cls(parts, dict(metadata or {}))

    def to_dense(self, dtype: torch.dtype = torch.bool) -> dict[str, Tensor]:
        """name -> 0/1 tensor of the parameter's shape (SalUn's files hold int64)."""
        check_type("dtype", dtype, torch.dtype, "a torch.dtype")
        return {name: part.dense().to(dtype) for name, part in self.parameters.items()}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all: the packed bits, the metadata, and a digest over both.

        The same mask gives the same bytes. Raises InputError for metadata without a JSON form (numpy's numbers become
        Python's), and OSError with the file's name where it cannot be written.
        """
        fields = {name: (part.shape, part.unit, part.bits, part.dim) for name, part in self.parameters.items()}
        write_mask(Path(check_path("path", path)), FORMAT_VERSION, fields, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read what save() wrote, of this format or of an older one.

        Everything in the file is checked before it is used. Raises InputError if the file is missing, truncated,
        altered, or no mask.
        """
        parts, metadata = read_mask(Path(check_path("path", path)))
        return cls({name: ParameterMask(*fields) for name, fields in parts.items()}, metadata)


def _flags(name: str, value: Any) -> Tensor:
    """bool, from a tensor or an array of zeros and ones; InputError for anything else."""
    try:
        # a copy: torch takes no array of negative strides, and warns of one that is read-only
        tensor = torch.as_tensor(numpy.array(value) if isinstance(value, numpy.ndarray) else value)
        dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
        flags = dense != 0
        binary = torch.equal(flags.to(dense.dtype), dense)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"expected a tensor of zeros and ones for '{name}', got a {type(value).__name__} ({one_line(error)}); "
            "leave a parameter without a mask out"
        ) from None
    if not binary:
        raise InputError(f"expected a mask of zeros and ones for '{name}', got other values; threshold it first")
    return flags
