"""The one training loop: pretraining, the oracle and every finetune run through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from delfast.arguments import check_int, check_number
from delfast.batches import LossFn, check_differentiable, device_of, per_example_losses
from delfast.errors import InputError, check_choice
from delfast.files import load_archive, save_archive, unreadable_types
from delfast.plain import as_json, unboxed
from delfast.sole_use import used_alone
from delfast.unlearning.batchnorm import batchnorm_explained
from delfast.unlearning.loaders import Randomness, batch_count, refuse_persistent_workers, set_epoch
from delfast.unlearning.steps import Steps
from delfast.unlearning.stopping import EarlyStop

Schedule = Literal["cosine", "constant"]
Precision = Literal["fp32", "bf16"]
BatchNormMode = Literal["train", "frozen"]
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""``progress(iterable, description, total)`` -> the same items, shown as they pass."""


class Diverged(RuntimeError):
    """The loss is no longer finite."""


@dataclass(frozen=True)
class TrainResult:
    """``losses``: mean training loss of each epoch. ``seconds``: of this call. ``resumed_from``: epochs done before.
    ``validation``: with early stopping, the mean loss of each epoch on the examples held out; the network is that of
    the lowest.
    """

    losses: list[float]
    seconds: float
    epochs: int
    resumed_from: int
    validation: list[float]


@used_alone
def train(
    model: nn.Module,
    loader: Iterable[Any],
    optimizer: Optimizer,
    *,
    epochs: int,
    schedule: Schedule = "cosine",
    final_lr: float = 0.01,
    loss_fn: LossFn | None = None,
    max_norm: float | None = None,
    precision: Precision = "fp32",
    batchnorm: BatchNormMode = "train",
    early_stop: EarlyStop | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, object] | None = None,
    progress: Progress | None = None,
    before: Callable[[], None] | None = None,
) -> TrainResult:
    """Train ``model`` in place for ``epochs`` passes over ``loader``.

    loader: re-iterable of batches, with a length; ``set_epoch(e)`` of it, its samplers and its data set is called where
        it exists.
    schedule: "cosine" from the optimizer's rate to ``final_lr`` times it, step by step (DEL paper, appendix: to 1 %).
    before: called once everything is checked, and only where training starts at its first epoch.
    max_norm: clip the gradient's L2 norm to this.
    precision: "bf16" runs the forward pass under ``torch.autocast``; parameters, their gradients and the optimizer stay
        as they are.
    batchnorm: "frozen" leaves running statistics as they are, to the bit, and normalizes by them, as in eval mode.
    early_stop: looks at the network after every epoch, may end the training, and puts the best epoch's state back.
    checkpoint: a file written after every epoch, whole or not at all. ``resume``: continue from it if it is there;
        the run then ends with the weights it would have had without the interruption. ``config``: plain JSON values
        that must be the same when it is resumed. A checkpoint has the generators of torch, numpy and Python, and every
        one that a loader, its samplers, its data set or their transforms hold. Persistent workers, whose generators
        cannot be saved, are refused. Under DDP these are each process's own: give each a file of its own. A state that
        could not be read again (a class of its own in a module's extra state) is refused before the first epoch.
        Generators that a loader makes later are refused when the first checkpoint would be written.

    A model in training mode keeps the modes of its modules (a BatchNorm set to eval stays frozen); one in eval mode is
    put into training mode. Afterwards all modes are as they were.

    Raises InputError for bad arguments or a checkpoint of another run, Diverged, a RuntimeError, if the loss is no
    longer finite, and OSError, with the file's name, if the checkpoint cannot be written.
    """
    epochs, final_lr = check_int("epochs", epochs), check_number("final_lr", final_lr)
    if epochs < 1:
        raise InputError(f"expected epochs >= 1, got {epochs}; pass how many passes over the data to make")
    max_norm = None if max_norm is None else check_number("max_norm", max_norm)
    check_choice("precision", precision, Precision)
    check_choice("batchnorm", batchnorm, BatchNormMode)
    step_count = batch_count(loader, "training")
    for group in optimizer.param_groups:  # numpy's numbers: no checkpoint could be read, and float32 ones round
        group.update({name: unboxed(value) for name, value in group.items() if name != "params"})
    scheduler = LambdaLR(optimizer, _factor(schedule, final_lr, epochs * step_count))
    parts = {"optimizer": optimizer, "scheduler": scheduler} | ({"early_stop": early_stop} if early_stop else {})
    parts["model"] = model  # the last to be put back: what another part refuses leaves it as it is
    record = _Checkpoint(checkpoint, dict(config or {}), loader, parts)
    if early_stop is not None:
        early_stop.reset()
    losses = record.load(epochs) if resume else []
    resumed_from = len(losses)
    if before is not None and not losses:
        before()
    started = time.perf_counter()
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    if batchnorm == "frozen":
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.eval()
    try:
        for epoch in range(resumed_from, epochs):
            if early_stop is not None and early_stop.finished:
                break
            set_epoch(loader, epoch)
            batches = progress(loader, f"epoch {epoch + 1}/{epochs}", step_count) if progress else loader
            with torch.inference_mode(False), torch.enable_grad(), batchnorm_explained():
                losses.append(_run_epoch(model, batches, optimizer, scheduler, loss_fn, max_norm, precision))
            if not math.isfinite(losses[-1]):
                raise Diverged(f"the loss of epoch {epoch + 1} is {losses[-1]}; lower the learning rate")
            if early_stop is not None:
                early_stop.update(model)
            record.save(losses)
        if early_stop is not None:
            early_stop.restore(model)
    finally:
        for module, mode in modes:
            module.training = mode
        model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    return TrainResult(losses, seconds, epochs, resumed_from, early_stop.losses if early_stop else [])


def _run_epoch(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: Optimizer,
    scheduler: LambdaLR,
    loss_fn: LossFn | None,
    max_norm: float | None,
    precision: Precision,
) -> float:
    """One pass; the mean loss over its examples."""
    kind = device_of(model).type
    total, examples = torch.zeros((), dtype=torch.float64, device="cpu"), 0
    for batch in batches:
        model.zero_grad(set_to_none=True)
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
            losses = per_example_losses(model, batch, loss_fn)
        check_differentiable(losses)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        scheduler.step()
        total = total.to(losses.device) + losses.detach().double().sum()
        examples += losses.numel()
    return float(total) / max(1, examples)


def _factor(schedule: Schedule, final_lr: float, steps: int) -> Callable[[int], float]:
    """Rate at a step, as a fraction of the optimizer's."""
    if schedule == "constant":
        return lambda step: 1.0
    if schedule == "cosine":  # Loshchilov & Hutter, SGDR, ICLR 2017, equation 5, without restarts
        return lambda step: final_lr + (1 - final_lr) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2
    raise InputError(f"expected schedule 'cosine' or 'constant', got '{schedule}'; pass one of these")


class _Checkpoint:
    """Everything that the next epoch depends on: weights, optimizer, schedule, every generator."""

    def __init__(
        self,
        path: str | Path | None,
        config: dict[str, object],
        loader: Iterable[Any],
        parts: dict[str, Any],
    ) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.parent.is_dir():
            raise InputError(f"expected the directory of checkpoint '{path}' to exist, it does not; make it first")
        self.config = config if path is None else as_json(config, "the config of a checkpoint")
        self.parts = parts
        if path is None:
            return
        loaders = loader.sets if isinstance(loader, Steps) else {"training": loader}
        if "early_stop" in parts:
            loaders = {**loaders, "validation": parts["early_stop"].validation}
        for what, each in loaders.items():
            refuse_persistent_workers(each, what)
        self.randomness = Randomness(loaders.values())
        self._check_readable()

    def save(self, losses: list[float]) -> None:
        if self.path is None:
            return
        self.randomness.search_again()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"losses": losses, "config": self.config, "randomness": self.randomness.state()}
        save_archive(self.path, state)

    def load(self, epochs: int) -> list[float]:
        """Put everything back; the losses so far. Without a checkpoint there is nothing to continue: []."""
        if self.path is None or not self.path.is_file():
            return []
        try:
            state = load_archive(self.path)
        except ValueError as error:
            raise InputError(f"checkpoint '{self.path}' cannot be read: {error}; start without --resume") from None
        if (
            not isinstance(state, dict)
            or not isinstance(state.get("config"), dict)
            or not {*self.parts, "losses", "config", "randomness"} <= state.keys()
        ):
            raise InputError(f"'{self.path}' is no checkpoint of this loop; start without --resume")
        if len(state["losses"]) > epochs:
            raise InputError(
                f"checkpoint '{self.path}' has {len(state['losses'])} epochs behind it, more than {epochs}; "
                "ask for more epochs, or start without --resume"
            )
        if state["config"] != self.config:
            different = sorted(
                k for k in {*state["config"], *self.config} if state["config"].get(k) != self.config.get(k)
            )
            raise InputError(
                f"checkpoint '{self.path}' is of a run with other settings ({', '.join(different)}); "
                "use the same settings, or start without --resume"
            )
        self._check(state)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.randomness.restore(state["randomness"])
        losses: list[float] = state["losses"]
        return losses

    def _check_readable(self) -> None:
        """InputError if some part's state could be saved to a checkpoint and not be read from it."""
        for name, part in self.parts.items():
            types = unreadable_types(part.state_dict())
            if types:
                raise InputError(
                    f"expected the {name}'s state to hold tensors and plain values, got {', '.join(types)}: no "
                    "checkpoint of it could be read; keep tensors there, or leave checkpoint out"
                )

    def _check(self, state: dict[str, Any]) -> None:
        """InputError for what could not be put back whole."""
        randomness = state["randomness"]
        gpus = torch.cuda.device_count() if "cuda" in randomness and torch.cuda.is_available() else 0
        for what, had, has in (
            ("network", *(_shapes(each) for each in (state["model"], self.parts["model"].state_dict()))),
            ("optimizer", *(_sizes(each) for each in (state["optimizer"], self.parts["optimizer"].state_dict()))),
            ("number of generators in the loader", len(randomness["loaders"]), len(self.randomness.generators)),
            ("kind of generators in the loader", randomness["kinds"], self.randomness.kinds),
            ("number of GPUs", len(randomness["cuda"]) if gpus else 0, gpus),
        ):
            if had != has:
                raise InputError(
                    f"checkpoint '{self.path}' is of a run with another {what}; use the same one, or start without "
                    "--resume"
                )


def _sizes(state: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in state["param_groups"]]


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}
