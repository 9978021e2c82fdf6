"""Compare two states of a network bit by bit, and count the changes outside a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delfast.bits import bits
from delfast.errors import InputError
from delfast.experiments.run import MASK, MODEL
from delfast.files import load_state
from delfast.mask import Mask
from delfast.naming import plain_name

COLUMNS = ("name", "elements", "in the mask", "changed", "changed outside")
# A state file does not distinguish buffers from parameters; these buffers of torch's norm layers change in training
BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class ComparedRow:
    """One tensor: numbers of elements: all, in the mask, changed, and changed outside the mask."""

    name: str
    entries: int
    in_mask: int
    changed: int
    outside: int

    def cells(self) -> list[str]:
        """The row for a table with ``COLUMNS``."""
        return [
            self.name,
            *(str(value) for value in (self.entries, self.in_mask, self.changed, self.outside)),
        ]


@dataclass(frozen=True)
class Comparison:
    """Rows of parameters and rows of buffers, each in the order of the state file."""

    parameters: list[ComparedRow]
    buffers: list[ComparedRow]

    @property
    def changed(self) -> int:
        """Number of elements of parameters that changed."""
        return sum(row.changed for row in self.parameters)

    @property
    def outside(self) -> int:
        """Number of elements of parameters that changed outside the mask."""
        return sum(row.outside for row in self.parameters)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"changed": self.changed, "outside": self.outside, **asdict(self)}


def load_network(path: Path) -> dict[str, Tensor]:
    """Load the state of a run directory or of a state file."""
    return load_state(path / MODEL if path.is_dir() else path)


def load_mask(path: Path) -> Mask:
    """Load the mask of a directory that `delfast localize` or `delfast unlearn` wrote, or of a file.

    A file is a .safetensors mask, or by any other name a dense mask (name -> 0/1 tensor), as SalUn writes it.
    """
    if path.is_dir():
        path = path / MASK
    if path.suffix == ".safetensors":
        return Mask.load(path)
    return Mask.from_dense(load_state(path))


def compare(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    mask: Mask,
    *,
    heads: Sequence[str] = (),
    buffers: Sequence[str] = (),
) -> Comparison:
    """Compare two states bit by bit, so that NaN equals itself and 0 differs from -0.

    ``heads``: modules or parameters that may change in full. ``buffers``: tensors that are not counted, besides
    BatchNorm's statistics. A tied parameter is stored under several names and masked under one name; a tensor that
    equals a masked tensor in both states has the same mask. Raises InputError if the states, or the mask and the
    states, are of different networks, and for a head or buffer that does not exist.
    """
    before, after = _plain_names(before), _plain_names(after)
    allowed = {plain_name(name): dense.cpu() for name, dense in mask.to_dense().items()}
    _check_same(before, after)
    _check_mask(allowed, before)
    for wanted in (*heads, *buffers):
        if not any(_within(name, wanted) for name in before):
            raise InputError(f"expected a module or tensor of the network, got '{wanted}', which it does not have")
    rows: dict[bool, list[ComparedRow]] = {True: [], False: []}
    for name, old in before.items():
        changed = bits(old) != bits(after[name])
        may = allowed.get(name)
        if may is None:
            may = _mask_of_tied(name, before, after, allowed)
        if any(_within(name, head) for head in heads):
            may = torch.ones_like(may)
        row = ComparedRow(name, old.numel(), int(may.sum()), int(changed.sum()), int((changed & ~may).sum()))
        is_buffer = name not in allowed and (
            name.rpartition(".")[2] in BATCH_NORM_BUFFERS or any(_within(name, buffer) for buffer in buffers)
        )
        rows[is_buffer].append(row)
    return Comparison(rows[False], rows[True])


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {plain_name(name): tensor for name, tensor in state.items()}


def _within(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(f"{wanted}.")


def _mask_of_tied(
    name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], allowed: Mapping[str, Tensor]
) -> Tensor:
    for masked, may in allowed.items():
        same = before[masked].shape == before[name].shape and before[masked].dtype == before[name].dtype
        if same and all(torch.equal(bits(state[masked]), bits(state[name])) for state in (before, after)):
            return may
    return torch.zeros(before[name].shape, dtype=torch.bool)


def _check_same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for name in sorted(before.keys() ^ after.keys()):
        where = "BEFORE" if name in before else "AFTER"
        raise InputError(f"expected two states of one network, '{name}' is in {where} alone")
    for name, old in before.items():
        new = after[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise InputError(
                f"expected two states of one network, '{name}' is {tuple(old.shape)} {old.dtype} in BEFORE "
                f"and {tuple(new.shape)} {new.dtype} in AFTER"
            )


def _check_mask(allowed: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, dense in allowed.items():
        if name not in state:
            raise InputError(f"the mask is for another architecture: the network has no '{name}'")
        if dense.shape != state[name].shape:
            raise InputError(
                f"the mask is for another architecture: '{name}' is {tuple(dense.shape)} in the mask, "
                f"{tuple(state[name].shape)} in the network"
            )
