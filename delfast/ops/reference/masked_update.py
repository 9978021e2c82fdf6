"""Twin of csrc/cpu/masked_update: change the masked entries of parameters in place, and nothing else.

``index[p]`` says which entries of ``params[p]`` are masked, in one of two forms, told apart by dtype:
int32 (n,): rows (slices along dim 0), ascending; state has shape (n, *params[p].shape[1:]).
uint8 (ceil(numel/8),): packed bits over the elements in row-major order; state has shape (number of set bits,).
Optimizer state exists for masked entries only, in float32 whatever the parameter's dtype (float64 for float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from delfast.ops.layout import unpack

Update = Callable[[Tensor, Tensor], Tensor]


def _apply(param: Tensor, source: Tensor, index: Tensor, update: Update) -> None:
    """Replace the masked entries of ``param`` by ``update(entries, the same entries of source)``, computed wide."""
    wide = torch.promote_types(param.dtype, torch.float32)
    if index.dtype == torch.int32:
        rows = index.long()
        param[rows] = update(param[rows].to(wide), source[rows].to(wide)).to(param.dtype)
        return
    entries = unpack(index, param.numel()).nonzero().squeeze(1)
    flat = param.reshape(-1)  # a copy where param is not contiguous
    flat[entries] = update(flat[entries].to(wide), source.reshape(-1)[entries].to(wide)).to(param.dtype)
    param.copy_(flat.view_as(param))


def masked_reset_(params: Sequence[Tensor], fresh: Sequence[Tensor], index: Sequence[Tensor]) -> None:
    """theta_j <- fresh_j on the mask (DEL paper, section 3)."""
    for param, value, chosen in zip(params, fresh, index, strict=True):
        _apply(param, value, chosen, lambda entries, new: new)


def _unscaled(grad: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    if grad_scale is not None:
        grad = grad * grad_scale.double().reciprocal().to(grad.dtype)
    return -grad if maximize else grad


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[Tensor],
    index: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of ``torch.optim.SGD`` on the masked entries.

    momentum_buffers: empty if ``momentum`` is 0. steps: float32 scalars, steps taken, advanced here.
    grad_scale: gradients are divided by it first. found_inf: if it is not 0, nothing at all changes.
    """
    if found_inf is not None and bool(found_inf):
        return
    for i, (param, grad, step, chosen) in enumerate(zip(params, grads, steps, index, strict=True)):
        buffer = momentum_buffers[i] if momentum else None
        first = float(step) == 0
        step += 1

        def update(entries: Tensor, gradient: Tensor, buffer: Tensor | None = buffer, first: bool = first) -> Tensor:
            gradient = _unscaled(gradient, grad_scale, maximize)
            if weight_decay:
                gradient = gradient + weight_decay * entries
            if buffer is None:
                return entries - lr * gradient
            buffer.copy_(gradient if first else momentum * buffer + (1 - dampening) * gradient)
            return entries - lr * (gradient + momentum * buffer if nesterov else buffer)

        _apply(param, grad, chosen, update)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    index: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of ``torch.optim.AdamW`` (Loshchilov & Hutter, ICLR 2019, algorithm 2) on the masked entries."""
    if found_inf is not None and bool(found_inf):
        return
    for param, grad, mean, square, step, chosen in zip(params, grads, exp_avgs, exp_avg_sqs, steps, index, strict=True):
        step += 1
        count = float(step)
        step_size = lr / (1 - beta1**count)
        correction = math.sqrt(1 - beta2**count)

        def update(
            entries: Tensor,
            gradient: Tensor,
            mean: Tensor = mean,
            square: Tensor = square,
            step_size: float = step_size,
            correction: float = correction,
        ) -> Tensor:
            gradient = _unscaled(gradient, grad_scale, maximize)
            mean.copy_(beta1 * mean + (1 - beta1) * gradient)
            square.copy_(beta2 * square + (1 - beta2) * gradient * gradient)
            return entries * (1 - lr * weight_decay) - step_size * (mean / (square.sqrt() / correction + eps))

        _apply(param, grad, chosen, update)
