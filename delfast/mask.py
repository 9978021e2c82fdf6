"""Mask: which parameters are selected. Packed bits, one per channel where whole channels are, else one per element."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from delfast.arguments import check_device, check_names, check_path, check_type
from delfast.errors import InputError
from delfast.files import one_line, write_atomically
from delfast.naming import plain_name
from delfast.ops.layout import pack, packed_bytes, row_length, unit_count, unpack

FORMAT_VERSION = 1

Unit = Literal["row", "element"]


@dataclass(frozen=True, eq=False)
class ParameterMask:
    """The selected part of one parameter: packed bits over its rows (output channels) or over its elements.

    A parameter with ndim <= 1 has rows of one element, so its unit is always "row". ``bits`` is uint8, as in
    delfast.ops.layout.
    """

    shape: tuple[int, ...]
    unit: Unit
    bits: Tensor

    @property
    def units(self) -> int:
        """How many bits count: rows or elements."""
        numel = unit_count(self.shape) * row_length(self.shape)
        return unit_count(self.shape) if self.unit == "row" else numel

    @property
    def numel(self) -> int:
        return unit_count(self.shape) * row_length(self.shape)

    @cached_property
    def flags(self) -> Tensor:
        """bool (units,)."""
        return unpack(self.bits, self.units)

    @cached_property
    def selected(self) -> int:
        """How many scalars are selected."""
        return int(self.flags.sum()) * (row_length(self.shape) if self.unit == "row" else 1)

    @cached_property
    def channels(self) -> int:
        """How many whole rows of a parameter with ndim > 1 are selected."""
        if len(self.shape) <= 1 or not self.numel:
            return 0
        return int(self.flags.sum() if self.unit == "row" else self.flags.view(self.shape[0], -1).all(dim=1).sum())

    def dense(self) -> Tensor:
        """bool, the parameter's shape."""
        if self.unit == "element" or len(self.shape) <= 1 or not self.numel:
            return self.flags.reshape(self.shape)
        return self.flags.reshape(-1, *[1] * (len(self.shape) - 1)).expand(self.shape).contiguous()

    def elements(self) -> ParameterMask:
        """The same selection with one bit per element."""
        return self if self.unit == "element" else ParameterMask(self.shape, "element", pack(self.dense()))

    @property
    def by_row(self) -> bool:
        """What a bit stands for to the masked ops: a row of several elements, or one element."""
        return self.unit == "row" and row_length(self.shape) != 1


def from_flags(shape: tuple[int, ...], flags: Tensor) -> ParameterMask:
    """The most compact ParameterMask of a bool tensor of this shape: by rows if every row is all or nothing."""
    rows = flags.reshape(unit_count(shape), row_length(shape)) if flags.numel() else flags.reshape(0, 1)
    whole = rows.all(dim=1)
    if torch.equal(whole, rows.any(dim=1)):
        return ParameterMask(shape, "row", pack(whole))
    return ParameterMask(shape, "element", pack(flags))


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
        return self._map(lambda part: ParameterMask(part.shape, part.unit, part.bits.to(device)))

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
        if len(part.shape) > 1 and parameter.ndim > 1 and parameter.shape[0] != part.shape[0]:
            text = f"mask for '{name}' has {part.shape[0]} channels, the parameter has {parameter.shape[0]}"
        else:
            text = f"mask for '{name}' has shape {part.shape}, the parameter has {tuple(parameter.shape)}"
        raise InputError(f"{text}; pass the mask of this architecture")

    # Set operations, on masks of the same parameters

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
            if mine.unit != theirs.unit:
                mine, theirs = mine.elements(), theirs.elements()
            parts[name] = ParameterMask(mine.shape, mine.unit, combine(mine.bits, theirs.bits.to(mine.bits.device)))
        return Mask(parts, {"made_by": how, "of": [dict(self.metadata), dict(other.metadata)]})

    def widen(self, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Mask:
        """This mask with the parameters ``names`` selected in full (the classifier head, for a finetune)."""
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
            parts[name] = ParameterMask(shape, "row", pack(torch.ones(unit_count(shape), dtype=torch.bool)))
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
                part.shape[0] if len(part.shape) > 1 else 0,
            )
            for name, part in self.parameters.items()
        ]

    # Other forms

    @classmethod
    def from_dense(cls, dense: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> Mask:
        """From name -> 0/1 tensor, the form that SalUn's and the DEL authors' code write and read.

        Any dtype whose values are 0 and 1; other values raise InputError. Wrapper prefixes are removed.
        """
        parts = {}
        for name, value in dense.items():
            flags = value != 0
            if not torch.equal(flags.to(value.dtype), value):
                raise InputError(
                    f"expected a mask of zeros and ones for '{name}', got other values; threshold it first"
                )
            parts[plain_name(name)] = from_flags(tuple(value.shape), flags)
        return cls(parts, dict(metadata or {}))

    def to_dense(self, dtype: torch.dtype = torch.bool) -> dict[str, Tensor]:
        """name -> 0/1 tensor of the parameter's shape (SalUn's files hold int64)."""
        check_type("dtype", dtype, torch.dtype, "a torch.dtype")
        return {name: part.dense().to(dtype) for name, part in self.parameters.items()}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all: the packed bits, the metadata, and a digest over both."""
        tensors = {name: part.bits.cpu() for name, part in self.parameters.items() if part.bits.numel()}
        header = {
            "version": FORMAT_VERSION,
            "parameters": {
                name: {"shape": list(part.shape), "unit": part.unit} for name, part in self.parameters.items()
            },
            "metadata": dict(self.metadata),
        }
        text = json.dumps(header)
        delfast = {"delfast_mask": text, "digest": _file_digest(text, tensors)}
        write_atomically(Path(check_path("path", path)), lambda partial: save_file(tensors, partial, metadata=delfast))

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read what save() wrote. InputError if the file is missing, truncated, altered, or no mask."""
        text, digest, tensors = _read(Path(check_path("path", path)))
        if digest != _file_digest(text, tensors):
            raise InputError(f"mask file '{path}' was altered or damaged (its digest does not match); make it anew")
        header = json.loads(text)
        if header["version"] != FORMAT_VERSION:
            raise InputError(
                f"mask file '{path}' has format version {header['version']}, this delfast reads {FORMAT_VERSION}; "
                "make the mask anew, or install a delfast that reads it"
            )
        parts = {}
        for name, entry in header["parameters"].items():
            bits = tensors.get(name, torch.empty(0, dtype=torch.uint8))
            part = ParameterMask(tuple(entry["shape"]), entry["unit"], bits)
            if bits.dtype != torch.uint8 or bits.numel() != packed_bytes(part.units):
                raise InputError(f"mask file '{path}' holds no packed bits for '{name}'; make it anew")
            parts[name] = part
        return cls(parts, header["metadata"])

    def _map(self, change: Callable[[ParameterMask], ParameterMask]) -> Mask:
        return Mask({name: change(part) for name, part in self.parameters.items()}, self.metadata)


def _read(path: Path) -> tuple[str, str, dict[str, Tensor]]:
    """The header's JSON text, the digest and the tensors of a mask file."""
    if not path.is_file():
        raise InputError(f"expected a mask file at '{path}', there is none; check the path")
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"'{path}' is no whole mask file ({one_line(error)}); make it anew") from None
    if "delfast_mask" not in metadata or "digest" not in metadata:
        raise InputError(f"'{path}' is a safetensors file, but no delfast mask; pass what Mask.save() wrote")
    return metadata["delfast_mask"], metadata["digest"], tensors


def _file_digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over everything in the file: the header's text, and each tensor's name, dtype and bytes."""
    total = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        total.update(f"\0{name} {tensors[name].dtype}\0".encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()
