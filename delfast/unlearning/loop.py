"""The training loop that pretraining, the oracle and every unlearning method share."""

from __future__ import annotations

import math
import platform
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

from delfast.arguments import check_choice, check_int, check_loader, check_number
from delfast.batches import LossFn, device_of
from delfast.errors import InputError
from delfast.execution import ChannelsLast, CudaGraphs, Execution, Precision
from delfast.feeding import feed
from delfast.files import load_archive, save_archive, unreadable_types
from delfast.graphs import check_cuda_graphs
from delfast.joint_calls import averaging_processes
from delfast.joint_errors import raised_by_all
from delfast.plain import as_json, unboxed
from delfast.processes import Processes
from delfast.sharding import is_laid_out, reshard
from delfast.sole_use import used_alone
from delfast.unlearning.batchnorm import batchnorm_explained
from delfast.unlearning.data_parallel import met_in_forward, send_buffers, together
from delfast.unlearning.loaders import Randomness, batch_count, refuse_persistent_workers, set_epoch
from delfast.unlearning.shared_steps import SharedSteps
from delfast.unlearning.steps import Steps
from delfast.unlearning.stopping import EarlyStop
from delfast.unlearning.training_step import TrainingStep, frequency

Schedule = Literal["cosine", "constant"]
BatchNormMode = Literal["train", "frozen"]
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""``progress(iterable, description, total)``: returns the same items and displays them as they pass."""


class Diverged(RuntimeError):
    """The loss is no longer finite; the network is of no use.

    Examples
    --------
    >>> from delfast.unlearning import Diverged
    >>> issubclass(Diverged, RuntimeError)
    True
    """


@dataclass(frozen=True)
class TrainResult:
    """Result of ``train``.

    Parameters
    ----------
    losses : list of float
        Mean training loss of each epoch.
    seconds : float
        Wall-clock time of this call.
    epochs : int
        Number of epochs that the call was to train.
    resumed_from : int
        Number of epochs that the checkpoint had; 0 without a checkpoint.
    validation : list of float
        With early stopping, the mean validation loss of each epoch; the network has the weights of the lowest.

    Examples
    --------
    >>> from delfast.unlearning.loop import TrainResult
    >>> TrainResult(losses=[2.3, 0.4], seconds=1.5, epochs=2, resumed_from=0, validation=[]).losses[-1]
    0.4
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
    channels_last: ChannelsLast = "auto",
    cuda_graphs: CudaGraphs = "auto",
    batchnorm: BatchNormMode = "train",
    early_stop: EarlyStop | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, object] | None = None,
    progress: Progress | None = None,
    before: Callable[[], None] | None = None,
) -> TrainResult:
    """Train ``model`` in place for ``epochs`` passes over ``loader``.

    A model in training mode keeps the modes of its modules: a BatchNorm set to eval stays frozen. A model in eval mode
    is trained in training mode. Afterwards every module has the mode that it had before.

    Under DistributedDataParallel the losses are means over the examples of all processes, which stop together. After
    every epoch all have the first one's buffers, as after the wrapper's next forward pass. Under FSDP2 too losses are
    means over all processes, which stop together; buffers stay each process's own.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    loader : iterable of batches
        Batches ``(input, target)`` or ``(index, input, target)`` with inputs (N, ...) and integer targets (N,),
        re-iterable and with a length. ``set_epoch(e)`` of the loader, its samplers and its data set is called where it
        exists.
    optimizer : torch.optim.Optimizer
        Optimizer of the parameters to train; its learning rate is that of the first step.
    epochs : int
        Number of passes, at least 1.
    schedule : {"cosine", "constant"}, default "cosine"
        "cosine" lowers the learning rate from step to step, to ``final_lr`` times the first.
    final_lr : float, default 0.01
        Last learning rate as a part of the first; DEL paper, appendix.
    loss_fn : callable, optional
        ``loss_fn(model, batch)``, which returns losses (N,). Default: cross-entropy of class indices.
    max_norm : float, optional
        Maximum of the gradient's L2 norm; larger gradients are clipped. Default: no clipping.
    precision : {"fp32", "bf16"}, default "fp32"
        "bf16" runs the forward pass under ``torch.autocast``. Parameters, gradients and the optimizer's state keep
        their dtype.
    channels_last : {"auto", True, False}, default "auto"
        Whether images (N, C, H, W) are laid out channels-last. "auto" follows the model's convolution weights.
    cuda_graphs : {"auto", True, False}, default "auto"
        Whether to capture the steps in CUDA graphs. "auto" does so on a GPU for shapes with at least 8 batches
        in all epochs, without a ``loss_fn``. True states that the ``loss_fn`` is a pure function of tensors. A step
        that cannot be captured is launched by the host; the reason is logged.
    batchnorm : {"train", "frozen"}, default "train"
        "frozen" normalizes by BatchNorm's running statistics, as in eval mode, and leaves them unchanged, to the bit.
    early_stop : EarlyStop, optional
        Measures the network after every epoch, may end training, and restores the best epoch's state.
    checkpoint : str or pathlib.Path, optional
        File that is written after every epoch, completely or not at all. It holds the generators of torch, numpy and
        Python, and every generator that a loader, its samplers, its data set or their transforms hold. Under
        DistributedDataParallel these belong to one process: use a file for each, or it is refused. Not for a network
        of DTensors.
    resume : bool, default False
        Continue from ``checkpoint`` if the file exists. The run ends with the weights of an uninterrupted run.
    config : mapping of str to plain JSON values, optional
        Values that must be equal when the checkpoint is resumed.
    progress : callable, optional
        ``progress(iterable, description, total)``, which returns the same items and displays them as they pass.
    before : callable, optional
        Called after the checks, if training starts at its first epoch.

    Returns
    -------
    TrainResult
        ``losses`` (mean training loss of each epoch), ``seconds``, ``epochs``, ``resumed_from`` and ``validation``.

    Raises
    ------
    InputError
        For bad arguments, or a checkpoint of another run. With ``checkpoint``, before the first epoch: for persistent
        workers, whose generators cannot be saved, and for a state that could not be read again (an object of another
        class in a module's extra state). When the first checkpoint is written: for generators that a loader makes
        later.
    Diverged
        If the loss is no longer finite.
    OSError
        If the checkpoint cannot be written; with the name of the file.

    References
    ----------
    Cosine schedule: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
    equation 5, without restarts.

    Examples
    --------
    >>> import torch
    >>> from delfast.unlearning import train
    >>> model = torch.nn.Linear(4, 3)
    >>> batches = [(torch.randn(8, 4), torch.arange(8) % 3)]
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> result = train(model, batches, optimizer, epochs=2)
    >>> len(result.losses), round(optimizer.param_groups[0]["lr"], 6)
    (2, 0.001)
    """
    shares = loader if isinstance(loader, SharedSteps) else None
    processes = averaging_processes(model) if shares is None else shares.processes
    with together(processes):
        epochs, final_lr = check_int("epochs", epochs), check_number("final_lr", final_lr)
        if epochs < 1:
            raise InputError(f"expected epochs >= 1, got {epochs}; pass how many passes over the data to make")
        max_norm = None if max_norm is None else check_number("max_norm", max_norm)
        execution = Execution(precision, channels_last, cuda_graphs)
        execution.check()
        check_cuda_graphs(cuda_graphs, device_of(model))
        check_choice("batchnorm", batchnorm, BatchNormMode)
        check_loader(loader, "training set")
        step_count = batch_count(loader, "training")
        refuse_checkpoint(model, checkpoint)
        for group in optimizer.param_groups:  # numpy's numbers: a checkpoint cannot be read, and float32 rounds
            group.update({name: unboxed(value) for name, value in group.items() if name != "params"})
        scheduler = LambdaLR(optimizer, _factor(schedule, final_lr, epochs * step_count))
        parts = {"optimizer": optimizer, "scheduler": scheduler} | ({"early_stop": early_stop} if early_stop else {})
        parts["model"] = model  # loaded last: an error of another part leaves the model unchanged
        record = _Checkpoint(checkpoint, dict(config or {}), loader, parts)
        if early_stop is not None:
            early_stop.reset()
        if processes is not None:
            _refuse_one_file(checkpoint, processes)
        losses = record.load(epochs) if resume else []
    resumed_from = len(losses)
    if processes is not None:
        processes.check_same(
            str(resumed_from),
            f"expected checkpoints of as many epochs on every process, got others than {resumed_from}; restore the "
            "files, or pass resume=False to begin again",
        )
    if before is not None and not losses:
        before()
    started = time.perf_counter()
    fed = loader
    if isinstance(loader, Steps):
        loader.feed(device_of(model))
    else:
        fed = feed(loader, device_of(model))
    step = TrainingStep(
        model,
        optimizer,
        loss_fn,
        max_norm,
        execution,
        frequency(loader, epochs, cuda_graphs),
        processes,
        in_step=shares is not None,
    )
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
            batches = progress(fed, f"epoch {epoch + 1}/{epochs}", step_count) if progress else fed
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                batchnorm_explained(),
                met_in_forward(model, None if shares is None else processes),
            ):
                losses.append(step.run_epoch(batches, scheduler))
            if not math.isfinite(losses[-1]):
                advice = "lower the learning rate, and begin with the original network"
                error = Diverged(f"the loss of epoch {epoch + 1} is {losses[-1]}; {advice}")
                raise raised_by_all(error)  # the mean over all processes
            send_buffers(model, processes)
            if early_stop is not None:
                early_stop.update(model)
            record.save(losses)
        if early_stop is not None:
            early_stop.restore(model)
    finally:
        for module, mode in modes:
            module.training = mode
        if shares is not None:
            reshard(model)
        model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    return TrainResult(losses, seconds, epochs, resumed_from, early_stop.losses if early_stop else [])


def refuse_checkpoint(model: nn.Module, checkpoint: object) -> None:
    """Raise InputError for a checkpoint of DTensors: a file does not record whose part of them it holds."""
    if checkpoint is not None and is_laid_out(model):
        raise InputError(
            "expected no checkpoint= for a network of DTensors (FSDP2 or tensor parallelism), got one; train with "
            "MaskedSGD and torch.distributed.checkpoint in a loop of your own"
        )


def _refuse_one_file(checkpoint: str | Path | None, processes: Processes) -> None:
    """Raise InputError if all of several processes on one machine have the same checkpoint."""
    place = processes.rank if checkpoint is None else f"{platform.node()} {Path(checkpoint).absolute()}"
    if processes.is_same(str(place)) and processes.size > 1:
        raise InputError(
            f"expected a checkpoint file for each process, got '{checkpoint}' for all; put the rank into its name"
        )


def _factor(schedule: Schedule, final_lr: float, steps: int) -> Callable[[int], float]:
    """Return the function of the step that gives the learning rate as a part of the optimizer's."""
    if schedule == "constant":
        return lambda step: 1.0
    if schedule == "cosine":
        return lambda step: final_lr + (1 - final_lr) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2
    raise InputError(f"expected schedule 'cosine' or 'constant', got '{schedule}'; pass one of these")


class _Checkpoint:
    """The file that holds what the next epoch depends on: weights, optimizer, schedule, every generator."""

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
        """Write the file, if there is a path."""
        if self.path is None:
            return
        self.randomness.search_again()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"losses": losses, "config": self.config, "randomness": self.randomness.state()}
        save_archive(self.path, state)

    def load(self, epochs: int) -> list[float]:
        """Load the state into the parts; return the losses of the epochs before, [] without a file."""
        if self.path is None or not self.path.is_file():
            return []
        try:
            state = load_archive(self.path)
        except ValueError as error:
            raise InputError(
                f"checkpoint '{self.path}' cannot be read: {error}; "
                "restore the file, or pass resume=False to begin again"
            ) from None
        if (
            not isinstance(state, dict)
            or not isinstance(state.get("config"), dict)
            or not {*self.parts, "losses", "config", "randomness"} <= state.keys()
        ):
            raise InputError(
                f"'{self.path}' is no checkpoint of this loop; restore the file, or pass resume=False to begin again"
            )
        if len(state["losses"]) > epochs:
            raise InputError(
                f"checkpoint '{self.path}' has {len(state['losses'])} epochs, more than {epochs}; "
                "pass more epochs, or pass resume=False to begin again"
            )
        if state["config"] != self.config:
            different = sorted(
                k for k in {*state["config"], *self.config} if state["config"].get(k) != self.config.get(k)
            )
            raise InputError(
                f"checkpoint '{self.path}' is of a run with other settings ({', '.join(different)}); "
                "use the same settings, or pass resume=False to begin again"
            )
        self._check(state)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.randomness.restore(state["randomness"])
        losses: list[float] = state["losses"]
        return losses

    def _check_readable(self) -> None:
        """Raise InputError for a part whose state could be saved to a checkpoint but not read from it."""
        for name, part in self.parts.items():
            types = unreadable_types(part.state_dict())
            if types:
                raise InputError(
                    f"expected the {name}'s state to hold tensors and plain values, got {', '.join(types)}: no "
                    "checkpoint of it could be read; keep tensors there, or leave checkpoint out"
                )

    def _check(self, state: dict[str, Any]) -> None:
        """Raise InputError for a state that does not fit the parts."""
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
