"""Reference of csrc/cpu/masked_update: change the masked elements of parameters in place, and nothing else.

``bits`` has the packed bits of all parameters, each padded to whole bytes (delfast.ops.layout). A bit of ``params[p]``
stands for a row (a slice along dim 0) if ``by_row[p]``, else for an element in row-major order. ``state`` is one flat
tensor, float32 (float64 for float64 parameters), with the optimizer's state for masked elements only: for each
parameter, from a multiple of 4 on, each kind of state one after another, the values in the order of the set bits, and a
row's values in the row's memory order (``as_rows``). The values between the parameters' are neither read nor written.
Its size is checked: that of the mask, each parameter's values rounded up to a multiple of 4. So the state of another
mask with the same rounded sizes is not noticed.

In place of ``bits`` the updates take the plan that ``masked_plan`` makes of them, which begins with the bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from delfast.ops.layout import (
    as_rows,
    packed_bytes,
    padded_state,
    plan_bytes,
    plan_head,
    row_length,
    unit_count,
    unpack,
)

Update = Callable[[Tensor, Tensor], Tensor]


def _masked(params: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> Iterator[Tensor]:
    """Yield for each parameter the indices of its masked rows or elements: int64 (n,)."""
    _check_plan(params, bits, by_row)
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


def _shapes(params: Sequence[Tensor], by_row: Sequence[bool]) -> tuple[int, Tensor]:
    """Return the offset of a plan's head in bytes, and the head and shapes of a plan without a list: int64 (n,)."""
    start, units = plan_head([param.shape for param in params], by_row)
    return start, torch.tensor([len(params), -1, *(number for pair in units for number in (*pair, 0))])


def _check_plan(params: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> None:
    """Raise ValueError for a plan of other shapes."""
    start, expected = _shapes(params, by_row)
    if bits.numel() <= start:
        return
    found = bits[start : start + 8 * len(expected)].cpu().clone().view(torch.int64)
    if any(not torch.equal(found[part], expected[part]) for part in (slice(1), slice(2, None, 3), slice(3, None, 3))):
        raise ValueError(
            f"expected a plan of these {len(params)} parameters, got one of other shapes; pass what masked_plan "
            "returned for them"
        )


def _state_of(
    state: Tensor, count: int, params: Sequence[Tensor], masked: Sequence[Tensor], by_row: Sequence[bool]
) -> list[list[Tensor]]:
    """Return for each parameter ``count`` views of ``state``, shaped like its masked elements."""
    sizes = [
        where.numel() * (row_length(param.shape) if rows else 1)
        for param, where, rows in zip(params, masked, by_row, strict=True)
    ]
    total = sum(padded_state(count * size) for size in sizes)
    if count and state.numel() != total:
        raise ValueError(
            f"expected state of {total} values, got {state.numel()}; the optimizer state is of another mask"
        )
    start, views = 0, []
    for param, size, rows in zip(params, sizes, by_row, strict=True):
        pieces = state[start : start + count * size].split(size) if size else [state[:0]] * count  # type: ignore[no-untyped-call]
        views.append([as_rows(piece, param) if rows else piece for piece in pieces])
        start += padded_state(count * size)
    return views


def _apply(param: Tensor, source: Tensor, where: Tensor, rows: bool, update: Update) -> None:
    """Replace the elements ``where`` of ``param`` by ``update`` of them and of those of ``source``, computed wide."""
    wide = torch.promote_types(param.dtype, torch.float32)
    if rows and param.ndim > 1:
        param[where] = update(param[where].to(wide), source[where].to(wide)).to(param.dtype)
        return
    flat = param.reshape(-1).clone()  # a view of some strides would overlap itself when copied back
    flat[where] = update(flat[where].to(wide), source.reshape(-1)[where].to(wide)).to(param.dtype)
    param.copy_(flat.view_as(param))


def masked_plan(params: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> Tensor:
    """List the elements that a mask selects, once for many updates of the same parameters.

    Parameters
    ----------
    params : sequence of Tensor
        Parameters; only their shapes are read.
    bits : Tensor
        Packed bits (uint8) of all parameters, concatenated.
    by_row : sequence of bool
        For each parameter, whether a bit stands for a row or for an element.

    Returns
    -------
    Tensor
        A plan (csrc/delfast/mask_plan.h): the bits, the shapes and, made by a CUDA device's kernel, a list of the
        masked rows and the stretches with masked elements. The updates take it in place of ``bits``, on the device on
        which it was made, without a check: a plan is not to be changed. A CUDA device makes one in each call that is
        given bits alone. Its size depends on the shapes alone: beside the bits 24 bytes a parameter, 24 bytes a row of
        64 to 512 elements, and less for shorter rows and single elements.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> bias, bits = torch.ones(3), torch.tensor([0b101], dtype=torch.uint8)
    >>> plan = torch.ops.delfast.masked_plan([bias], bits, [False])
    >>> torch.ops.delfast.masked_reset_([bias], [torch.zeros(3)], plan, [False])
    >>> bias
    tensor([0., 1., 0.])
    """
    plan = bits.new_zeros(plan_bytes([param.shape for param in params], by_row))
    plan[: bits.numel()] = bits
    start, numbers = _shapes(params, by_row)
    plan[start : start + 8 * len(numbers)] = numbers.view(torch.uint8).to(plan.device)
    return plan


def masked_reset_(params: Sequence[Tensor], fresh: Sequence[Tensor], bits: Tensor, by_row: Sequence[bool]) -> None:
    """Replace the masked elements of parameters by new values: theta_j <- fresh_j.

    Parameters
    ----------
    params : sequence of Tensor
        Parameters, changed in place.
    fresh : sequence of Tensor
        New values of the same shape for each parameter.
    bits : Tensor
        Packed bits (uint8) of all parameters, concatenated, or their plan.
    by_row : sequence of bool
        For each parameter, whether a bit stands for a row or for an element.

    References
    ----------
    Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization", TMLR 2025,
    arXiv 2412.02432, section 3.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> bias, bits = torch.ones(3), torch.tensor([0b101], dtype=torch.uint8)
    >>> torch.ops.delfast.masked_reset_([bias], [torch.zeros(3)], bits, [False])
    >>> bias
    tensor([0., 1., 0.])
    """
    masked = list(_masked(params, bits, by_row))
    for param, value, where, rows in zip(params, fresh, masked, by_row, strict=True):
        _apply(param, value, where, rows, lambda old, new: new)


def _unscaled(grad: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    if grad_scale is not None:
        grad = grad * grad_scale.double().reshape(()).reciprocal().to(grad.dtype)
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
    """Take one step of ``torch.optim.SGD`` on the masked elements.

    Parameters
    ----------
    params : sequence of Tensor
        Parameters, changed in place.
    grads : sequence of Tensor
        A gradient of the same shape for each parameter.
    state : Tensor
        Momentum buffers of the masked elements, each parameter's from a multiple of 4 on; unused if ``momentum`` is 0;
        changed in place.
    steps : Tensor
        Float32 (parameters,): the number of steps taken, incremented in place.
    bits : Tensor
        Packed bits (uint8) of all parameters, concatenated, or their plan.
    by_row : sequence of bool
        For each parameter, whether a bit stands for a row or for an element.
    lr : float
        Learning rate.
    momentum : float
        Momentum factor.
    dampening : float
        Dampening of the momentum.
    weight_decay : float
        L2 penalty.
    nesterov : bool
        Whether to use Nesterov's momentum.
    maximize : bool
        Whether to ascend instead of descend.
    grad_scale : Tensor or None
        One number by which the gradients are divided first.
    found_inf : Tensor or None
        One number; if it is not 0, nothing changes.
    lr_tensor : Tensor or None, default None
        One number that replaces ``lr``. A kernel on a CUDA device reads it there, so that a captured graph follows a
        schedule.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> bias, bits, none = torch.ones(3), torch.tensor([0b101], dtype=torch.uint8), torch.empty(0)
    >>> settings = dict(momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)
    >>> torch.ops.delfast.masked_sgd_(
    ...     [bias], [torch.ones(3)], none, torch.zeros(1), bits, [False],
    ...     lr=0.5, **settings, grad_scale=None, found_inf=None,
    ... )
    >>> bias
    tensor([0.5000, 1.0000, 0.5000])
    """
    masked = list(_masked(params, bits, by_row))
    states = _state_of(state, 1 if momentum else 0, params, masked, by_row)
    if found_inf is not None and bool(found_inf):
        return
    lr = lr if lr_tensor is None else float(lr_tensor)
    for i, (param, grad, where, rows, kept) in enumerate(zip(params, grads, masked, by_row, states, strict=True)):
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

        _apply(param, grad, where, rows, update)
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
    """Take one step of ``torch.optim.AdamW`` on the masked elements.

    Parameters
    ----------
    params : sequence of Tensor
        Parameters, changed in place.
    grads : sequence of Tensor
        A gradient of the same shape for each parameter.
    state : Tensor
        For each parameter, from a multiple of 4 on, the running means of its gradients, then of their squares; changed
        in place.
    steps : Tensor
        Float32 (parameters,): the number of steps taken, incremented in place.
    bits : Tensor
        Packed bits (uint8) of all parameters, concatenated, or their plan.
    by_row : sequence of bool
        For each parameter, whether a bit stands for a row or for an element.
    lr : float
        Learning rate.
    beta1 : float
        Decay rate of the running mean of gradients.
    beta2 : float
        Decay rate of the running mean of squared gradients.
    eps : float
        Added to the denominator.
    weight_decay : float
        Decoupled weight decay.
    maximize : bool
        Whether to ascend instead of descend.
    grad_scale : Tensor or None
        One number by which the gradients are divided first.
    found_inf : Tensor or None
        One number; if it is not 0, nothing changes.
    lr_tensor : Tensor or None, default None
        One number that replaces ``lr``. A kernel on a CUDA device reads it there, so that a captured graph follows a
        schedule.

    References
    ----------
    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv 1711.05101, algorithm 2.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> bias, bits, state = torch.ones(3), torch.tensor([0b101], dtype=torch.uint8), torch.zeros(4)
    >>> settings = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, maximize=False)
    >>> torch.ops.delfast.masked_adamw_(
    ...     [bias], [torch.ones(3)], state, torch.zeros(1), bits, [False],
    ...     lr=0.5, **settings, grad_scale=None, found_inf=None,
    ... )
    >>> bias
    tensor([0.5000, 1.0000, 0.5000])
    """
    masked = list(_masked(params, bits, by_row))
    states = _state_of(state, 2, params, masked, by_row)
    if found_inf is not None and bool(found_inf):
        return
    lr = lr if lr_tensor is None else float(lr_tensor)
    for i, (param, grad, where, rows, (mean, square)) in enumerate(
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

        _apply(param, grad, where, rows, update)
    steps += 1
