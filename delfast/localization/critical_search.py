"""The greedy search of CritMem over one batch: every example is evaluated with its own channels set to zero."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.batches import (
    class_indices,
    cut,
    detached,
    device_of,
    examples_in,
    inputs_and_targets,
    per_example_losses,
)
from delfast.errors import InputError
from delfast.execution import Execution
from delfast.localization.per_example.batch import BatchRun
from delfast.localization.per_example.capture import Layer, Use
from delfast.localization.per_example.channels import ChannelReceiver, ChannelSums
from delfast.localization.per_example.layers import BatchAxis
from delfast.localization.per_example.passes import ExamplePasses
from delfast.naming import model_parameters

log = logging.getLogger("delfast")

LogitsFn = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""``logits_fn(model, batch) -> logits (N, classes), labels int64 (N,)``."""

# ``score`` and ``localize`` take no logits_fn
LOGITS_FN_ADVICE = "pass logits_fn(model, batch) -> (logits, labels) to critmem"


class Search:
    """The search over one batch. Columns are the channels of the passes' parameters, side by side."""

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, Tensor],
        logits_fn: LogitsFn | None,
        include_head: bool,
        execution: Execution,
    ) -> None:
        self.network = network
        self.sums = _SearchedSums(network)
        self.passes = ExamplePasses(network, parameters, self._losses, self.sums, execution)
        self.checks = self.passes.checks
        self.execution = execution
        self.logits_fn = logits_fn
        self.include_head = include_head
        self._searches_alone = False  # whether a batch was searched one example at a time

    @property
    def channel_counts(self) -> dict[str, int]:
        """Return weight name -> C, in the model's order."""
        return self.sums.channel_counts(self.passes.parameters)

    def search(
        self, batch: Any, max_channels: int, preserve: float
    ) -> tuple[list[tuple[list[tuple[str, int]], bool]], Tensor | float]:
        """Return each example's channels and whether it flipped, and Σ over examples of the first positive scores."""
        if self.logits_fn is None:
            batch = inputs_and_targets(batch, device_of(self.network), LOGITS_FN_ADVICE)
        batch, count = detached(batch), examples_in(batch, self._losses)
        if count is None:
            raise InputError(
                "expected batches of tensors that all have the examples along dim 0, so that finished examples can be "
                "removed, got other batches; pass a loader of batches with the examples along dim 0"
            )
        found: list[list[int]] = [[] for _ in range(count)]
        flipped = [False] * count
        first: Tensor | float = 0.0
        remaining = list(range(count))
        zeroed = others = None
        for step in range(max_channels + 1):
            if not remaining:
                break
            active = batch if len(remaining) == count else cut(batch, remaining, self._losses)
            wrong, scores = self._evaluate(active, zeroed, step < max_channels, every=bool(preserve) and zeroed is None)
            if zeroed is None:
                zeroed = torch.zeros_like(scores, dtype=torch.bool)
                first = scores.masked_fill(wrong.unsqueeze(1), 0).clamp(min=0).sum(dim=0, dtype=torch.float64)
                others = preserve / count * (scores.sum(dim=0) - scores) if preserve else None
            if others is not None:
                scores = (scores - others).masked_fill(zeroed, 0)
            best, column = scores.max(dim=1)  # the first of equal scores
            continues = ~wrong & (best > 0)
            for example, is_wrong, is_searched, channel in zip(
                remaining, wrong.tolist(), continues.tolist(), column.tolist(), strict=True
            ):
                flipped[example] = is_wrong
                if is_searched:
                    found[example].append(channel)
            remaining = [
                example for example, is_searched in zip(remaining, continues.tolist(), strict=True) if is_searched
            ]
            zeroed, column = zeroed[continues], column[continues]
            zeroed[torch.arange(len(remaining), device=zeroed.device), column] = True
            others = None if others is None else others[continues]
        channels = [(name, row) for name, count in self.channel_counts.items() for row in range(count)]
        return [([channels[c] for c in own], flip) for own, flip in zip(found, flipped, strict=True)], first

    def _evaluate(self, batch: Any, zeroed: Tensor | None, backward: bool, every: bool) -> tuple[Tensor, Tensor]:
        """Return which examples are wrong, bool (n,), and their scores s, (n, columns).

        s is zero for wrong examples unless ``every``, and for all examples without ``backward``. ``zeroed`` is bool
        (n, columns): the channels zeroed for each example. Examples are evaluated one at a time where a pass does not
        have them along the axis that its trial found.
        """
        found = self._evaluate_together(batch, zeroed, backward, every)
        if isinstance(found, tuple):
            return found
        parts = [
            self._evaluate(cut(batch, part, self._losses), None if zeroed is None else zeroed[part], backward, every)
            for part in found
        ]
        return torch.cat([wrong for wrong, _ in parts]), torch.cat([scores for _, scores in parts])

    def _evaluate_together(
        self, batch: Any, zeroed: Tensor | None, backward: bool, every: bool
    ) -> tuple[Tensor, Tensor] | list[list[int]]:
        """Evaluate all examples in one pass; where this cannot be, return the parts to evaluate one by one."""
        passes = self.passes
        while True:
            with passes.ready(batch):
                count = examples_in(batch, self._losses) or 0
                if passes.findings.has_count(count):
                    return [[*range(count - 1)], [count - 1]]
                receiver = _SearchReceiver(self.sums, {} if zeroed is None else self._keep(zeroed))
                run = passes.batch_run(batch, receiver)
                run.examples = count
                with run.capture:
                    losses = per_example_losses(self.network, batch, self._losses, self.execution)
                repeats = dict.fromkeys(run.capture.repeats, "is computed where gradients are switched off")
                passes.mark_unknown(repeats)
                is_together = run.matches_trial(losses.numel()) and not run.elsewhere
                head, wrong = receiver.last, self._wrong
                used = losses if every else losses[~wrong]
                if is_together and backward and used.numel() and used.requires_grad:
                    run.backward(used.sum())
                run.decide()
                run.finish()
                passes.mark_unknown(run.capture.unknown)
            passes.end_batch(run)
            if not is_together or run.elsewhere:
                if not self._searches_alone:
                    self._searches_alone = True
                    log.warning(
                        "CritMem searches one example at a time, which is slow, in batches whose examples may lie "
                        "along another axis than in the trial"
                    )
                return [[x] for x in range(count)]
            if not run.undecided:
                return wrong, self._scores(head)

    def _losses(self, model: nn.Module, batch: Any) -> Tensor:
        if self.logits_fn is None:
            logits, targets = model(self.execution.laid_out(batch[0], model)), batch[1]
            targets = class_indices(targets, logits, advice=LOGITS_FN_ADVICE)
        else:
            logits, targets = _checked_pair(self.logits_fn(model, batch))
            targets = class_indices(targets, logits, advice="return these from logits_fn")
        if len(logits) != examples_in(batch, self._losses):
            raise InputError(
                f"expected logits for {examples_in(batch, self._losses)} examples, got {len(logits)}; return a row each"
            )
        losses = functional.cross_entropy(logits, targets, reduction="none")
        if not bool(losses.isfinite().all()):
            raise self._nonfinite_error()
        self._wrong = logits.detach().argmax(dim=1) != targets
        self._classes = logits.shape[1]
        return losses

    def _nonfinite_error(self) -> InputError:
        """Return the error for losses that are not finite. It names the first parameter that is not finite, if any."""
        for name, parameter in model_parameters(self.network).items():
            if not bool(parameter.isfinite().all()):
                return InputError(f"expected finite weights, got NaN or infinity in '{name}'; load or train it again")
        return InputError("expected finite losses, got NaN or infinity; check the inputs and the network's precision")

    def _keep(self, zeroed: Tensor) -> dict[str, Tensor]:
        """Return weight name -> bool (n, C) of channels to keep, for weights with a zeroed channel of some example."""
        sizes = list(self.channel_counts.values())
        parts = dict(zip(self.passes.parameters, torch.split(zeroed, sizes, dim=1), strict=True))
        some = torch.stack([part.any() for part in parts.values()]).tolist()  # one read for all weights
        return {name: ~part for (name, part), is_some in zip(parts.items(), some, strict=True) if is_some}

    def _scores(self, head: str | None) -> Tensor:
        rows = self.sums.rows
        left_out = [head] if not self.include_head and head in rows and rows[head].shape[1] == self._classes else []
        if len(rows) == len(left_out):
            raise InputError(
                "expected a trainable convolution or linear layer besides the head, got none; unfreeze one, or pass "
                "include_head=True"
            )
        scores = -torch.cat([0 * part if name in left_out else part for name, part in rows.items()], dim=1)
        if not bool(scores.isfinite().all()):
            name = next(name for name, part in self.sums.rows.items() if not bool(part.isfinite().all()))
            raise InputError(
                f"expected finite scores, got NaN or infinity for '{name}'; check the loss and the network's precision"
            )
        return scores


def _checked_pair(pair: Any) -> tuple[Tensor, Tensor]:
    """Return the result of a caller's ``logits_fn``. InputError unless it is two tensors."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise InputError(
            f"expected logits_fn to return (logits, labels), two tensors, got {type(pair).__name__}; return both"
        )
    logits, targets = pair
    return logits, targets


class _SearchedSums(ChannelSums):
    """Channel sums that refuse a weight whose channels cannot be zeroed for one example alone."""

    def reported(self, unknown: Mapping[str, str]) -> dict[str, str]:
        for name in unknown:
            if name in self.channelwise:
                raise InputError(
                    f"'{name}' {unknown[name]}, so its channels cannot be zeroed for one example alone; freeze it "
                    "(requires_grad_(False)) to leave it out"
                )
        return {}


class _SearchReceiver:
    """A receiver that zeroes each example's own channels. ``last`` is the last convolution or linear layer to run."""

    def __init__(self, sums: ChannelSums, keep: Mapping[str, Tensor]) -> None:
        self._channels = ChannelReceiver(sums, self._zero)
        self._keep = keep
        self.last: str | None = None

    def compute(self, use: Use, layer: Layer, inputs: Tensor, run: BatchRun) -> Tensor:
        if use.weight is not None and use.rule.is_channelwise:
            self.last = use.weight
        return self._channels.compute(use, layer, inputs, run)

    def receive(self, use: Use, saved: Tensor | None, output_grad: Tensor, run: BatchRun) -> None:
        self._channels.receive(use, saved, output_grad, run)

    def finish(self, run: BatchRun) -> None:
        self._channels.finish(run)

    def _zero(self, use: Use, values: Tensor, run: BatchRun) -> Tensor:
        keep = self._keep.get(use.weight or "")
        axis = None if keep is None else run.axis(use.weight or "", values, use.leading)
        if keep is None or axis is None:  # an unknown axis is refused after the pass
            return values
        return values * _spread(keep.to(values.dtype), axis, values, use.rule.channel_dim(values.ndim))


def _spread(keep: Tensor, axis: BatchAxis, values: Tensor, channel_dim: int) -> Tensor:
    """Reshape ``keep`` (n, C) so that it broadcasts over ``values``, with k slices of each example along a dim."""
    each = values.shape[axis.along.dim] // axis.examples
    rows = keep.repeat(each, 1) if axis.along.interleaved else keep.repeat_interleave(each, dim=0)
    shape = [1] * values.ndim
    shape[axis.along.dim], shape[channel_dim] = rows.shape
    return rows.reshape(shape)
