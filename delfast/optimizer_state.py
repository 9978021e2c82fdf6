"""State of masked elements: packed, as an optimizer holds it, or dense, as checkpoints of sharded models hold it.

Packed state of one parameter has one value per masked element, in the order of the elements: (rows, *shape[1:]) for a
mask by row, else (selected,). Dense state has the parameter's shape, with zeros outside the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.parameter_mask import ParameterMask
from delfast.sharding import held_part, is_dtensor, local_part


def by_kind(kinds: tuple[str, ...], values: Tensor) -> dict[str, Tensor]:
    """Return the flat state of each kind, which follow one another in ``values``."""
    size = values.numel() // max(1, len(kinds))
    return {kind: values[number * size : (number + 1) * size] for number, kind in enumerate(kinds)}


def pack_state(dense: Tensor, part: ParameterMask) -> Tensor:
    """Return the packed form of a plain dense state."""
    packed = dense[part.dense().to(dense.device)]
    return packed.view(int(part.flags.sum()), *part.shape[1:]) if part.by_row else packed


def unpack_state(packed: Tensor, part: ParameterMask) -> Tensor:
    """Return the dense form of a packed state."""
    dense = packed.new_zeros(part.shape)
    dense[part.dense().to(packed.device)] = packed.flatten()
    return dense


def unpack_like(packed: Tensor, part: ParameterMask, parameter: Any) -> Any:
    """Return, laid out like ``parameter``, the dense form of the state that this process holds.

    part: the mask of this process's part.
    """
    dense: Any = torch.zeros_like(parameter.detach(), dtype=packed.dtype)
    local_part(dense).copy_(unpack_state(packed, part))
    return dense


def load_state(
    name: str,
    saved: dict[str, Any],
    kinds: tuple[str, ...],
    joint: str,
    mask: ParameterMask,
    parameter: Any,
    is_by_kind: bool,
) -> dict[str, Any]:
    """Return the saved state of one parameter in the form in which its optimizer holds it.

    is_by_kind: whether the optimizer holds the state under ``kinds``, as one with DTensors does; else it holds it under
    the key ``joint``, and the packed kinds follow one another.
    saved: as an optimizer of either holds it, or dense, as gathered from DTensors; other keys are kept.

    Raises InputError for state of another size than the mask of the whole parameter has.
    """
    state = {key: value for key, value in saved.items() if key not in (*kinds, joint)}
    whole, held = mask.for_ops, saved.get(joint)
    # dense state of one kind may have the key of packed state; where their shapes are equal too, so are their values
    if held is not None and (joint not in kinds or not (is_dtensor(held) or held.shape == parameter.shape)):
        if not is_by_kind:
            return saved
        check_size(name, held, len(kinds) * mask.selected)
        dense = {kind: unpack_state(values, whole) for kind, values in by_kind(kinds, held.flatten()).items()}
    else:
        dense = {kind: saved[kind] for kind in kinds if kind in saved}
    if not dense:
        return state
    for kind in kinds:
        if kind not in dense or dense[kind].shape != parameter.shape:
            found = f"{tuple(dense[kind].shape)}" if kind in dense else "none"
            raise InputError(
                f"expected '{kind}' of shape {tuple(parameter.shape)} for '{name}', got {found}; the optimizer state "
                "is of another network"
            )
    packed = {kind: pack_state(held_part(dense[kind], parameter), mask.part_of(parameter).for_ops) for kind in kinds}
    return {**state, **(packed if is_by_kind else {joint: torch.cat(list(packed.values()))})}


def check_size(name: str, held: Tensor, expected: int) -> None:
    """Raise InputError for packed state that has not as many values as are expected."""
    if held.numel() != expected:
        raise InputError(
            f"expected {expected} values of state for '{name}', got {held.numel()}; the optimizer state is "
            "of another mask"
        )


def move_state(held: Tensor, old: ParameterMask, new: ParameterMask) -> Tensor:
    """Return packed state of the elements of ``old`` as that of the elements of ``new``; zeros for new elements.

    held: one kind of state, or several kinds that follow one another.
    """
    count = held.numel() // old.selected if old.selected else 1
    return torch.cat([pack_state(unpack_state(kind, old), new) for kind in held.reshape(count, -1)])
