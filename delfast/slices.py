"""Tensors of a safetensors file: each process reads only the part that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from delfast.errors import InputError, one_line
from delfast.naming import plain_name
from delfast.sharding import local_part, rows_of


def read_parts(path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the values of each parameter that this process holds, by plain name, on the CPU.

    The values have the dtype that the file has. Where a process holds elements that lie apart in a dimension, it reads
    the range that covers them. Raises InputError for a file that is missing or damaged, or that has no tensor of a
    parameter's name and shape.
    """
    if not path.is_file():
        raise InputError(f"expected a safetensors file at '{path}', there is none; check the path")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = file.keys()
            names = {plain_name(key): key for key in keys}
            for name, parameter in parameters.items():
                shape = tuple(file.get_slice(names[name]).get_shape()) if name in names else None
                if shape != tuple(parameter.shape):
                    found = "none" if shape is None else f"one of {shape}"
                    raise InputError(
                        f"expected '{path}' to have a tensor '{name}' of shape {tuple(parameter.shape)}, got {found}; "
                        "pass a file of the same network"
                    )
            return {name: _read(file, names[name], parameter) for name, parameter in parameters.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{path}' is no whole safetensors file ({one_line(error)}); write it again") from None


def _read(file: Any, name: str, parameter: Tensor) -> Tensor:
    if not parameter.ndim:
        scalar: Tensor = file.get_tensor(name)
        return scalar
    held = [rows_of(torch.arange(size), parameter, dim).cpu() for dim, size in enumerate(parameter.shape)]
    if not all(map(len, held)):
        return torch.empty(local_part(parameter).shape, dtype=parameter.dtype)
    ranges = tuple(slice(int(indices.min()), int(indices.max()) + 1) for indices in held)
    values: Tensor = file.get_slice(name)[ranges]
    for dim, (indices, within) in enumerate(zip(held, ranges, strict=True)):
        if not torch.equal(indices, torch.arange(within.start, within.stop)):
            values = values.index_select(dim, indices - within.start)
    return values
