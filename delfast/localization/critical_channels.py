"""CritMem: which channels the network needs for what it says of each example. See docs/critmem.md.

Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023. Their search edits a copy of the network for
one example at a time. Here all examples of a batch are searched at once: an example's edited network is the common
one, with its own channels of every layer's output set to zero.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.arguments import check_count, check_flag, check_function, check_loader, check_number
from delfast.batches import (
    check_targets,
    cut,
    detached,
    device_of,
    evaluating,
    examples_in,
    inputs_and_targets,
    per_example_losses,
    warn_about_loader,
)
from delfast.errors import InputError
from delfast.localization.per_example.capture import Use
from delfast.localization.per_example.channels import ChannelCapture, ChannelPasses, channel_dim, identifiers
from delfast.localization.per_example.layers import BatchAxis
from delfast.naming import trainable_parameters, unique_parameters, unwrap

MAX_CHANNELS = 50

log = logging.getLogger("delfast")

LogitsFn = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""``logits_fn(model, batch) -> logits (N, classes), labels int64 (N,)``."""


@dataclass(frozen=True)
class CriticalExample:
    """``channels``: (weight name, row) in the order in which they were zeroed. ``flipped``: whether the prediction is
    no longer the label; without a channel, it never was. Not flipped: those channels were not enough."""

    example: int
    channels: tuple[tuple[str, int], ...]
    flipped: bool


@dataclass(frozen=True)
class CriticalChannels:
    """``examples``: in the loader's order; numbered by the index of (index, input, target) batches, else 0 to N-1.

    ``counts``: weight name -> int64 (C,), how many examples each channel was zeroed for. ``first``: the same names ->
    float64 (C,), the mean over all N examples of the positive first-order scores in the whole network (zero for
    examples that it gets wrong).
    """

    examples: tuple[CriticalExample, ...]
    counts: Mapping[str, Tensor]
    first: Mapping[str, Tensor]

    def unit_scores(self) -> dict[str, Tensor]:
        """Weight name -> float32 (C,): the count plus m / (1 + m), m from ``first``: it orders equal counts, and
        never lifts a channel above one of a higher count."""
        scores = {}
        for name, count in self.counts.items():
            count, mean = count.float(), self.first[name]
            most = torch.nextafter(count + 1, count)  # float32 would round a large count's sum up to the next
            scores[name] = torch.minimum(count + (mean / (1 + mean)).float(), most)
        return scores


def critmem(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_channels: int = MAX_CHANNELS,
    preserve: float = 0.0,
    include_head: bool = False,
    logits_fn: LogitsFn | None = None,
) -> CriticalChannels:
    """For every example, the channels whose removal makes the network get it wrong, by greedy search.

    Each step zeroes the channel i with the largest s_i(x) = -Σ_j θ_ij g_ij(x), to first order what its removal adds to
    the example's cross-entropy. Channels are the rows of convolutions and linear layers that train (of a transposed
    convolution, its input channels); zeroed before the bias, in every use with a gradient. An example is done once its
    prediction is not its label, no s_i is positive, or ``max_channels`` are gone. Ties fall to the lower (parameter,
    index).

    preserve: w ≥ 0. Ranks by s_i(x) - w (1/B) Σ s_i(x') over the B - 1 others of its batch, so that channels which the
        others need are spared. The original has w = 1, and takes the others' scores in the network edited for x, a
        pass over the batch for each example and channel; here they are those in the whole network. With 0, the
        default, what is found for an example does not depend on its batch. The original's noise on the inputs is
        not added.
    include_head: let rows of the layer that makes the logits compete: the last trainable convolution or linear layer
        to run, if it has a row per class. Left out by default: row c is class c's logit, so that the row of its label
        is taken first for nearly every example, and is enough. (The original takes single weights of linear layers.)
    loader: (input, target) or (index, input, target) batches; anything with ``logits_fn(model, batch) -> (logits,
        labels)`` whose tensors have the examples along dim 0.

    A step costs one forward and one backward pass of the examples that are left, without weight gradients. The model
    is left as it was. Raises InputError as ``signed_channels``, and for: a layer whose examples cannot be told apart
    or which other kinds of layers share (naming it), scores that are not finite (naming the parameter), arguments out
    of range.
    """
    max_channels = check_count("max_channels", max_channels)
    preserve = check_number("preserve", preserve)
    if not 0 <= preserve < float("inf"):
        raise InputError(f"expected preserve to be at least 0, got {preserve}; pass a finite number")
    check_flag("include_head", include_head)
    check_function("logits_fn", logits_fn)
    check_loader(loader, "loader")
    warn_about_loader(loader, "set")
    network = unwrap(model)
    search = _Search(network, trainable_parameters(network), logits_fn, include_head)
    examples: list[CriticalExample] = []
    first: Tensor | float = 0.0
    with evaluating(network, gradients=True):
        for batch in loader:
            found, added = search.search(batch, max_channels, preserve)
            numbers = identifiers(batch, logits_fn, len(examples), len(found)).tolist()
            examples += [CriticalExample(n, tuple(c), flipped) for n, (c, flipped) in zip(numbers, found, strict=True)]
            first = first + added
    if not examples:
        raise InputError("expected a set of at least one example, got none; check its loader")
    counts = {name: torch.zeros(count, dtype=torch.int64) for name, count in search.channel_counts.items()}
    for example in examples:
        for name, row in example.channels:
            counts[name][row] += 1
    assert isinstance(first, Tensor)
    means = torch.split((first / len(examples)).cpu(), [len(count) for count in counts.values()])
    return CriticalChannels(tuple(examples), counts, dict(zip(counts, means, strict=True)))


class _Search(ChannelPasses):
    """The search over one batch. Columns are the channels of ``parameters``, side by side."""

    def __init__(
        self, network: nn.Module, parameters: Mapping[str, Tensor], logits_fn: LogitsFn | None, include_head: bool
    ) -> None:
        super().__init__(network, parameters, self._losses)
        self.logits_fn = logits_fn
        self.include_head = include_head
        self._searches_alone = False  # in some batches

    def search(
        self, batch: Any, max_channels: int, preserve: float
    ) -> tuple[list[tuple[list[tuple[str, int]], bool]], Tensor | float]:
        """Per example, the channels and whether it flipped; and Σ over examples of the first positive scores."""
        if self.logits_fn is None:
            batch = inputs_and_targets(batch, device_of(self.network))
        batch, count = detached(batch), examples_in(batch, self.loss_fn)
        if count is None:
            raise InputError(
                "expected batches of tensors that all have the examples along dim 0, so that an example which is done "
                "can leave; pass a loader of such batches"
            )
        found: list[list[int]] = [[] for _ in range(count)]
        flipped = [False] * count
        first: Tensor | float = 0.0
        left = list(range(count))
        gone = others = None
        for step in range(max_channels + 1):
            if not left:
                break
            active = batch if len(left) == count else cut(batch, left, self.loss_fn)
            wrong, scores = self._evaluate(active, gone, step < max_channels, every=bool(preserve) and gone is None)
            if gone is None:
                gone = torch.zeros_like(scores, dtype=torch.bool)
                first = scores.masked_fill(wrong.unsqueeze(1), 0).clamp(min=0).sum(dim=0, dtype=torch.float64)
                others = preserve / count * (scores.sum(dim=0) - scores) if preserve else None
            if others is not None:
                scores = (scores - others).masked_fill(gone, 0)
            best, column = scores.max(dim=1)  # the first of equal ones
            stays = ~wrong & (best > 0)
            for example, is_wrong, goes_on, channel in zip(
                left, wrong.tolist(), stays.tolist(), column.tolist(), strict=True
            ):
                flipped[example] = is_wrong
                if goes_on:
                    found[example].append(channel)
            left = [example for example, goes_on in zip(left, stays.tolist(), strict=True) if goes_on]
            gone, column = gone[stays], column[stays]
            gone[torch.arange(len(left), device=gone.device), column] = True
            others = None if others is None else others[stays]
        channels = [(name, row) for name, count in self.channel_counts.items() for row in range(count)]
        return [([channels[c] for c in own], flip) for own, flip in zip(found, flipped, strict=True)], first

    def mark_unknown(self, unknown: Mapping[str, str]) -> None:
        for name in unknown:
            if name in self.channelwise:
                raise InputError(
                    f"'{name}' {unknown[name]}, so its channels cannot be zeroed for one example alone; freeze it "
                    "(requires_grad_(False)) to leave it out"
                )
        super().mark_unknown(unknown)

    def _evaluate(self, batch: Any, gone: Tensor | None, backward: bool, every: bool) -> tuple[Tensor, Tensor]:
        """Return which examples are wrong, bool (n,), and s, (n, columns): zero for those, unless ``every``, and
        without ``backward``. ``gone``: bool (n, columns), the channels that each example has lost.

        Where a pass does not have the examples in the order that its trial showed, one example at a time.
        """
        found = self._evaluate_together(batch, gone, backward, every)
        if isinstance(found, tuple):
            return found
        parts = [
            self._evaluate(cut(batch, part, self.loss_fn), None if gone is None else gone[part], backward, every)
            for part in found
        ]
        return torch.cat([wrong for wrong, _ in parts]), torch.cat([scores for _, scores in parts])

    def _evaluate_together(
        self, batch: Any, gone: Tensor | None, backward: bool, every: bool
    ) -> tuple[Tensor, Tensor] | list[list[int]]:
        """Look at all examples in one pass; return the parts to look at one by one where that cannot be."""
        while True:
            with self.ready(batch):
                count = examples_in(batch, self.loss_fn) or 0
                if self.findings.has_count(count):
                    return [[*range(count - 1)], [count - 1]]
                keep = {} if gone is None else self._keep(gone)
                capture = _SearchCapture(self, batch, keep)
                with capture:
                    losses = per_example_losses(self.network, batch, self.loss_fn)
                self.mark_unknown(dict.fromkeys(capture.repeats, "is computed where gradients are switched off"))
                is_together = capture.matches_trial(losses.numel()) and not capture.elsewhere
                head, wrong = capture.last, self._wrong
                used = losses if every else losses[~wrong]
                if is_together and backward and used.numel() and used.requires_grad:
                    capture.backward(used.sum())
                capture.finish()
                self.mark_unknown(capture.unknown)
            self.end_batch(capture)
            if not is_together or capture.elsewhere:
                if not self._searches_alone:
                    self._searches_alone = True
                    log.warning(
                        "CritMem searches one example at a time, which is slow, where the examples of a batch may lie "
                        "elsewhere than those of its trial"
                    )
                return [[x] for x in range(count)]
            if not capture.undecided:
                return wrong, self._scores(head)

    def _losses(self, model: nn.Module, batch: Any) -> Tensor:
        pair = (model(batch[0]), batch[1]) if self.logits_fn is None else self.logits_fn(model, batch)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
            raise InputError(
                f"expected logits_fn to return (logits, labels), two tensors, got {type(pair).__name__}; return both"
            )
        logits, targets = pair
        targets = check_targets(targets, logits)
        if len(logits) != examples_in(batch, self.loss_fn):
            raise InputError(
                f"expected logits for {examples_in(batch, self.loss_fn)} examples, got {len(logits)}; return a row each"
            )
        losses = functional.cross_entropy(logits, targets, reduction="none")
        if not bool(losses.isfinite().all()):
            raise self._not_finite()
        self._wrong = logits.detach().argmax(dim=1) != targets
        self._classes = logits.shape[1]
        return losses

    def _not_finite(self) -> InputError:
        """The error for losses; it names the first parameter that is to blame, if one is."""
        for name, parameter in unique_parameters(self.network.named_parameters()):
            if not bool(parameter.isfinite().all()):
                return InputError(f"expected finite weights, got NaN or infinity in '{name}'; load or train it again")
        return InputError("expected finite losses, got NaN or infinity; check the inputs and the network's precision")

    def _keep(self, gone: Tensor) -> dict[str, Tensor]:
        """Weight name -> bool (n, C), for those of which some example has lost a channel."""
        sizes = list(self.channel_counts.values())
        lost = zip(self.parameters, torch.split(gone, sizes, dim=1), torch.split(gone.any(dim=0), sizes), strict=True)
        return {name: ~part for name, part, columns in lost if bool(columns.any())}

    def _scores(self, head: str | None) -> Tensor:
        rows = self.rows
        left_out = [head] if not self.include_head and head in rows and rows[head].shape[1] == self._classes else []
        if len(rows) == len(left_out):
            raise InputError(
                "expected a convolution or linear layer that trains besides the head, got none; CritMem zeroes channels"
            )
        scores = -torch.cat([0 * part if name in left_out else part for name, part in rows.items()], dim=1)
        if not bool(scores.isfinite().all()):
            name = next(name for name, part in self.rows.items() if not bool(part.isfinite().all()))
            raise InputError(
                f"expected finite scores, got NaN or infinity for '{name}'; check the loss and the network's precision"
            )
        return scores


class _SearchCapture(ChannelCapture):
    """Zeroes each example's own channels. ``last``: the convolution or linear layer that ran last."""

    def __init__(self, passes: _Search, batch: Any, keep: Mapping[str, Tensor]) -> None:
        super().__init__(passes, batch)
        self.examples = examples_in(batch, passes.loss_fn) or 0
        self.keep = keep
        self.last: str | None = None

    def compute(self, use: Use, function: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        if use.weight is not None and use.rule.is_channelwise:
            self.last = use.weight
        return super().compute(use, function, inputs)

    def kept(self, use: Use, values: Tensor) -> Tensor:
        keep = self.keep.get(use.weight or "")
        axis = None if keep is None else self.axis(use.weight or "", values, use.leading)
        if keep is None or axis is None:  # no place: refused after the pass
            return values
        return values * _spread(keep.to(values.dtype), axis, values, channel_dim(use, values))


def _spread(keep: Tensor, axis: BatchAxis, values: Tensor, channel_dim: int) -> Tensor:
    """(n, C) so that it broadcasts over ``values``, which have k entries of each example along a dim."""
    each = values.shape[axis.along.dim] // axis.examples
    rows = keep.repeat(each, 1) if axis.along.interleaved else keep.repeat_interleave(each, dim=0)
    shape = [1] * values.ndim
    shape[axis.along.dim], shape[channel_dim] = rows.shape
    return rows.reshape(shape)
