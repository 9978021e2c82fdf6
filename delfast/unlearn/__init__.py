"""Unlearning: reset what the mask selects, then finetune it on the retain set."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from delfast.batches import LossFn
from delfast.errors import InputError
from delfast.localize import localize
from delfast.localize.scores import check_choice
from delfast.mask import Mask
from delfast.naming import unwrap
from delfast.optim import MaskedSGD
from delfast.reset import Init, reset_
from delfast.unlearn.head import find_head, head_parameters
from delfast.unlearn.loop import Progress, TrainResult, train

Method = Literal["del"]


@dataclass(frozen=True)
class UnlearnResult:
    """``mask``: what was allowed to change (widened by the head). ``seconds``: by stage. ``losses``: by epoch."""

    method: str
    mask: Mask
    head: str
    seconds: dict[str, float]
    losses: list[float]
    resumed_from: int


def unlearn(
    model: nn.Module,
    *,
    forget: Iterable[Any] | None = None,
    retain: Iterable[Any],
    mask: Mask | None = None,
    method: Method = "del",
    init: Init,
    epochs: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 0,
    head: str | None = None,
    loss_fn: LossFn | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    config: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> UnlearnResult:
    """Make ``model`` unlearn the forget set, in place. Outside the mask and the head, every entry stays bit-identical.

    method: "del" (DEL paper, section 3): reset the masked parameters, finetune them and the head on ``retain``, SGD
        with a cosine schedule to 1 % of ``lr`` (published for CIFAR-10/ResNet-18: 0.015, 30 epochs, no weight decay).
    forget: the forget set's batches; needed if ``mask`` is None, which means ``localize(model, forget)``.
    retain: the retain set's batches, re-iterable, with a length.
    init, seed: as for ``reset_``.
    head: name of the classifier head, trained in full; found by a forward pass if None.
    checkpoint, resume: as for ``train``; ``config`` adds to what must be the same when resumed.

    BatchNorm's running statistics are buffers: they move, as in any training.
    Under DDP every process needs the same mask: localize the whole forget set in each.
    Raises InputError for bad arguments, before anything is changed (labels are seen when their batch comes).
    """
    check_choice("method", method, Method)
    if epochs < 1 or not 0 < lr < float("inf"):
        raise InputError(f"expected epochs >= 1 and lr > 0, got {epochs} and {lr}; pass positive numbers")
    network = unwrap(model)
    if mask is None:
        if forget is None:
            raise InputError("expected a mask, or the forget set to localize; pass mask= or forget=")
        mask = localize(network, forget, loss_fn=loss_fn)
    if head is None:
        head = find_head(network, _first_batch(retain), loss_fn)
    heads = head_parameters(network, head)
    widened = mask.widen(list(heads), {name: tuple(parameter.shape) for name, parameter in heads.items()})
    optimizer = MaskedSGD(network.named_parameters(), widened, lr=lr, momentum=momentum, weight_decay=weight_decay)

    seconds = {"reset": 0.0}

    def reset() -> None:
        started = time.perf_counter()
        reset_(network, mask, init, seed)
        seconds["reset"] = time.perf_counter() - started

    settings = {"method": method, "mask": mask.digest, "head": head, "epochs": epochs, "lr": lr}
    settings |= {"momentum": momentum, "weight_decay": weight_decay, "seed": seed}
    result: TrainResult = train(
        model,  # not the network inside: DDP's own forward is what exchanges gradients
        retain,
        optimizer,
        epochs=epochs,
        loss_fn=loss_fn,
        checkpoint=checkpoint,
        resume=resume,
        config={**settings, **(config or {})},
        progress=progress,
        before=reset,
    )
    seconds["finetune"] = result.seconds
    return UnlearnResult(method, widened, head, seconds, result.losses, result.resumed_from)


def _first_batch(loader: Iterable[Any]) -> Any:
    for batch in loader:
        return batch
    raise InputError("expected a retain set of at least one batch, got none; check its loader")


__all__ = ["Method", "UnlearnResult", "train", "unlearn"]
