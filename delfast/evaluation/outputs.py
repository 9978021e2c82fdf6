"""A network's outputs for each example of a set: log-probabilities, the input of accuracies and attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.arguments import check_loader, check_tensors
from delfast.batches import Indexed, class_indices, device_of, move, split_batch
from delfast.device_checks import DeviceChecks, prefixed, refuse_if
from delfast.errors import InputError
from delfast.eval_mode import evaluating
from delfast.execution import ChannelsLast, CudaGraphs, Execution, Precision
from delfast.feeding import feed
from delfast.graphs import Graphed, make_backend
from delfast.groups import Group
from delfast.joint_calls import one_error
from delfast.language import is_token_batch, next_token_logits, next_token_losses
from delfast.loaders import is_frequent
from delfast.naming import model_parameters, unwrap
from delfast.processes import NO_BATCH, Processes, joined
from delfast.sharding import fsdp_modules, is_laid_out, reshard, whole
from delfast.shares import refuse_sharded, share

Loader = Iterable[Any]  # batches (input, target) or (index, input, target)
Predictions = tuple[Tensor, Tensor]  # log-probabilities (N, classes), targets (N,)

FORM_ADVICE = "change what the loader and the model return"  # of the functions that take no ``loss_fn``

# Maximum distance from 1 of a row's sum of probabilities: the rounding of bfloat16 over a few hundred classes
SUM_TOLERANCE = 1e-2


def predictions(
    model: nn.Module,
    loader: Loader,
    *,
    precision: Precision = "fp32",
    channels_last: ChannelsLast = "auto",
    cuda_graphs: CudaGraphs = "auto",
    group: Group = None,
) -> Predictions:
    """Return a network's log-probabilities for every example of a set, in eval mode without gradients.

    The model is left as it was.

    With ``group`` the processes of a job share the set, as in ``delfast.evaluate``.

    Parameters
    ----------
    model : torch.nn.Module
        Classifier: ``model(input)`` returns logits (B, classes).
    loader : iterable
        Batches (input, target) or (index, input, target), with integer targets (B,).
    precision : {"fp32", "bf16"}, default "fp32"
        "bf16" runs the forward passes under ``torch.autocast``.
    channels_last : {"auto", True, False}, default "auto"
        Whether images (N, C, H, W) are laid out channels-last. "auto" follows the model's convolution weights.
    cuda_graphs : {"auto", True, False}, default "auto"
        Whether to replay the passes as CUDA graphs; "auto" does so on a GPU, for at least 8 batches of a shape.
    group : ProcessGroup, DeviceMesh or None, default None
        The processes over which the data differ. The loader is the whole set's on every process, and is shared out as
        for ``delfast.score``. Every process gets the result of all. None: this process reads the whole set.

    Returns
    -------
    log_probabilities : Tensor
        Float32 (N, classes) in nats, on the CPU, in the loader's order.
    targets : Tensor
        Int64 (N,), on the CPU.

    Raises
    ------
    InputError
        For an empty set, labels that the model has no output for, and outputs that are not finite.
        With ``group`` also for a loader whose shares are not the set, and for parameters that differ between processes.
        For a loader with a DistributedSampler, and for FSDP2, without ``group``.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import predictions
    >>> log_probabilities, targets = predictions(torch.nn.Identity(), [(torch.zeros(1, 4), torch.tensor([2]))])
    >>> log_probabilities.exp(), targets
    (tensor([[0.2500, 0.2500, 0.2500, 0.2500]]), tensor([2]))
    """
    with one_error(group, model):
        check_loader(loader, "data set")
        execution = Execution(precision, channels_last, cuda_graphs)
        execution.check()
        (network,), processes = join(group, "predictions", execution, model=model)
        found = collect(
            (network,), loader, "data set", lambda batch: predict(network, batch, execution), execution, processes
        )
        check_examples(sum(len(labels) for labels, _ in found), "data set")
        return torch.cat([rows for _, rows in found]), torch.cat([labels for labels, _ in found])


def join(
    group: Group, settings: str, execution: Execution, **models: nn.Module
) -> tuple[list[nn.Module], Processes | None]:
    """Return the networks to run, and the processes of the job; the models and None if this process works alone.

    settings: the other arguments that must be the same on all processes, as text. Raises InputError, on every process,
    for a group that does not fit the models, and for models that are not the same everywhere.
    """
    networks = [unwrap(model) for model in models.values()]
    if group is None and not any(fsdp_modules(network) or is_laid_out(network) for network in networks):
        return list(models.values()), None
    job = networks[0] if len(networks) == 1 else nn.ModuleDict(dict(zip(models, networks, strict=True)))
    parameters = model_parameters(job, sharded=True)
    computed = [execution.computed_in(device_of(network)) for network in networks]  # a caller's autocast counts
    processes = joined(job, group, parameters, f"{settings} {execution} {computed}")
    if processes is not None:
        processes.check_same_values(parameters)
    return networks, processes


def collect(
    models: Sequence[nn.Module],
    loader: Loader,
    where: str,
    function: Callable[[Any], tuple[Tensor, ...]],
    execution: Execution,
    processes: Processes | None = None,
    *,
    any_form: bool = False,
    advice: str = FORM_ADVICE,
) -> list[tuple[Tensor, ...]]:
    """Return what ``function`` computes of every batch, (input, target) or a language model's mapping, on the CPU.

    The models, which the function runs in their order, are in eval mode without gradients, and are left as they were.
    The host does not wait for a device before the end of the set. The texts of errors begin with ``where``.

    processes: those of ``join``, which share the set. Each gets the results of all, in the set's order. A result is a
    tuple of numbers, and of tensors with a row for each example.

    any_form: whether ``function`` is given each batch as the loader yields it, as a ``loss_fn`` is. advice: as for
    ``split_batch``.
    """
    with prefixed(where):
        if processes is None:
            refuse_sharded(loader)
            return _run(models, loader, function, execution, any_form=any_form, advice=advice)
        shared = share(loader, processes, None, advice)
        with processes.together():
            found = _run(
                models,
                shared.batches,
                function,
                execution,
                processes,
                shared.stand_in,
                any_form=any_form,
                advice=advice,
            )
        shared.finish()
    places = None if shared.places is None else shared.places[: sum(map(_rows, found))]
    # as arrays: a pickled tensor has a storage of its own
    gathered = processes.gather_data((places, [tuple(t.numpy() for t in result) for result in found]))
    parts = [[tuple(map(torch.from_numpy, each)) for each in part] for _, part in gathered]
    return _in_order(parts, [each for each, _ in gathered])


def _run(
    models: Sequence[nn.Module],
    loader: Loader,
    function: Callable[[Any], tuple[Tensor, ...]],
    execution: Execution,
    processes: Processes | None = None,
    stand_in: Callable[[], Any] | None = None,
    *,
    any_form: bool,
    advice: str,
) -> list[tuple[Tensor, ...]]:
    """Return what ``function`` computes of every batch of this process; arguments as for ``collect`` and ``Share``.

    Networks whose parameters several processes hold together run in step.
    """
    device = device_of(models[0])
    in_step = processes is not None and any(map(is_laid_out, models))
    checks = DeviceChecks(device)
    can_capture = not in_step and all(device_of(model) == device for model in models)
    run = Graphed(
        function,
        make_backend(execution.cuda_graphs, device) if can_capture else None,
        state=checks.tensors,
        is_frequent=is_frequent(loader, 1, execution.cuda_graphs),
        watched=tuple(models),
    )

    def result_of(batch: Any) -> tuple[Tensor, ...]:
        if not any_form and not isinstance(batch, Indexed) and not is_token_batch(batch):
            batch = split_batch(batch, advice)[1:]
        return tuple(t.to("cpu", non_blocking=True) for t in run(batch))

    with ExitStack() as stack:
        if in_step:
            for model in models:
                stack.callback(reshard, model)
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(checks)
        batches = feed(loader, device)
        if processes is not None:
            processes.copy_from_first(dict(nn.ModuleList(models).named_buffers()))
        if processes is None or stand_in is None or not in_step:
            found = [result_of(batch) for batch in batches]
        else:
            found = []
            for batch in processes.in_step(batches):
                with processes.in_one_pass(*models):
                    result = result_of(stand_in() if batch is NO_BATCH else batch)
                if batch is not NO_BATCH:
                    found.append(result)
    checks.read()  # waits for the copies too, which are on the same stream
    return found


def _rows(result: tuple[Tensor, ...]) -> int:
    """Return the number of examples of a result."""
    return max((len(each) for each in result if each.ndim), default=0)


def _in_order(parts: list[list[tuple[Tensor, ...]]], places: list[Sequence[int] | None]) -> list[tuple[Tensor, ...]]:
    """Return the results of all processes in the set's order; places as for ``Share``.

    With places each result gets as many rows as it has, but those that follow in the set.
    """
    found = [each for turn in zip_longest(*parts) for each in turn if each is not None]
    if len({len(each) for each in found}) != 1 or any(each is None for each in places):
        return found
    order = torch.tensor([place for each in places for place in each or ()]).argsort()
    columns: list[Sequence[Tensor]] = []
    for place, first in enumerate(found[0]):
        column = [each[place] for each in found]
        if first.ndim:
            rows = torch.cat([each[place] for part in parts for each in part])
            column = list(torch.split(rows[order], [len(each) for each in column]))
        columns.append(column)
    return list(zip(*columns, strict=True))


def predict(model: nn.Module, batch: Any, execution: Execution, advice: str = FORM_ADVICE) -> tuple[Tensor, Tensor]:
    """Return a batch's targets (B,) and float32 log-probabilities (B, classes), on the model's device, in its mode.

    Raises InputError for bad labels and outputs that are not finite.
    """
    _, inputs, targets = split_batch(batch, advice)
    device = device_of(model)
    with execution.autocast(device):
        logits = whole(model(execution.laid_out(move(inputs, device), model)))
    targets = class_indices(targets, logits, ignored=None, advice=advice)  # an ignored example has no accuracy
    refuse_if(
        ~logits.isfinite().all(),
        "expected finite outputs of the model, got NaN or infinity; train it with a lower rate",
    )
    return targets, functional.log_softmax(logits.float(), dim=1)


def predict_tokens(model: nn.Module, batch: Any, execution: Execution) -> tuple[Tensor, Tensor, Tensor]:
    """Return predicted tokens (B, T), their targets (B, T), IGNORED where none counts, and the losses (B, T), there 0.

    Position t predicts token t + 1. Raises InputError as ``causal_lm_loss``, and for losses that are not finite.
    """
    with execution.autocast(device_of(model)):
        logits, targets = next_token_logits(model, batch)
    losses = next_token_losses(logits, targets)
    refuse_if(
        ~losses.isfinite().all(),
        "expected finite losses of the tokens, got NaN or infinity; train the model with a lower rate",
    )
    return logits.argmax(2), targets, losses


def check_examples(count: int, where: str) -> None:
    """Raise InputError if there is no example."""
    if not count:
        raise InputError(f"{where}: expected at least one example, got none")


def check_predictions(log_probabilities: Tensor, targets: Tensor, where: str) -> None:
    """Raise InputError for a pair that ``predictions`` could not return.

    It must have at least one example, at least two classes, and finite rows of probabilities that sum to 1.
    """
    check_tensors(targets=targets)
    check_log_probabilities(log_probabilities, where)
    try:
        class_indices(targets, log_probabilities, ignored=None, advice="see delfast.evaluation.predictions")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def check_log_probabilities(log_probabilities: Tensor, where: str) -> None:
    """Raise InputError unless (N, classes) finite, N >= 1, classes >= 2, and each row's exponentials sum to 1."""
    check_tensors(log_probabilities=log_probabilities)
    if log_probabilities.ndim != 2 or log_probabilities.shape[1] < 2 or not log_probabilities.is_floating_point():
        raise InputError(
            f"{where}: expected log-probabilities (N, classes) of at least two classes, got {log_probabilities.dtype} "
            f"{tuple(log_probabilities.shape)}; see delfast.evaluation.predictions"
        )
    check_examples(len(log_probabilities), where)
    if not log_probabilities.isfinite().all():
        raise InputError(f"{where}: expected finite log-probabilities, got NaN or infinity; pass log_softmax of logits")
    sums = log_probabilities.double().exp().sum(1)
    worst = sums[(sums - 1).abs().argmax()].item()
    if not abs(worst - 1) <= SUM_TOLERANCE:
        raise InputError(
            f"{where}: expected log-probabilities, whose exponentials sum to 1, got a row that sums to {worst:.4g}; "
            "pass log_softmax of logits, or log of probabilities"
        )


def true_class(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probabilities (N,) of the true classes."""
    return log_probabilities.gather(1, targets[:, None].long()).squeeze(1)


def log_complement(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """Return log(1 - p) (N,), with p each row's probability of its class in ``classes`` (N,).

    It is the log of the sum of the other classes' probabilities, which keeps its relative precision where p rounds to 1
    and 1 - p to 0.
    """
    return log_probabilities.scatter(1, classes[:, None].long(), -torch.inf).logsumexp(1)


def logit_confidences(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return logit-scaled confidences log(p / (1 - p)) in the true class, the input of ``u_lira``.

    Under this scaling, which is LiRA's, confidences are about Gaussian. It is computed as log p minus the log of the
    other classes' sum, which is finite and precise for any finite logits.

    Parameters
    ----------
    log_probabilities : Tensor
        Log-probabilities (N, classes) in nats, as ``predictions`` returns them.
    targets : Tensor
        Integer labels (N,).

    Returns
    -------
    Tensor
        Float64 (N,).

    Raises
    ------
    InputError
        For tensors that are no predictions.

    References
    ----------
    Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022, arXiv 2112.03570.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import logit_confidences
    >>> logit_confidences(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0]))
    tensor([0.], dtype=torch.float64)
    """
    check_predictions(log_probabilities, targets, "predictions")
    exact = log_probabilities.double()
    return true_class(exact, targets) - log_complement(exact, targets)
