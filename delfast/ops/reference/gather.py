"""Reference of csrc/cpu/gather: the selected columns of an output gradient, for a compact layer's backward pass."""

from __future__ import annotations

from torch import Tensor


def gather_columns(source: Tensor, columns: Tensor) -> Tensor:
    """Return ``source[:, columns]``.

    Parameters
    ----------
    source : Tensor
        Contiguous matrix (M, C) of any dtype of 2, 4 or 8 bytes.
    columns : Tensor
        Contiguous int64 (n,), in [0, C).

    Returns
    -------
    Tensor
        Matrix (M, n) of the dtype of ``source``.

    Raises
    ------
    IndexError
        For a column outside [0, C).

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> torch.ops.delfast.gather_columns(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2, 0]))
    tensor([[3., 1.]])
    """
    if columns.device.type == "cpu":  # on a GPU index_select checks them itself, without a host read here
        outside = columns[(columns < 0) | (columns >= source.shape[1])]
        if len(outside):
            raise IndexError(f"expected columns in [0, {source.shape[1]}), got {int(outside[0])}")
    return source.index_select(1, columns)
