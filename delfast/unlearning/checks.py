"""The checks of ``unlearn``'s arguments: their types, what the method needs, what several processes can do."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from delfast.arguments import check_flag, check_function, check_loader, check_path, check_type
from delfast.batches import LossFn
from delfast.errors import InputError
from delfast.localization import BUDGET, WHOLE_TRAINING_SET, check_localize
from delfast.localization.criteria import WITHOUT_SET
from delfast.mask import Mask
from delfast.unlearning.method import Method
from delfast.unlearning.methods import Del
from delfast.unlearning.options import TrainingOptions
from delfast.unlearning.registry import find_method, hyperparameter_names, make_method

SHARDED = ("del", "finetune", "gradient-ascent", "neggrad+", "relabel")  # methods for FSDP2
OF_TRAINING = {each.name for each in fields(Method)} - {"epochs"}  # without effect on a method that trains nothing


def check_shareable(method: Method, training: TrainingOptions) -> None:
    """Raise InputError for what processes cannot do together."""
    if not method.epochs:
        raise InputError(
            f"expected no group for '{method.name}', which each process computes from its own sets, got one; leave "
            "group out, and pass every process the whole sets"
        )
    if training.cuda_graphs is True:
        raise InputError(
            "expected cuda_graphs='auto' or False with group=, whose processes exchange more than gradients in each "
            "step, got True; leave it out"
        )


def check_sharded(method: Method) -> None:
    """Raise InputError for a method that cannot run with FSDP2: only FSDP2's own passes gather the parameters."""
    if method.name not in SHARDED or type(method).__module__ != Del.__module__:
        raise InputError(
            f"expected one of {', '.join(SHARDED)} for FSDP2, got '{method.name}', which reads or copies whole "
            "parameters, or was not tested; use DistributedDataParallel"
        )


def check_types(
    retain: object,
    forget: object,
    mask: object,
    head: object,
    loss_fn: object,
    checkpoint: object,
    resume: object,
) -> None:
    """Raise InputError for arguments of ``unlearn`` of another type."""
    for what, loader in (("retain set", retain), ("forget set", forget)):
        if loader is not None:
            check_loader(loader, what)
    check_type("mask", mask, (Mask, type(None)), "a delfast.Mask or None")
    check_type("head", head, (str, type(None)), "the name of a module or None")
    check_function("loss_fn", loss_fn)
    check_flag("resume", resume)
    if checkpoint is not None and Path(check_path("checkpoint", checkpoint)).is_dir():
        raise InputError(f"expected checkpoint to be a file, got the directory '{checkpoint}'; name a file in it")


def choose(method: str | Method, hyperparameters: dict[str, Any]) -> Method:
    """Return the method with these hyperparameters. InputError for an unknown keyword, or one without effect."""
    method = find_method(method)
    known = hyperparameter_names(method)
    for name in hyperparameters:
        if name not in known:
            raise InputError(
                f"unlearn has no parameter '{name}', and '{method.name}' no such hyperparameter: it has "
                f"{', '.join(known)}; options of the training loop are fields of TrainingOptions"
            )
    given = {name: value for name, value in hyperparameters.items() if value is not None}
    chosen = make_method(method, given)
    for name, value in given.items():
        if name in OF_TRAINING and not chosen.epochs:
            raise InputError(
                f"expected no {name}= for '{chosen.name}', which trains nothing, got {value}; leave it out"
            )
    return chosen


def check_needs(
    method: Method,
    retain: object,
    forget: object,
    mask: object,
    init: object,
    loss_fn: object,
) -> None:
    """Raise InputError for a missing argument that the method needs, and for one that it cannot use."""
    if retain is not None or not method.epochs or method.step_plan != "forget":
        check_loader(retain, "retain set")
    needed = {"forget": forget, "init": init}
    for name in sorted(method.needs & needed.keys()):
        if needed[name] is None:
            raise InputError(f"expected {name}= for '{method.name}', got none; pass it")
    if "everything" in method.needs and mask is not None:
        raise InputError(f"expected no mask for '{method.name}', which changes everything, got one; leave mask out")
    if "logits" in method.needs and loss_fn is not None:
        raise InputError(
            f"expected no loss_fn for '{method.name}', which needs logits and labels, got one; leave loss_fn out, or "
            "choose another method"
        )


def check_localization(
    method: Method,
    mask: Mask | None,
    budget: float | None,
    strategy: str | None,
    forget: object,
    loss_fn: LossFn | None,
    seed: int,
) -> dict[str, Any] | None:
    """Return the arguments with which ``unlearn`` calls ``localize``, or None if it does not call it.

    InputError for a budget or strategy without effect, and for values that ``localize`` refuses.
    """
    given: dict[str, Any] = {"budget": budget, "strategy": strategy}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not method.localizes:
            raise InputError(
                f"expected no {name}= for '{method.name}', which does not localize, got {value!r}; pass "
                f"mask=delfast.localize(..., {name}=...)"
            )
        if mask is not None:
            raise InputError(f"expected {name}= or mask=, got both; leave {name} out, or the mask")
    if not method.localizes or mask is not None:
        return None
    arguments = {"budget": BUDGET, "strategy": "del", "loss_fn": loss_fn, "seed": seed, **given}
    criterion, _ = check_localize(**arguments)
    if arguments["strategy"] in WHOLE_TRAINING_SET:
        raise InputError(
            f"expected a strategy that reads the forget set, got {strategy!r}, which reads the whole training set; "
            "pass mask=delfast.localize(...) of that set"
        )
    if forget is None and criterion not in WITHOUT_SET:
        raise InputError("expected a mask, or the forget set to localize; pass mask= or forget=")
    return arguments
