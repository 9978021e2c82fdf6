"""Unlearning: a method, within a mask, on the forget and retain sets."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from delfast.arguments import check_choice, check_flag, check_function, check_loader, check_path, check_seed, check_type
from delfast.batches import LossFn, Versions, refuse_writing_layers
from delfast.compaction import compact
from delfast.copies import copy_of
from delfast.errors import InputError
from delfast.localization import localize
from delfast.mask import Mask
from delfast.naming import is_parallel, trainable_parameters, unique_parameters, unwrap
from delfast.optim import MaskedSGD
from delfast.reset import Init
from delfast.sole_use import used_alone
from delfast.unlearning.first import first_pass
from delfast.unlearning.head import head_parameters
from delfast.unlearning.loop import BatchNormMode, Precision, Progress, train
from delfast.unlearning.methods import (
    Job,
    Method,
    required,
)
from delfast.unlearning.registry import make_method
from delfast.unlearning.steps import Turn, Turns
from delfast.unlearning.stopping import EarlyStop


@dataclass(frozen=True)
class UnlearnResult:
    """``method``: with the hyperparameters that were used. ``mask``: what was allowed to change, with the head if the
    method trains it. ``seconds``: by stage, "prepare" and "finetune". ``losses``: by epoch; ``validation``: those on
    the examples held out. ``head``: None where the method gives it no part of its own. ``resumed_from``: how many
    epochs the checkpoint had.
    """

    method: Method
    mask: Mask
    head: str | None
    seconds: dict[str, float]
    losses: list[float]
    resumed_from: int
    validation: list[float] = field(default_factory=list)


@used_alone
def unlearn(
    model: nn.Module,
    *,
    retain: Iterable[Any] | None,
    forget: Iterable[Any] | None = None,
    mask: Mask | None = None,
    method: str | Method = "del",
    init: Init | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    seed: int = 0,
    head: str | None = None,
    loss_fn: LossFn | None = None,
    precision: Precision = "fp32",
    batchnorm: BatchNormMode = "train",
    dense: Collection[str] = (),
    validation: Iterable[Any] | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> UnlearnResult:
    """Make ``model`` unlearn the forget set, in place. Outside the mask and the head, every entry stays bit-identical.

    method: a name, with its published hyperparameters, or an instance, ``Scrub(alpha=0.1)``: "del", "finetune",
        "gradient-ascent", "neggrad+", "relabel", "l1-sparse", "influence", "ssd", "scrub", "retrain". ``epochs``,
        ``lr``, ``momentum`` and ``weight_decay`` replace its own, if it trains.
    forget, retain: batches, re-iterable, with a length. "del" needs the forget set to localize, if mask is None.
        ``retain`` may be None for "gradient-ascent", which does not use it.
    mask: what may change. None: "del" localizes it, ``localize(model, forget)``; any other method changes everything.
    init, seed: as for ``reset_``, so not the seed that training began from; for "del" and "retrain". The seed draws
        "relabel"'s labels too.
    head: name of the classifier head, which "del" trains in full. None: the layer whose output is the network's output
        (a tensor, or its ``.logits``), up to views and casts; refused where there is none or more than one.
    loss_fn: ``loss_fn(model, batch)`` -> (B,) losses, for batches that are not (input, target) or (index, input,
        target); not for methods that need logits.
    dense: names of parameters to train with a dense gradient, as for ``compact``; the masks stay as they are.
    validation, patience: batches held out of the retain set; training ends after ``patience`` epochs without a lower
        loss on them, and the network is that of the lowest.
    precision, batchnorm, checkpoint, resume, progress: as for ``train``; ``config`` adds to what must be the same when
        resumed.
        They have no effect on "influence" and "ssd", one-shot methods in float32.

    BatchNorm's running statistics are buffers: they move, as in any training.
    The network is trained compact (``delfast.compact``); within DDP or DataParallel, which have taken its parameters as
    they are, gradients are dense. Under DDP every process needs the same mask: localize the whole forget set in each.
    Raises InputError for bad arguments, before anything is changed. The loss of the first batch of each set that is
    used is computed for that, once, in eval mode, and random generators are put back. Errors that show in a later batch
    or in training mode only, and errors of the loss_fn's own, are raised when they occur: the network is then changed
    in part. One of them is an InputError for a forward pass that writes a parameter outside the mask. Raises Diverged,
    a RuntimeError, if the loss is no longer finite: the network is then of no use.
    """
    given = {"epochs": epochs, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    _check_arguments(retain, forget, validation, mask, head, loss_fn, checkpoint, resume, config, progress)
    refuse_writing_layers(model)
    seed = check_seed(seed)
    chosen = make_method(method, {name: value for name, value in given.items() if value is not None})
    if retain is not None or not chosen.epochs or chosen.layout != "forget":
        check_loader(retain, "retain set")
    network = unwrap(model)
    needed = {"forget": forget, "init": init}
    if chosen.localizes and mask is None and forget is None:
        raise InputError("expected a mask, or the forget set to localize; pass mask= or forget=")
    for name in sorted(chosen.needs & needed.keys()):
        if needed[name] is None:
            raise InputError(f"expected {name}= for '{chosen.name}', got none; pass it")
    if "everything" in chosen.needs and mask is not None:
        raise InputError(f"'{chosen.name}' changes everything, got a mask; leave mask out")
    if "logits" in chosen.needs and loss_fn is not None:
        raise InputError(f"'{chosen.name}' needs logits and labels, not losses; leave loss_fn out, or choose another")
    if (validation is None) != (patience is None):
        raise InputError("expected validation= and patience= together, got one; pass both, or neither")
    unused = [name for name in ("lr", "momentum", "weight_decay") if given[name] is not None and not chosen.epochs]
    if unused:
        raise InputError(f"'{chosen.name}' trains nothing, got {unused[0]}={given[unused[0]]}; leave it out")
    if dense and not chosen.epochs:
        raise InputError(f"expected no dense= for '{chosen.name}', which trains nothing, got {dense!r}; leave it out")
    if patience is not None and not chosen.epochs:
        raise InputError(f"expected no patience for '{chosen.name}', which has no epochs, got {patience}; leave it out")
    check_choice("precision", precision, Precision)
    check_choice("batchnorm", batchnorm, BatchNormMode)
    retain = () if retain is None else retain
    turns = Turns(chosen.layout, retain, forget, chosen.forget_epochs) if chosen.epochs else None
    early_stop = None if validation is None or patience is None else EarlyStop(validation, patience, loss_fn)
    teacher = copy_of(network).eval() if "teacher" in chosen.needs else None
    whole = full_mask(network) if mask is None else mask
    job = Job(network, network, retain, () if forget is None else forget, whole, init, seed, loss_fn, teacher)
    first = first_pass(
        chosen,
        job,
        {"retain": retain, "forget": job.forget} if turns is None else turns.sets,
        validation=validation,
        bf16=precision == "bf16" and turns is not None,
        frozen_batchnorm=batchnorm == "frozen",
        find_head=chosen.trains_head and head is None,
    )
    head = (first.head if head is None else head) if chosen.trains_head else None
    heads = {} if head is None else head_parameters(network, head)
    everything_may_change = mask is None and not chosen.localizes
    if mask is None:
        mask = localize(network, required(forget), loss_fn=loss_fn) if chosen.localizes else whole
    widened = mask
    if chosen.trains_head:
        widened = mask.widen(list(heads), {name: tuple(parameter.shape) for name, parameter in heads.items()})
    job = replace(job, model=model, mask=mask)
    settings = {**asdict(chosen), "method": chosen.name, "mask": mask.digest, "head": head, "seed": seed}
    settings |= {"precision": precision, "batchnorm": batchnorm, "patience": patience}
    settings |= {"dense": sorted(dense)} if dense else {}
    seconds = {"prepare": 0.0, "finetune": 0.0}

    def prepare() -> None:
        started = time.perf_counter()
        chosen.prepare(job)
        seconds["prepare"] = time.perf_counter() - started

    if turns is None:
        list(mask.match(trainable_parameters(network)))  # raises if the mask is of another architecture
        prepare()
        return UnlearnResult(chosen, widened, head, seconds, [], 0)
    first.refuse_sparse(network, widened)
    with nullcontext() if is_parallel(model) else compact(network, widened, dense=dense) as handle:
        training = job if handle is None else replace(job, mask=handle.mask)

        def prepare_whole() -> None:
            with nullcontext() if handle is None else handle.undone():
                prepare()

        trained = widened if handle is None else handle.mask
        outside = {} if everything_may_change else _outside(network, trained)
        versions: list[Versions] = []  # from the first step on, after the checkpoint or the reset

        def losses(_: nn.Module, turn: Turn) -> Any:
            if not versions:
                versions.append(Versions(outside, network))
            loss = chosen.loss(training, turn).reshape(1)
            versions[0].check()
            return loss

        result = train(
            model,  # not the network inside: DDP's own forward is what exchanges gradients
            turns,
            MaskedSGD(
                network.named_parameters(),
                trained,
                lr=chosen.lr,
                momentum=chosen.momentum,
                weight_decay=chosen.weight_decay,
            ),
            epochs=chosen.epochs,
            schedule=chosen.schedule,
            loss_fn=losses,
            precision=precision,
            batchnorm=batchnorm,
            early_stop=early_stop,
            checkpoint=checkpoint,
            resume=resume,
            config={**settings, **(config or {})},
            progress=progress,
            before=prepare_whole,
        )
    seconds["finetune"] = result.seconds
    return UnlearnResult(chosen, widened, head, seconds, result.losses, result.resumed_from, result.validation)


def _check_arguments(
    retain: object,
    forget: object,
    validation: object,
    mask: object,
    head: object,
    loss_fn: object,
    checkpoint: object,
    resume: object,
    config: object,
    progress: object,
) -> None:
    """InputError for arguments of ``unlearn`` of another type."""
    for what, loader in (("retain set", retain), ("forget set", forget), ("validation set", validation)):
        if loader is not None:
            check_loader(loader, what)
    check_type("mask", mask, (Mask, type(None)), "a delfast.Mask or None")
    check_type("head", head, (str, type(None)), "the name of a module or None")
    check_type("config", config, (Mapping, type(None)), "a mapping or None")
    check_function("loss_fn", loss_fn)
    check_function("progress", progress)
    check_flag("resume", resume)
    if checkpoint is not None and Path(check_path("checkpoint", checkpoint)).is_dir():
        raise InputError(f"expected checkpoint to be a file, got the directory '{checkpoint}'; name a file in it")


def _outside(network: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """The parameters in which the mask selects nothing."""
    parameters = dict(unique_parameters(network.named_parameters()))
    inside = {name for name, _, _ in mask.match(parameters)}
    return {name: parameter for name, parameter in parameters.items() if name not in inside}


def full_mask(network: nn.Module) -> Mask:
    """Every trainable parameter in full."""
    parameters = trainable_parameters(network)
    return Mask({}).widen(list(parameters), {name: tuple(p.shape) for name, p in parameters.items()})
