"""Reference of csrc/cpu/masked_update: change the masked entries of parameters in place, and nothing else.

``bits``: uint8, the packed bits of all parameters one after the other, each padded to whole bytes (as in
delfast.ops.layout). ``by_row[p]`` says what a bit of ``params[p]`` stands for: a row (a slice along dim 0), or an
element in row-major order. ``state``: one flat tensor, float32 (float64 for float64 parameters), of the optimizer's
state for masked entries only: for each parameter and each kind of state, the values in the order of the set bits, a
row's in the row's own memory order (``as_rows``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from delfast.ops.layout import as_rows, packed_bytes, row_length, unit_count, unpack

Update = Callable[[Tensor, Tensor], Tensor]


def _masked(params: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> Iterator[Tensor]:
    """For each parameter, int64 (n,): its masked rows or elements."""
    start = 0
    for index, (param, rows) in enumerate(zip(params, by_row, strict=True)):
        units = unit_count(param.shape) if rows else param.numel()
        size = packed_bytes(units)
        masked = unpack(bits[start : start + size], 8 * size).nonzero().squeeze(1)
        if len(masked) and masked[-1] >= units:
            raise ValueError(
                f"expected the bits past the last of the {units} of parameter #{index} to be zero; the mask is of "
                "other parameters"
            )
        yield masked
        start += size


def _state_of(
    state: Tensor, count: int, params: Sequence[Tensor], masked: Sequence[Tensor], by_row: Sequence[bool]
) -> list[list[Tensor]]:
    """For each parameter, ``count`` views of ``state``, shaped like its masked entries."""
    sizes = [
        entries.numel() * (row_length(param.shape) if rows else 1)
        for param, entries, rows in zip(params, masked, by_row, strict=True)
    ]
    if count and state.numel() != count * sum(sizes):
        raise ValueError(
            f"expected state of {count * sum(sizes)} values, got {state.numel()}; "
            "the optimizer state is of another mask"
        )
    start, views = 0, []
    for param, size, rows in zip(params, sizes, by_row, strict=True):
        pieces = state[start : start + count * size].split(size) if size else [state[:0]] * count  # type: ignore[no-untyped-call]
        views.append([as_rows(piece, param) if rows else piece for piece in pieces])
        start += count * size
    return views


def _apply(param: Tensor, source: Tensor, entries: Tensor, rows: bool, update: Update) -> None:
    """Replace the masked entries of ``param`` by ``update(entries, the same entries of source)``, computed wide."""
    wide = torch.promote_types(param.dtype, torch.float32)
    if rows and param.ndim > 1:
        param[entries] = update(param[entries].to(wide), source[entries].to(wide)).to(param.dtype)
        return
    flat = param.reshape(-1).clone()  # a view of some strides would overlap itself when copied back
    flat[entries] = update(flat[entries].to(wide), source.reshape(-1)[entries].to(wide)).to(param.dtype)
    param.copy_(flat.view_as(param))


def masked_reset_(params: Sequence[Tensor], fresh: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> None:
    """theta_j <- fresh_j on the mask (DEL paper, section 3)."""
    masked = list(_masked(params, bits, by_row))
    for param, value, entries, rows in zip(params, fresh, masked, by_row, strict=True):
        _apply(param, value, entries, rows, lambda old, new: new)


def _unscaled(grad: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    if grad_scale is not None:
        grad = grad * grad_scale.double().reciprocal().to(grad.dtype)
    return -grad if maximize else grad


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Tensor,
    steps: Tensor,
    bits: Tensor,
    by_row: Sequence[bool],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr_tensor: Tensor | None = None,
) -> None:
    """One step of ``torch.optim.SGD`` on the masked entries.

    state: the momentum buffers; empty if ``momentum`` is 0. steps: float32 (parameters,), steps taken, advanced here.
    grad_scale: gradients are divided by it first. found_inf: if it is not 0, nothing at all changes. lr_tensor: one
    number, in place of ``lr``; on a CUDA device it is read there, so that a captured graph follows a schedule.
    """
    masked = list(_masked(params, bits, by_row))
    states = _state_of(state, 1 if momentum else 0, params, masked, by_row)
    if found_inf is not None and bool(found_inf):
        return
    lr = lr if lr_tensor is None else float(lr_tensor)
    for i, (param, grad, entries, rows, kept) in enumerate(zip(params, grads, masked, by_row, states, strict=True)):
        buffer = kept[0] if momentum else None
        first = float(steps[i]) == 0

        def update(old: Tensor, gradient: Tensor, buffer: Tensor | None = buffer, first: bool = first) -> Tensor:
            gradient = _unscaled(gradient, grad_scale, maximize)
            if weight_decay:
                gradient = gradient + weight_decay * old
            if buffer is None:
                return old - lr * gradient
            buffer.copy_(gradient if first else momentum * buffer + (1 - dampening) * gradient)
            return old - lr * (gradient + momentum * buffer if nesterov else buffer)

        _apply(param, grad, entries, rows, update)
    steps += 1


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Tensor,
    steps: Tensor,
    bits: Tensor,
    by_row: Sequence[bool],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr_tensor: Tensor | None = None,
) -> None:
    """One step of ``torch.optim.AdamW`` (Loshchilov & Hutter, ICLR 2019, algorithm 2) on the masked entries.

    state: for each parameter the running means of the gradients, then of their squares.
    steps, grad_scale, found_inf, lr_tensor: as for ``masked_sgd_``.
    """
    masked = list(_masked(params, bits, by_row))
    states = _state_of(state, 2, params, masked, by_row)
    if found_inf is not None and bool(found_inf):
        return
    lr = lr if lr_tensor is None else float(lr_tensor)
    for i, (param, grad, entries, rows, (mean, square)) in enumerate(
        zip(params, grads, masked, by_row, states, strict=True)
    ):
        count = float(steps[i]) + 1
        step_size = lr / (1 - beta1**count)
        correction = math.sqrt(1 - beta2**count)

        def update(
            old: Tensor,
            gradient: Tensor,
            mean: Tensor = mean,
            square: Tensor = square,
            step_size: float = step_size,
            correction: float = correction,
        ) -> Tensor:
            gradient = _unscaled(gradient, grad_scale, maximize)
            mean.copy_(beta1 * mean + (1 - beta1) * gradient)
            square.copy_(beta2 * square + (1 - beta2) * gradient * gradient)
            return old * (1 - lr * weight_decay) - step_size * (mean / (square.sqrt() / correction + eps))

        _apply(param, grad, entries, rows, update)
    steps += 1
