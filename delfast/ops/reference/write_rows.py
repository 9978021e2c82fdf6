"""Reference of csrc/cpu/write_rows and csrc/cuda/write_rows: rows of many weights, written in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def write_rows_(
    weights: Sequence[Tensor], rows: Sequence[Tensor], indices: Sequence[Tensor], dims: Sequence[int]
) -> None:
    """Write ``rows[i]`` into ``weights[i]`` at ``indices[i]`` along ``dims[i]``; no other element changes.

    The versions of the weights do not change: compact layers write the same rows again between a forward pass and its
    backward pass. A caller that writes other rows calls ``torch.autograd.graph.increment_version``.

    Parameters
    ----------
    weights : sequence of Tensor
        Weights (..., C, ...) of any dtype and strides, changed in place.
    rows : sequence of Tensor
        Rows (..., n, ...) of the dtype of their weight: its shape with C replaced by n.
    indices : sequence of Tensor
        Contiguous int64 (n,), distinct, in [0, C).
    dims : sequence of int
        The dimension of each weight along which its rows lie.

    Raises
    ------
    IndexError
        For an index outside [0, C), on the CPU; on a GPU the device stops.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> weight = torch.zeros(3, 2)
    >>> torch.ops.delfast.write_rows_([weight], [torch.ones(1, 2)], [torch.tensor([1])], [0])
    >>> weight.tolist()
    [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    """
    for number, (weight, index, dim) in enumerate(zip(weights, indices, dims, strict=True)):
        if index.device.type == "cpu":  # on a GPU index_copy_ checks them itself, without a host read here
            outside = index[(index < 0) | (index >= weight.shape[dim])]
            if len(outside):
                raise IndexError(f"expected index #{number} in [0, {weight.shape[dim]}), got {int(outside[0])}")
    for weight, source, index, dim in zip(weights, rows, indices, dims, strict=True):
        weight.data.index_copy_(dim, index, source.data)
