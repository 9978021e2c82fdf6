"""Unlearning in one call: check the arguments, prepare, train."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from delfast.arguments import check_seed, function_name
from delfast.batches import LossFn, device_of
from delfast.compaction import compact
from delfast.copies import copy_of
from delfast.eval_mode import Versions, refuse_writing_layers
from delfast.execution import Execution
from delfast.graphs import check_cuda_graphs
from delfast.groups import Group
from delfast.joint_calls import averaging, one_error
from delfast.localization import localize
from delfast.localization.competing import left_in, patterns_of
from delfast.mask import Mask
from delfast.naming import is_parallel, model_parameters, trainable_parameters, unwrap
from delfast.optim import MaskedSGD
from delfast.overlap import check_disjoint, check_distinct
from delfast.processes import Processes
from delfast.reset import Init
from delfast.seeding import RESET_SEED
from delfast.sharding import is_laid_out, reshard
from delfast.sole_use import used_alone
from delfast.unlearning.checks import (
    check_localization,
    check_needs,
    check_sharded,
    check_shareable,
    check_types,
    choose,
)
from delfast.unlearning.data_parallel import together, training_processes
from delfast.unlearning.first_pass import check_first_batches
from delfast.unlearning.head import head_parameters
from delfast.unlearning.loop import TrainResult, refuse_checkpoint, train
from delfast.unlearning.method import Method, UnlearningTask
from delfast.unlearning.options import DEFAULT_OPTIONS, TrainingOptions, check_options, separate_options
from delfast.unlearning.shared_steps import SharedSteps
from delfast.unlearning.steps import Step, Steps
from delfast.unlearning.stopping import EarlyStop


@dataclass(frozen=True, repr=False)
class UnlearnResult:
    """Result of ``unlearn``.

    Parameters
    ----------
    method : Method
        The method with the hyperparameters that were used.
    mask : Mask
        The elements that were allowed to change, with the head if the method trains the head.
    head : str or None
        Name of the classifier head; None if the method does not treat the head differently.
    seconds : dict of str to float
        Wall-clock seconds of each stage, "prepare" and "finetune".
    losses : list of float
        Mean training loss of each epoch; empty for a one-shot method.
    resumed_from : int
        Number of epochs that the checkpoint had; 0 without one.
    validation : list of float, default []
        Mean loss of each epoch on the validation set, with early stopping.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> model = torch.nn.Linear(4, 3)
    >>> batches = [(torch.randn(8, 4), torch.arange(8) % 3)]
    >>> result = delfast.unlearn(model, retain=batches, method="finetune", epochs=2)
    >>> result.method.name, len(result.losses), result.mask.selected
    ('finetune', 2, 15)
    """

    method: Method
    mask: Mask
    head: str | None
    seconds: dict[str, float]
    losses: list[float]
    resumed_from: int
    validation: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        losses = f", loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}" if self.losses else ""
        seconds = sum(self.seconds.values())
        return (
            f"UnlearnResult({self.method.name!r}, {self.mask!r}, head={self.head!r}, {len(self.losses)} epochs"
            f"{losses}, {seconds:.3g} s)"
        )


@used_alone
def unlearn(
    model: nn.Module,
    *,
    retain: Iterable[Any] | None,
    forget: Iterable[Any] | None = None,
    mask: Mask | None = None,
    budget: float | None = None,
    strategy: str | None = None,
    init: Init | None = None,
    method: str | Method = "del",
    head: str | None = None,
    loss_fn: LossFn | None = None,
    seed: int = RESET_SEED,
    training: TrainingOptions = DEFAULT_OPTIONS,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    group: Group = None,
    **hyperparameters: Any,
) -> UnlearnResult:
    """Make ``model`` unlearn the forget set, in place.

    Outside the mask and the head, every element of the parameters stays bit-identical. BatchNorm's running statistics
    are buffers: they change as in any training, unless ``TrainingOptions(batchnorm="frozen")`` is passed.

    The network is trained compact (``delfast.compact``). Within DistributedDataParallel or DataParallel, which hold its
    parameters, gradients are dense.

    Under DistributedDataParallel all processes make the same call. Without ``group`` each trains on its own loaders, as
    in any loop, and needs the same mask: localize the whole forget set in each, or with ``localize(..., group=)``. With
    ``group`` the loaders are those of the whole sets: the processes localize together, and a step of W processes is the
    mean of W consecutive steps of one process. In the last step of an epoch the mean is over the batches that are left.
    A validation set is not shared out: each process may pass its own share, or the whole set.
    Masks and settings are compared before anything is changed, and the networks after the method has prepared them.

    FSDP2 (``fully_shard``) is trained with ``group`` in the same way, by "del", "finetune", "gradient-ascent",
    "neggrad+" and "relabel", without a checkpoint. Tensor parallelism is refused.

    Before anything is changed, the loss of the first batch of each set that is used is computed once, in eval mode, and
    random generators are restored. Errors that occur only in a later batch or only in training mode, and errors that
    ``loss_fn`` itself raises, come when they occur: the network is then changed in part. One of them is an InputError
    for a forward pass that writes an element outside the mask.

    Parameters
    ----------
    model : torch.nn.Module
        The network, plain or within DistributedDataParallel, DataParallel or ``torch.compile``.
    retain : iterable of batches or None
        The examples to keep: batches ``(input, target)`` or ``(index, input, target)`` with inputs (N, ...) and integer
        targets (N,), re-iterable and with a length. Without the examples to forget: an overlap is refused where the
        loaders show it (DataLoaders of one data set). None only for "gradient-ascent", which does not use this set.
    forget : iterable of batches, optional
        The examples to forget, in the same form. "del" needs them to localize if ``mask`` is None; "gradient-ascent",
        "neggrad+", "relabel", "influence", "ssd" and "scrub" always need them.
    mask : Mask, optional
        The elements that may change. Default: "del" localizes; with any other method everything may change. The head is
        not trained where the mask was localized with ``include`` or ``exclude`` that leave it out.
    budget : float, default 0.3
        The fraction of all elements that "del" selects by ``delfast.localize``, in (0, 1]; the default is the DEL
        paper's. Refused beside ``mask``, and for other methods: pass them a mask of that budget.
    strategy : str, default "del"
        The strategy of ``delfast.localize``, a key of ``STRATEGIES``; refused where ``budget`` is. Its other arguments,
        and "weighted-grad-all", which reads the whole training set, need a call of ``localize``.
    init : callable, dict of str to tensor, torch.nn.Module or "reset_parameters", optional
        Source of newly initialized values, as for ``delfast.reset_``; needed by "del" and "retrain".
    method : str or Method, default "del"
        A name, which stands for the published hyperparameters ("del", "finetune", "gradient-ascent", "neggrad+",
        "relabel", "l1-sparse", "influence", "ssd", "scrub", "retrain"), or an instance such as ``Scrub(alpha=0.1)``.
    head : str, optional
        Name of the classifier head, which "del" trains in full. Default: the layer whose output is the network's output
        (a tensor, or its ``.logits``), up to views and casts; refused if there is none, or more than one.
    loss_fn : callable, optional
        ``loss_fn(model, batch)``, which returns losses (N,), for batches of another form. Not for methods that need
        logits ("relabel" and "scrub").
    seed : int, default 241202432
        Seed of the newly initialized values, of the strategies that select at random, and of the labels that "relabel"
        draws. The default is the number of DEL's paper, which no usual training begins from. With the seed that the
        training of ``model`` began from, "del" restores the values that the training began with.
    training : TrainingOptions, optional
        Options of the training loop: precision, BatchNorm, early stopping, progress.
    checkpoint : str or pathlib.Path, optional
        File that is written after every epoch, completely or not at all; see ``train``.
    resume : bool, default False
        Continue from ``checkpoint`` if the file exists. The run ends with the weights of an uninterrupted run.
    group : torch.distributed.ProcessGroup or DeviceMesh, optional
        The processes that share the sets: those over which ``model`` averages gradients, all of its
        DistributedDataParallel or the whole mesh of ``fully_shard``. Loaders with a
        DistributedSampler for the group are used as they are. Not for "influence" and "ssd". The ``checkpoint`` is a
        file for each process.
    **hyperparameters : Any
        Hyperparameters of the method, which replace its own: ``epochs``, ``lr``, ``momentum``, ``weight_decay``,
        ``schedule``, and those of the method alone, such as ``alpha``. None keeps the method's value.

    Returns
    -------
    UnlearnResult
        The method, mask, head, losses and seconds of the run.

    Raises
    ------
    InputError
        For bad arguments, before anything is changed. Under DistributedDataParallel also if masks or settings differ
        between the processes. With ``group``, all processes raise the error of one.
    Diverged
        If the loss is no longer finite. The network is then of no use.

    References
    ----------
    Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization", TMLR 2025,
    arXiv 2412.02432.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> def make_model():
    ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> model = make_model()
    >>> retain = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(2)]
    >>> forget = [(torch.randn(4, 4), torch.arange(4) % 3)]
    >>> result = delfast.unlearn(model, retain=retain, forget=forget, budget=0.3, init=make_model, seed=1, epochs=2)
    >>> result.head, len(result.losses)
    ('2', 2)
    >>> result = delfast.unlearn(model, retain=retain, forget=forget, method="scrub", epochs=1, alpha=0.01)
    >>> result.method.alpha
    0.01
    """
    wrapper = None if group is None else averaging(model)
    with one_error(group if wrapper is None else wrapper.process_group, model):
        training, hyperparameters = separate_options(training, hyperparameters, stacklevel=3)  # past used_alone
        processes = training_processes(model, group)
        with together(processes):
            prepared = _prepared(
                model, retain, forget, mask, budget, strategy, init, method, head, loss_fn, seed, training, checkpoint,
                resume, hyperparameters, processes, shares=group is not None,
            )  # fmt: skip
        if processes is not None:
            prepared.check_same(processes)
        return prepared.run(training, checkpoint, resume)


@dataclass(frozen=True)
class _Prepared:
    """The arguments of ``unlearn``, checked and prepared; nothing is changed yet."""

    method: Method
    task: UnlearningTask
    steps: Steps | None
    mask: Mask
    head: str | None
    everything_may_change: bool
    early_stop: EarlyStop | None
    settings: dict[str, object]
    processes: Processes | None
    computed_in: str  # the precision of forward passes: a caller's autocast counts

    def check_same(self, processes: Processes) -> None:
        """Raise InputError, on every process, unless all have the same mask and settings, and sets if they share."""
        processes.check_same_mask(f"{self.task.mask.digest} {self.mask.digest}")
        processes.check_same(
            f"{sorted(self.settings.items(), key=str)} {function_name(self.task.loss_fn)} {self.computed_in}",
            "expected the same method, head, seed and options on every process, got others; make the same call",
        )
        if isinstance(self.steps, SharedSteps):
            self.steps.check(self.task.network)

    def run(self, training: TrainingOptions, checkpoint: str | Path | None, resume: bool) -> UnlearnResult:
        """Change the network."""
        if self.steps is None:
            seconds = {"prepare": _prepare(self.method, self.task, self.processes), "finetune": 0.0}
            return UnlearnResult(self.method, self.mask, self.head, seconds, [], 0)
        result, prepare_seconds = _finetune(self, self.steps, training=training, checkpoint=checkpoint, resume=resume)
        seconds = {"prepare": prepare_seconds, "finetune": result.seconds}
        return UnlearnResult(
            self.method, self.mask, self.head, seconds, result.losses, result.resumed_from, result.validation
        )


def _prepared(
    model: nn.Module,
    retain: Iterable[Any] | None,
    forget: Iterable[Any] | None,
    mask: Mask | None,
    budget: float | None,
    strategy: str | None,
    init: Init | None,
    method: str | Method,
    head: str | None,
    loss_fn: LossFn | None,
    seed: int,
    training: TrainingOptions,
    checkpoint: str | Path | None,
    resume: bool,
    hyperparameters: dict[str, Any],
    processes: Processes | None,
    *,
    shares: bool,
) -> _Prepared:
    """Check the arguments of ``unlearn``, localize, and return what is ready to run."""
    check_types(retain, forget, mask, head, loss_fn, checkpoint, resume)
    refuse_writing_layers(model)
    seed = check_seed(seed)
    chosen = choose(method, hyperparameters)
    check_needs(chosen, retain, forget, mask, init, loss_fn)
    localization = check_localization(chosen, mask, budget, strategy, forget, loss_fn, seed)
    check_options(training, chosen)
    check_disjoint({"forget": forget}, {"retain": retain, "validation": training.validation})
    check_distinct({"retain": retain}, {"validation": training.validation})
    group = processes if shares else None
    network = unwrap(model)
    if group is not None:
        check_shareable(chosen, training)
    if is_laid_out(network):
        check_sharded(chosen)
        refuse_checkpoint(network, checkpoint)
    check_cuda_graphs(training.cuda_graphs, device_of(network))  # in vain after a reset

    everything_may_change = mask is None and localization is None
    sets = {"retain": () if retain is None else retain, "forget": () if forget is None else forget}
    steps: Steps | None = None
    if group is not None:
        steps = SharedSteps(chosen.step_plan, group, **sets, forget_epochs=chosen.forget_epochs)
    elif chosen.epochs:
        steps = Steps(chosen.step_plan, **sets, forget_epochs=chosen.forget_epochs)
    early_stop = _early_stop(training, loss_fn)
    teacher = copy_of(network).eval() if "teacher" in chosen.needs else None
    widest = full_mask(network) if mask is None else mask
    task = UnlearningTask(
        network,
        network,
        sets["retain"],
        sets["forget"],
        mask=widest,
        init=init,
        seed=seed,
        loss_fn=loss_fn,
        teacher=teacher,
        execution=Execution(channels_last=training.channels_last),  # ``train`` sets the precision
    )

    first = check_first_batches(
        chosen,
        task,
        sets if steps is None else steps.sets,
        validation=training.validation,
        bf16=training.precision == "bf16" and steps is not None,
        frozen_batchnorm=training.batchnorm == "frozen",
        find_head=chosen.trains_head and head is None,
        processes=group if is_laid_out(network) else None,
    )
    reshard(network)
    head = (first.head if head is None else head) if chosen.trains_head else None
    heads = {} if head is None else head_parameters(network, head)  # refused before a localization, which takes longer
    selected = widest
    if localization is not None:
        selected = localize(
            network,
            forget,
            **localization,
            channels_last=training.channels_last,
            cuda_graphs=training.cuda_graphs,
            group=None if group is None else group.data,
        )
    heads = left_in(network, heads, patterns_of(selected))
    widened = _widened(selected, heads) if chosen.trains_head else selected
    task = replace(task, model=model, mask=selected, classes=first.classes)
    if steps is None:
        selected.match(trainable_parameters(network, sharded=True))  # raises for a mask of another architecture
    else:
        first.refuse_sparse(network, widened)
    settings = {**_settings(chosen, selected, head, seed, training), **(training.config or {})}
    if group is not None:
        settings["processes"] = group.size
    computed_in = Execution(training.precision).computed_in(device_of(network))
    return _Prepared(
        chosen, task, steps, widened, head, everything_may_change, early_stop, settings, processes, computed_in
    )


def _early_stop(training: TrainingOptions, loss_fn: LossFn | None) -> EarlyStop | None:
    """Return the early stop that the options set."""
    if training.validation is None or training.patience is None:
        return None
    return EarlyStop(training.validation, training.patience, loss_fn)


def _widened(mask: Mask, parameters: Mapping[str, Tensor]) -> Mask:
    """Return the mask widened by all of these parameters."""
    return mask.widen(list(parameters), {name: tuple(parameter.shape) for name, parameter in parameters.items()})


def _settings(method: Method, mask: Mask, head: str | None, seed: int, training: TrainingOptions) -> dict[str, object]:
    """Return what must be equal when a checkpoint is resumed."""
    settings = {**asdict(method), "method": method.name, "mask": mask.digest, "head": head, "seed": seed}
    settings |= {"precision": training.precision, "batchnorm": training.batchnorm, "patience": training.patience}
    return settings | ({"dense": sorted(training.dense)} if training.dense else {})


def _prepare(method: Method, task: UnlearningTask, processes: Processes | None) -> float:
    """Run the method's ``prepare``; return the seconds."""
    started = time.perf_counter()
    with together(processes):
        method.prepare(task)
    if processes is not None:
        processes.check_same_values(model_parameters(task.network, sharded=True))
    return time.perf_counter() - started


def _finetune(
    prepared: _Prepared, steps: Steps, *, training: TrainingOptions, checkpoint: str | Path | None, resume: bool
) -> tuple[TrainResult, float]:
    """Train compact within the mask, after the method's ``prepare`` on the plain network; also return its seconds."""
    method, task, mask = prepared.method, prepared.task, prepared.mask
    model, network = task.model, task.network
    prepare_seconds = 0.0
    dense = is_parallel(model) or is_laid_out(network)
    with nullcontext() if dense else compact(network, mask, dense=training.dense) as handle:
        trained = mask if handle is None else handle.mask
        trained_task = task if handle is None else replace(task, mask=trained)
        outside = {} if prepared.everything_may_change else _outside(network, trained)
        versions: list[Versions] = []  # from the first step on, after the checkpoint or the reset

        def prepare() -> None:
            nonlocal prepare_seconds
            with nullcontext() if handle is None else handle.undone():
                prepare_seconds = _prepare(method, task, prepared.processes)

        def loss(_: nn.Module, step: Step) -> Tensor:
            if not versions:
                versions.append(Versions(outside, network))
            loss = method.loss(trained_task, step).reshape(1)
            versions[0].check()
            return loss

        # a caller's own method may compute with anything, as a caller's loss_fn
        loss.is_pure = task.loss_fn is None and type(method).__module__.startswith("delfast.")  # type: ignore[attr-defined]
        steps.values = partial(method.values, trained_task)
        result = train(
            model,  # not the network inside: DDP's own forward is what exchanges gradients
            steps,
            MaskedSGD(
                network.named_parameters(),
                trained,
                lr=method.lr,
                momentum=method.momentum,
                weight_decay=method.weight_decay,
            ),
            epochs=method.epochs,
            schedule=method.schedule,
            loss_fn=loss,
            precision=training.precision,
            channels_last=training.channels_last,
            cuda_graphs=training.cuda_graphs,
            batchnorm=training.batchnorm,
            early_stop=prepared.early_stop,
            checkpoint=checkpoint,
            resume=resume,
            config=prepared.settings,
            progress=training.progress,
            before=prepare,
        )
    return result, prepare_seconds


def _outside(network: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Return the parameters in which the mask selects nothing."""
    parameters = model_parameters(network, sharded=True)
    inside = {name for name, _, _ in mask.match(parameters)}
    return {name: parameter for name, parameter in parameters.items() if name not in inside}


def full_mask(network: nn.Module) -> Mask:
    """Return the mask that selects every trainable parameter in full."""
    return _widened(Mask({}), trainable_parameters(network, sharded=True))
