"""Mask: the selected elements of a network's parameters, with set operations, dense forms and files."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from delfast.arguments import check_device, check_names, check_path, check_type
from delfast.errors import InputError, one_line
from delfast.mask_file import FORMAT_VERSION, read_mask, write_mask
from delfast.naming import plain_name
from delfast.ops.layout import pack, unit_count
from delfast.parameter_mask import ParameterMask, from_flags
from delfast.sharding import is_dtensor


@dataclass(frozen=True)
class LayerRow:
    """One line of ``Mask.table()``: how much of one parameter is selected.

    Parameters
    ----------
    name : str
        The parameter's plain name.
    shape : tuple of int
        The parameter's shape.
    selected : int
        Number of selected elements.
    total : int
        Number of elements.
    channels : int
        Number of whole channels selected.
    channel_count : int
        Number of channels; 0 for a parameter with ndim <= 1.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> mask = delfast.Mask.from_dense({"weight": torch.tensor([[1, 1], [0, 0], [0, 1]])})
    >>> mask.table()
    [LayerRow(name='weight', shape=(3, 2), selected=3, total=6, channels=1, channel_count=3)]
    """

    name: str
    shape: tuple[int, ...]
    selected: int
    total: int
    channels: int
    channel_count: int

    @property
    def of_channels(self) -> int:
        """The former name of ``channel_count``, for one release."""
        warnings.warn(
            "LayerRow: the field 'of_channels' is now 'channel_count', and 'of_channels' is removed in the next "
            "release; read channel_count",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.channel_count


@dataclass(frozen=True, eq=False)
class Mask:
    """The selected elements of a network's parameters: a value that no operation changes.

    ``localize`` makes masks; ``reset_``, ``compact``, ``unlearn`` and the masked optimizers use them.

    Parameters
    ----------
    parameters : Mapping of str to ParameterMask
        The mask of every parameter that competed, selected or not, in the model's order: every trainable parameter that
        the patterns of ``localize`` leave in. Names are plain: without the prefixes ``module.`` and ``_orig_mod.`` of
        wrappers.
    metadata : Mapping of str to object, default empty
        Criterion, granularity, aggregate, budget and provenance, as plain JSON values.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> mask = delfast.Mask.from_dense({"weight": torch.tensor([[1, 1], [0, 0]]), "bias": torch.tensor([1, 0])})
    >>> mask.selected, mask.total, mask.channels, mask.fraction
    (3, 6, 1, 0.5)
    >>> "module.weight" in mask, mask["weight"].unit
    (True, 'row')
    """

    parameters: Mapping[str, ParameterMask]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Plain names of all parameters, in the model's order."""
        return list(self.parameters)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters by plain name."""
        return {name: part.shape for name, part in self.parameters.items()}

    @cached_property
    def selected(self) -> int:
        """Number of selected elements."""
        return sum(part.selected for part in self.parameters.values())

    @cached_property
    def total(self) -> int:
        """Number of elements of these parameters, selected or not."""
        return sum(part.numel for part in self.parameters.values())

    @cached_property
    def channels(self) -> int:
        """Number of whole channels of parameters with ndim > 1 that are selected."""
        return sum(part.channels for part in self.parameters.values())

    @property
    def fraction(self) -> float:
        """Selected elements divided by all elements, in [0, 1]; 0 for a mask of no parameters."""
        return self.selected / self.total if self.total else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the packed bits."""
        return sum(part.bits.numel() for part in self.parameters.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of names, shapes and dense bits; independent of the metadata and of the packing."""
        total = hashlib.sha256()
        for name in sorted(self.parameters):
            part = self.parameters[name]
            total.update(f"{name} {part.shape}".encode() + b"\0")
            total.update(part.elements().bits.cpu().numpy().tobytes())
        return total.hexdigest()

    def __repr__(self) -> str:
        return f"Mask({self.selected} of {self.total} elements, {self.channels} channels, digest {self.digest[:12]})"

    def __getitem__(self, name: str) -> ParameterMask:
        check_type("a parameter's name", name, str, "a str")
        return self.parameters[plain_name(name)]

    def __contains__(self, name: str) -> bool:
        return isinstance(name, str) and plain_name(name) in self.parameters

    def to(self, device: torch.device | str) -> Mask:
        """Return the mask with its bits on a device.

        Parameters
        ----------
        device : torch.device or str
            The target device.

        Returns
        -------
        Mask
            This object itself if all bits are on ``device`` already.

        Raises
        ------
        InputError
            If ``device`` is no device.

        Examples
        --------
        >>> import torch
        >>> import delfast
        >>> mask = delfast.Mask.from_dense({"bias": torch.tensor([1, 0])})
        >>> mask.to("cpu") is mask
        True
        """
        device = check_device(device)
        if all(part.bits.device == device for part in self.parameters.values()):
            return self
        moved = {name: replace(part, bits=part.bits.to(device)) for name, part in self.parameters.items()}
        return Mask(moved, self.metadata)

    def match(self, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, ParameterMask]]:
        """Pair each parameter that has a selected element with its mask, after checking all of them.

        Parameters
        ----------
        named : Mapping of str to Tensor
            The network's parameters by plain name.

        Returns
        -------
        Iterator of (str, Tensor, ParameterMask)
            Name, parameter and mask, in the mask's order.

        Raises
        ------
        InputError
            Before anything is returned: if a selected parameter is missing from ``named``, is frozen, or has another
            shape than the mask.

        Examples
        --------
        >>> import torch
        >>> import delfast
        >>> layer = torch.nn.Linear(2, 2)
        >>> mask = delfast.Mask.from_dense({"weight": torch.tensor([[1, 1], [0, 0]]), "bias": torch.tensor([0, 0])})
        >>> [(name, part.selected) for name, _, part in mask.match(dict(layer.named_parameters()))]
        [('weight', 2)]
        """
        check_type("named", named, Mapping, "a mapping from names to parameters")
        found = []
        for name, part in self.parameters.items():
            if not part.selected:
                continue
            if name not in named:
                raise InputError(
                    f"mask selects elements of '{name}', which the model does not have; "
                    "pass the mask of this architecture (and its trainable parameters)"
                )
            self._check_shape(name, part, named[name])
            if isinstance(named[name], torch.nn.Parameter) and not named[name].requires_grad:
                raise InputError(
                    f"mask selects elements of '{name}', which is frozen (requires_grad=False); "
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

    # Set operations on masks of the same parameters. The channels of the result lie as in ``self``.

    def union(self, other: Mask) -> Mask:
        """Select the elements that at least one of two masks selects.

        Parameters
        ----------
        other : Mask
            A mask of the same parameters.

        Returns
        -------
        Mask
            A new mask, on the device of this one; its metadata holds those of both.

        Raises
        ------
        InputError
            If ``other`` is no mask, or a mask of other names or shapes.

        Examples
        --------
        >>> import torch
        >>> import delfast
        >>> first = delfast.Mask.from_dense({"bias": torch.tensor([1, 1, 0])})
        >>> second = delfast.Mask.from_dense({"bias": torch.tensor([0, 1, 1])})
        >>> first.union(second).to_dense()["bias"].tolist()
        [True, True, True]
        """
        return self._combine(other, torch.bitwise_or, "union")

    def intersection(self, other: Mask) -> Mask:
        """Select the elements that both of two masks select.

        Parameters
        ----------
        other : Mask
            A mask of the same parameters.

        Returns
        -------
        Mask
            A new mask, on the device of this one; its metadata holds those of both.

        Raises
        ------
        InputError
            If ``other`` is no mask, or a mask of other names or shapes.

        Examples
        --------
        >>> import torch
        >>> import delfast
        >>> first = delfast.Mask.from_dense({"bias": torch.tensor([1, 1, 0])})
        >>> second = delfast.Mask.from_dense({"bias": torch.tensor([0, 1, 1])})
        >>> first.intersection(second).to_dense()["bias"].tolist()
        [False, True, False]
        """
        return self._combine(other, torch.bitwise_and, "intersection")

    def jaccard(self, other: Mask) -> float:
        """Return the Jaccard index of two masks over elements: ``|intersection| / |union|``.

        Parameters
        ----------
        other : Mask
            A mask of the same parameters.

        Returns
        -------
        float
            In [0, 1]; 1 for two masks that select nothing.

        Raises
        ------
        InputError
            If ``other`` is no mask, or a mask of other names or shapes.

        Examples
        --------
        >>> import torch
        >>> import delfast
        >>> first = delfast.Mask.from_dense({"bias": torch.tensor([1, 1, 0])})
        >>> second = delfast.Mask.from_dense({"bias": torch.tensor([0, 1, 1])})
        >>> round(first.jaccard(second), 3)
        0.333
        """
        either = self.union(other).selected
        return self.intersection(other).selected / either if either else 1.0

    def _combine(self, other: Mask, combine: Callable[[Tensor, Tensor], Tensor], how: str) -> Mask:
        check_type("the other mask", other, Mask, "a delfast.Mask")
        if self.shapes != other.shapes:
            different = sorted({name for name, _ in set(self.shapes.items()) ^ set(other.shapes.items())})
            raise InputError(
                f"expected two masks of the same parameters, got masks that differ in {different[:3]}; "
                "pass masks of one architecture"
            )
        parts = {}
        for name, mine in self.parameters.items():
            theirs = other.parameters[name]
            if (mine.unit, mine.dim) != (theirs.unit, theirs.dim):
                mine, theirs = mine.elements(), theirs.elements()
            parts[name] = replace(mine, bits=combine(mine.bits, theirs.bits.to(mine.bits.device)))
        both = {**other.metadata, **self.metadata}  # the masks have the same names: equivalent patterns
        metadata: dict[str, Any] = {name: both[name] for name in ("include", "exclude") if name in both}
        return Mask(parts, {"made_by": how, "of": [dict(self.metadata), dict(other.metadata)], **metadata})

    def widen(
        self, names: list[str], shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, int] | None = None
    ) -> Mask:
        """Return this mask with some parameters selected in full, such as the classifier head.

        Parameters
        ----------
        names : list of str
            Plain names of the parameters to select in full.
        shapes : Mapping of str to tuple of int
            The shape of each of these parameters.
        dims : Mapping of str to int, optional
            The dimension of each parameter's channels; by default as in this mask, and 0 for a new name.

        Returns
        -------
        Mask
            A new mask; its metadata lists ``names`` as "widened_by".

        Raises
        ------
        InputError
            If ``names`` is no list of names, a name has no shape, or a shape differs from the mask's.

        Examples
        --------
        >>> import torch
        >>> import delfast
        >>> mask = delfast.Mask.from_dense({"weight": torch.tensor([[1, 1], [0, 0]]), "bias": torch.tensor([0, 0])})
        >>> mask.widen(["bias"], {"bias": (2,)}).selected
        4
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
        """Return how much of each parameter is selected.

        Returns
        -------
        list of LayerRow
            One row per parameter, in the model's order.

        Examples
        --------
        >>> import torch
        >>> import delfast
        >>> (row,) = delfast.Mask.from_dense({"bias": torch.tensor([1, 0, 1])}).table()
        >>> row.selected, row.total
        (2, 3)
        """
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
        """Build a mask from dense tensors of zeros and ones, the form that SalUn's and the DEL authors' code use.

        Parameters
        ----------
        dense : Mapping of str to Tensor or numpy.ndarray
            A tensor of the parameter's shape for each parameter, of any layout and dtype, whose values are 0 and 1.
            Wrapper prefixes are removed from the names. DTensors are gathered, by all processes that hold them.
        metadata : Mapping of str to object, optional
            The mask's metadata; empty by default.
        dims : Mapping of str to int, optional
            The dimension along which a parameter's channels lie, by plain name; 0 by default.

        Returns
        -------
        Mask
            Bits per row (channel) where every channel is selected whole or not at all, else per element.

        Raises
        ------
        InputError
            For other values than 0 and 1, for anything that is no tensor (such as None), for two names of one
            parameter, and for a dimension that the parameter lacks.

        Examples
        --------
        >>> import torch
        >>> import delfast
        >>> delfast.Mask.from_dense({"weight": torch.tensor([[1.0, 1.0], [0.0, 0.0]])})["weight"].unit
        'row'
        >>> delfast.Mask.from_dense({"weight": torch.tensor([[1, 0], [0, 0]])})["weight"].unit
        'element'
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
        """Return the mask as dense tensors of zeros and ones.

        Parameters
        ----------
        dtype : torch.dtype, default torch.bool
            The tensors' dtype; SalUn's files hold int64.

        Returns
        -------
        dict of str to Tensor
            A tensor of the parameter's shape for each plain name.

        Raises
        ------
        InputError
            If ``dtype`` is no torch.dtype.

        Examples
        --------
        >>> import torch
        >>> import delfast
        >>> delfast.Mask.from_dense({"bias": torch.tensor([1, 0])}).to_dense(torch.int64)
        {'bias': tensor([1, 0])}
        """
        check_type("dtype", dtype, torch.dtype, "a torch.dtype")
        return {name: part.dense().to(dtype) for name, part in self.parameters.items()}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all: the packed bits, the metadata, and a digest over both.

        The same mask gives the same bytes. Each process of a group may save it to the same path, or one for all.

        Parameters
        ----------
        path : str or Path
            The file to write or replace.

        Raises
        ------
        InputError
            For metadata without a JSON form (numpy's numbers become Python's), and for a path that is no path.
        OSError
            If the file cannot be written; the error has the file's name.

        Examples
        --------
        >>> import tempfile, torch
        >>> import delfast
        >>> mask = delfast.Mask.from_dense({"bias": torch.tensor([1, 0])}, {"budget": 0.5})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mask.save(f"{folder}/mask.safetensors")
        ...     loaded = delfast.Mask.load(f"{folder}/mask.safetensors")
        >>> loaded.digest == mask.digest, loaded.metadata
        (True, {'budget': 0.5})
        """
        fields = {name: (part.shape, part.unit, part.bits, part.dim) for name, part in self.parameters.items()}
        write_mask(Path(check_path("path", path)), FORMAT_VERSION, fields, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a file that ``save`` wrote, in this format or an older one.

        Everything in the file is checked before it is used.

        Parameters
        ----------
        path : str or Path
            The file to read.

        Returns
        -------
        Mask
            The mask, with its bits on the CPU.

        Raises
        ------
        InputError
            If the file is missing, truncated, altered, or no mask.

        Examples
        --------
        >>> import delfast
        >>> delfast.Mask.load("absent.safetensors")
        Traceback (most recent call last):
        delfast.errors.InputError: expected a mask file at 'absent.safetensors', there is none; check the path
        """
        parts, metadata = read_mask(Path(check_path("path", path)))
        return cls({name: ParameterMask(*fields) for name, fields in parts.items()}, metadata)


def _flags(name: str, value: Any) -> Tensor:
    """Return a tensor or an array of zeros and ones as bool; InputError for anything else."""
    value = value.full_tensor() if is_dtensor(value) else value
    try:
        # a copy, because torch refuses arrays with negative strides and warns about read-only ones
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
