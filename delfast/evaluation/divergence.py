"""Distance of a network's predictions from an oracle's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.arguments import check_loader, check_tensors
from delfast.batches import device_of
from delfast.device_checks import prefixed
from delfast.errors import InputError
from delfast.evaluation.outputs import Loader, check_examples, check_log_probabilities, collect, join, predict
from delfast.execution import Execution
from delfast.groups import Group
from delfast.joint_calls import one_error


def kl_divergence(log_probabilities: Tensor, oracle_log_probabilities: Tensor) -> float:
    """Return the mean over examples of KL(oracle || method), in nats.

    It is the sum over classes of q (log q - log p), with q the oracle's probabilities and p the method's.

    Parameters
    ----------
    log_probabilities : Tensor
        The method's finite log-probabilities (N, classes).
    oracle_log_probabilities : Tensor
        The oracle's, for the same examples in the same order.

    Returns
    -------
    float
        At least 0; 0 for equal predictions.

    Raises
    ------
    InputError
        For different shapes, no example, and tensors that are no log-probabilities.

    References
    ----------
    Kullback & Leibler, "On Information and Sufficiency", Annals of Mathematical Statistics, 1951.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import kl_divergence
    >>> oracle = torch.tensor([[0.5, 0.5]]).log()
    >>> kl_divergence(oracle, oracle), round(kl_divergence(torch.tensor([[0.9, 0.1]]).log(), oracle), 3)
    (0.0, 0.511)
    """
    check_tensors(log_probabilities=log_probabilities, oracle_log_probabilities=oracle_log_probabilities)
    _check_shapes(log_probabilities, oracle_log_probabilities)
    check_log_probabilities(log_probabilities, "the model")
    check_log_probabilities(oracle_log_probabilities, "the oracle")
    return divergences(log_probabilities, oracle_log_probabilities).mean().item()


def kl_to_oracle(model: nn.Module, oracle: nn.Module, loader: Loader, *, group: Group = None) -> float:
    """Return the ``kl_divergence`` between the predictions of two networks, in eval mode without gradients.

    Each batch goes through both networks, so the loader may shuffle. Both are left as they were, each on its device.

    With ``group`` the processes of a job share the set, as in ``delfast.evaluate``.

    Parameters
    ----------
    model : torch.nn.Module
        The unlearned classifier: ``model(input)`` returns logits (B, classes).
    oracle : torch.nn.Module
        A classifier that was retrained without the forget set.
    loader : iterable
        Batches (input, target) or (index, input, target), with integer targets (B,).
    group : ProcessGroup, DeviceMesh or None, default None
        The processes over which the data differ. The loader is the whole set's on every process, and is shared out as
        for ``delfast.score``. Every process gets the result of all. None: this process reads the whole set.

    Returns
    -------
    float
        Mean over examples of KL(oracle || model), in nats.

    Raises
    ------
    InputError
        For an empty set, labels that a network has no output for, outputs that are not finite, and networks with
        different numbers of classes.
        With ``group`` also for a loader whose shares are not the set, and for parameters that differ between processes.
        For a loader with a DistributedSampler, and for FSDP2, without ``group``.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import kl_to_oracle
    >>> model = torch.nn.Linear(2, 3)
    >>> kl_to_oracle(model, model, [(torch.eye(2), torch.tensor([0, 2]))])
    0.0
    """
    with one_error(group, model, oracle):
        check_loader(loader, "data set")
        execution = Execution()
        networks, processes = join(group, "kl_to_oracle", execution, model=model, oracle=oracle)
        device = device_of(networks[0])

        def of_batch(batch: Any) -> tuple[Tensor, ...]:
            rows = []
            for name, network in zip(("the model", "the oracle"), networks, strict=True):
                with prefixed(name):
                    rows.append(predict(network, batch, execution)[1].to(device))
            return (divergences(*rows),)

        found = [each for (each,) in collect(networks, loader, "data set", of_batch, execution, processes)]
        count = sum(map(len, found))
        check_examples(count, "data set")
        return float(sum(torch.stack([each.sum() for each in found]).tolist())) / count


def divergences(log_probabilities: Tensor, oracle_log_probabilities: Tensor) -> Tensor:
    """Return KL(oracle || model) of each example: float64 (N,), in nats. InputError for different shapes."""
    _check_shapes(log_probabilities, oracle_log_probabilities)
    # normalize again in float64: rows that sum to 1 only within float32's rounding could give less than 0
    log_p = functional.log_softmax(log_probabilities.double(), dim=1)
    log_q = functional.log_softmax(oracle_log_probabilities.double(), dim=1)
    return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1).clamp(min=0)


def _check_shapes(log_probabilities: Tensor, oracle_log_probabilities: Tensor) -> None:
    """Raise InputError unless both are of the same examples and of the same classes, at least two."""
    if log_probabilities.shape != oracle_log_probabilities.shape:
        raise InputError(
            "expected log-probabilities of the same examples and classes, got "
            f"{tuple(log_probabilities.shape)} of the model and {tuple(oracle_log_probabilities.shape)} of the oracle"
        )
    if log_probabilities.ndim == 2 and log_probabilities.shape[1] < 2:
        raise InputError("expected outputs of at least two classes, got one; compare classifiers")
