"""Optimizers that change masked elements only, and keep state for masked elements only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from delfast.arguments import check_flag, check_number, describe
from delfast.errors import InputError
from delfast.mask import Mask
from delfast.masked_optimizer import MaskedOptimizer
from delfast.masked_optimizer import OpPart as OpPart  # pickles of earlier versions name it here

__all__ = ["MaskedAdamW", "MaskedSGD"]


class MaskedSGD(MaskedOptimizer):
    """``torch.optim.SGD`` on the masked elements of a network's parameters.

    Formulas and arguments are those of torch; unmasked elements stay bit-identical.

    Parameters
    ----------
    named_parameters : iterable of (str, Tensor), or of dict
        ``model.named_parameters()``, or parameter groups whose "params" are such pairs. They include every parameter
        that the mask selects; other parameters are never changed.
    mask : Mask
        The elements to step.
    lr : float or Tensor, default 1e-3
        Learning rate. A tensor of one number is read on its device at each step, so a captured CUDA graph follows a
        schedule.
    momentum : float, default 0.0
        Momentum factor; 0 keeps no state.
    dampening : float, default 0.0
        Dampening of the momentum.
    weight_decay : float, default 0.0
        L2 penalty on the masked elements.
    nesterov : bool, default False
        Whether to use Nesterov's momentum; it requires ``momentum`` > 0 and ``dampening`` = 0.
    maximize : bool, default False
        Whether to ascend instead of descend.

    Raises
    ------
    InputError
        For values out of range, parameters without names, and a mask of another architecture.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> layer = torch.nn.Linear(2, 2)
    >>> mask = delfast.Mask.from_dense({"weight": torch.tensor([[1, 1], [0, 0]]), "bias": torch.tensor([0, 0])})
    >>> optimizer = delfast.optim.MaskedSGD(layer.named_parameters(), mask, lr=0.1, momentum=0.9)
    >>> before = layer.weight.detach().clone()
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> (layer.weight != before).tolist()
    [[True, True], [False, False]]
    """

    state_name = "momentum_buffer"
    state_kinds = ("momentum_buffer",)

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        mask: Mask,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            named_parameters,
            mask,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
            },
        )

    def _check_options(self, options: dict[str, Any]) -> None:
        _check_range(**{name: options[name] for name in ("lr", "momentum", "weight_decay")})
        check_number("dampening", options["dampening"])
        check_flag("nesterov", options["nesterov"])
        check_flag("maximize", options["maximize"])
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise InputError("expected momentum > 0 and dampening = 0 with nesterov; change one of the three")

    def _state_count(self, group: dict[str, Any]) -> int:
        return 1 if group["momentum"] else 0

    def _update(self, group: dict[str, Any], *arguments: Any) -> None:
        *tensors, amp = arguments
        torch.ops.delfast.masked_sgd_(
            *tensors,
            **_lr_arguments(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            **amp,
        )


class MaskedAdamW(MaskedOptimizer):
    """``torch.optim.AdamW`` on the masked elements of a network's parameters.

    Formulas, arguments and default values are those of torch; unmasked elements stay bit-identical.

    Parameters
    ----------
    named_parameters : iterable of (str, Tensor), or of dict
        ``model.named_parameters()``, or parameter groups whose "params" are such pairs. They include every parameter
        that the mask selects; other parameters are never changed.
    mask : Mask
        The elements to step.
    lr : float or Tensor, default 1e-3
        Learning rate. A tensor of one number is read on its device at each step, so a captured CUDA graph follows a
        schedule.
    betas : tuple of float, default (0.9, 0.999)
        Decay rates of the running means of the gradient and of its square, each in [0, 1).
    eps : float, default 1e-8
        Added to the denominator.
    weight_decay : float, default 1e-2
        Decoupled weight decay of the masked elements.
    maximize : bool, default False
        Whether to ascend instead of descend.

    Raises
    ------
    InputError
        For values out of range, parameters without names, and a mask of another architecture.

    References
    ----------
    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv 1711.05101.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> layer = torch.nn.Linear(2, 2)
    >>> mask = delfast.Mask.from_dense({"weight": torch.tensor([[1, 1], [0, 0]]), "bias": torch.tensor([0, 0])})
    >>> optimizer = delfast.optim.MaskedAdamW(layer.named_parameters(), mask, lr=0.1)
    >>> before = layer.weight.detach().clone()
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> (layer.weight != before).tolist()
    [[True, True], [False, False]]
    """

    state_name = "moments"  # two values per masked element: all of exp_avg, then all of exp_avg_sq
    state_kinds = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        mask: Mask,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            named_parameters,
            mask,
            {
                "lr": lr,
                "betas": tuple(betas) if isinstance(betas, list) else betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
        )

    def _check_options(self, options: dict[str, Any]) -> None:
        _check_range(**{name: options[name] for name in ("lr", "eps", "weight_decay")})
        check_flag("maximize", options["maximize"])
        betas = options["betas"]
        if not isinstance(betas, tuple) or len(betas) != 2:
            raise InputError(f"expected betas to be two numbers, got {describe(betas)}; pass a pair in [0, 1)")
        if not all(0 <= check_number("betas", beta) < 1 for beta in betas):
            raise InputError(f"expected betas in [0, 1), got {betas}; pass two such numbers")

    def _state_count(self, group: dict[str, Any]) -> int:
        return 2

    def _update(self, group: dict[str, Any], *arguments: Any) -> None:
        *tensors, amp = arguments
        torch.ops.delfast.masked_adamw_(
            *tensors,
            **_lr_arguments(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            **amp,
        )


def _lr_arguments(lr: float | Tensor) -> dict[str, Any]:
    """Return the op's arguments for a learning rate. A captured CUDA graph reads a tensor at every replay."""
    return {"lr": 0.0, "lr_tensor": lr} if isinstance(lr, Tensor) else {"lr": float(lr)}


def _check_range(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not (isinstance(value, Tensor) and name == "lr" and value.numel() == 1):
            check_number(name, value)
        if not 0 <= value < float("inf"):
            raise InputError(f"expected {name} >= 0, got {value}; pass a finite, non-negative number")
