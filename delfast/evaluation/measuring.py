"""One inference pass of one or more networks over a set: what the audit reads of every example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delfast.batches import IGNORED, LOSS_FN_ADVICE, LossFn, device_of, per_example_losses, plain, tensors_of
from delfast.device_checks import refuse_if
from delfast.errors import InputError
from delfast.evaluation.divergence import divergences
from delfast.evaluation.outputs import (
    check_examples,
    collect,
    join,
    log_complement,
    predict,
    predict_tokens,
    true_class,
)
from delfast.execution import Execution
from delfast.language import is_token_batch


@dataclass(frozen=True, eq=False)
class Measured:
    """One network's measurements of the examples of a set, in the loader's order, on the CPU.

    losses: float64 (N,), each example's cross-entropy, mean loss over its tokens, or loss of ``loss_fn``, in nats.
    right: float64 (N,), the number of its units that are predicted correctly; None with a ``loss_fn``.
    units: float64 (N,), the number of its units: 1, or its counted tokens.
    confidences: float64 (N,), logit-scaled confidences of a classifier, else the negative losses.
    targets: int64 (N,), the classes; None unless it is a classifier.
    classes: the number of a classifier's outputs; None for others.
    examples: float64 (N,), a sum over each example's inputs, by which passes are compared.
    """

    losses: Tensor
    right: Tensor | None
    units: Tensor
    confidences: Tensor
    targets: Tensor | None
    classes: int | None
    examples: Tensor

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.losses)


def measure(
    networks: Sequence[nn.Module], loader: Iterable[Any], name: str, loss_fn: LossFn | None
) -> tuple[list[Measured], Tensor | None]:
    """Measure a set with every network in one pass, in eval mode without gradients.

    Returns each network's measurements, and of two classifiers KL(second || first) of each example, float64 (N,) in
    nats; else None. Raises InputError as ``delfast.evaluate``, which begins with the set's name.
    """
    # a loss_fn may do anything, so it is not captured in a graph
    execution = Execution(cuda_graphs="auto" if loss_fn is None else False)
    for network in networks:
        join(None, "audit", execution, model=network)  # refuses parameters that several processes hold together
    device = device_of(networks[0])
    form = _Form()

    def of_batch(batch: Any) -> tuple[Tensor, ...]:
        columns = [_examples(batch, device)]
        if loss_fn is None and not is_token_batch(batch):
            predicted = [predict(network, batch, execution, LOSS_FN_ADVICE) for network in networks]
            form.classes = predicted[0][1].shape[1]
            columns += [column for targets, logs in predicted for column in _of_classes(targets, logs)]
            if len(networks) == 2:
                columns.append(divergences(*(logs.to(device) for _, logs in predicted)))
            return tuple(columns)
        for network in networks:
            columns += _of_tokens(network, batch, execution) if loss_fn is None else _of_loss(network, batch, loss_fn)
        return tuple(columns)

    found = collect(
        networks, loader, f"{name} set", of_batch, execution, any_form=loss_fn is not None, advice=LOSS_FN_ADVICE
    )
    check_examples(sum(len(each[0]) for each in found), f"{name} set")
    if len({len(each) for each in found}) > 1:
        raise InputError(f"{name} set: expected all batches with 'input_ids' or none, got both; pass one form")
    examples, *columns = (torch.cat(column) for column in zip(*found, strict=True))
    if any(len(column) != len(examples) for column in columns):
        raise InputError(
            f"{name} set: expected a loss for each example, got {len(columns[0])} for {len(examples)} rows of the "
            "first tensor in the batches; return losses (N,) from loss_fn"
        )
    divergence = columns.pop() if form.classes is not None and len(networks) == 2 else None
    width = len(columns) // len(networks)
    parts = [columns[first : first + width] for first in range(0, len(columns), width)]
    return [_measured(part, form.classes, examples) for part in parts], divergence


def same_examples(first: Measured, second: Measured, name: str) -> None:
    """Raise InputError, with the set's name, unless two passes have read the same examples in the same order."""
    same_targets = (first.targets is None) == (second.targets is None)
    if same_targets and first.targets is not None and second.targets is not None:
        same_targets = torch.equal(first.targets, second.targets)
    if not same_targets or not torch.equal(first.examples, second.examples):
        raise InputError(
            f"{name} set: expected the same examples in the same order in every pass, got others; pass a loader "
            "without shuffle and random transforms"
        )


@dataclass
class _Form:
    """The number of a classifier's outputs, once a batch has shown it."""

    classes: int | None = None


def _examples(batch: Any, device: torch.device) -> Tensor:
    """Return a number for each example of a batch, float64 (N,): the sum over its parts, each with its own weight.

    N is the size of the first tensor. Other tensors count if they have as many rows.
    """
    tensors = [tensor.to(device) for tensor in tensors_of(plain(batch)) if tensor.ndim]
    if not tensors:
        raise InputError("expected batches with a tensor of N examples, got none; pass tensors")
    count = len(tensors[0])
    rows = [
        tensor.double().reshape(count, *tensor.shape[1:], 1).flatten(1).sum(1)
        for tensor in tensors
        if len(tensor) == count
    ]
    return torch.stack([(k + 1) * row for k, row in enumerate(rows)]).sum(0).nan_to_num()


def _of_classes(targets: Tensor, logs: Tensor) -> list[Tensor]:
    """Return losses, numbers of correct predictions, logit-scaled confidences and targets (B,)."""
    if logs.shape[1] < 2:
        raise InputError(f"expected outputs of at least two classes, got one; {LOSS_FN_ADVICE}")
    exact = logs.double()
    truth = true_class(exact, targets)
    right = (logs.argmax(1) == targets).double()
    return [-truth, right, truth - log_complement(exact, targets), targets.double()]


def _of_tokens(network: nn.Module, batch: Any, execution: Execution) -> list[Tensor]:
    """Return mean losses, numbers of correct tokens, and numbers of counted tokens (B,)."""
    predicted, targets, losses = predict_tokens(network, batch, execution)
    counts = (targets != IGNORED).sum(1)
    refuse_if((counts == 0).any(), "expected a counted token in every example, got an example without; leave it out")
    # an ignored target is negative, so it equals no prediction
    right = (predicted == targets).sum(1).double()
    return [losses.double().sum(1) / counts.clamp(min=1), right, counts.double()]


def _of_loss(network: nn.Module, batch: Any, loss_fn: LossFn) -> list[Tensor]:
    losses = per_example_losses(network, batch, loss_fn).double()
    refuse_if(~losses.isfinite().all(), "expected finite losses of loss_fn, got NaN or infinity; check the data")
    return [losses]


def _measured(columns: Sequence[Tensor], classes: int | None, examples: Tensor) -> Measured:
    losses = columns[0]
    if len(columns) == 1:
        return Measured(losses, None, torch.ones_like(losses), -losses, None, None, examples)
    if len(columns) == 3:
        return Measured(losses, columns[1], columns[2], -losses, None, None, examples)
    _, right, confidences, targets = columns
    return Measured(losses, right, torch.ones_like(losses), confidences, targets.long(), classes, examples)
