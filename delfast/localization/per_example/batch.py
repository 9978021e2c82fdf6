"""The forward and backward pass of one batch, whose uses of parameters go to a receiver with their example axes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from delfast.localization.per_example.capture import Capture, Layer, Taps, Use
from delfast.localization.per_example.comparison import Comparison
from delfast.localization.per_example.layers import BatchAxis, ExampleAxis
from delfast.localization.per_example.trace import Trace
from delfast.localization.per_example.trial import TRIAL_EXAMPLES, Trial

MAX_TRIALS = 3  # per form of batches: a parameter's δ may be zero in the first trial and not later


@dataclass
class Findings:
    """Findings of the trials on batches of one form.

    axes: parameter -> the example axis of its outputs.
    each: parameter -> slices of an example along that axis.
    trace: the last trial's calls; None if its batch could not be cut, so that the trial is not valid for others.
    """

    axes: dict[str, ExampleAxis] = field(default_factory=dict)
    each: dict[str, set[int]] = field(default_factory=dict)
    trace: Trace | None = None
    ambiguous: bool = False
    trials: int = 0
    is_compared: bool = False  # whether the last batch took a comparison
    count: int = 0  # examples in the last trial's batch; with few, several axes are possible
    is_due: bool = True  # whether the next batch begins with a trial, if it has more than ``count`` examples

    def learn(self, trial: Trial) -> None:
        """Add the findings of a trial."""
        self.axes |= trial.axes
        self.each |= trial.each
        self.trace, self.ambiguous = trial.capture.trace, trial.ambiguous
        self.trials += 1
        self.is_due = trial.examples < TRIAL_EXAMPLES

    def is_due_for(self, examples: int | None) -> bool:
        """Return whether a batch of as many examples begins with a trial; None for a batch that cannot be cut."""
        return self.is_due and not (examples is not None and self.trials and examples <= self.count)

    def has_count(self, examples: int) -> bool:
        """Return whether the last trial had as many examples, so that no dim of a batch grows with their number."""
        return self.trace is not None and self.trace.examples == examples

    def request_trial(self) -> bool:
        """Let the next batch begin with a trial. Return False after ``MAX_TRIALS`` trials."""
        if self.trials >= MAX_TRIALS:
            return False
        self.is_due, self.count = True, 0
        return True


class Receiver(Protocol):
    """The part of a consumer that receives the uses of parameters in one batch."""

    def compute(self, use: Use, layer: Layer, inputs: Tensor, run: BatchRun) -> Tensor:
        """Compute the layer, tap it by ``run.capture.tap``, and return its output."""

    def receive(self, use: Use, saved: Tensor | None, output_grad: Tensor, run: BatchRun) -> None:
        """Accumulate what a tap saved and its δ. ``run.axis`` is the example axis of a parameter's δ."""

    def finish(self, run: BatchRun) -> None:
        """Add what had to wait for the end of the passes, except for ``run.missing`` parameters."""


class BatchRun:
    """The passes of a batch whose examples lie along the axes that the trial of its form found.

    This holds if the forward pass makes the trial's calls; see ``trace``. Otherwise a ``Comparison`` checks it.

    These are complete after ``run``, which reads from the device once, and only if there is a comparison or a parameter
    without an axis:

    undecided: parameters with a δ that is not zero, and without a known example axis.
    elsewhere: parameter -> why its examples do not lie along the trial's axis in this batch.
    """

    def __init__(
        self,
        capture_for: Callable[[Taps], Capture],
        findings: Findings,
        receiver: Receiver,
        compare: Callable[[Tensor, set[torch.dtype]], Comparison],
    ) -> None:
        self.capture = capture_for(self)
        self.findings = findings
        self.receiver = receiver
        self.examples = 0
        self.undecided: set[str] = set()
        self.elsewhere: dict[str, str] = {}
        self.comparison: Comparison | None = None
        self._compare = compare
        self._is_last = False
        self._without_axis: dict[str, Tensor] = {}  # parameter -> whether some δ of it is not zero, on the device

    @property
    def missing(self) -> set[str]:
        """Return the parameters for which this batch's passes have not computed per-example gradients."""
        return {*self.capture.unknown, *self.undecided, *self.elsewhere}

    def axis(self, name: str, output_grad: Tensor, leading: int) -> BatchAxis | None:
        """Return the example axis of δ; None if there is nothing to add or the axis is not known."""
        if name in self.capture.unknown or name in self.elsewhere or not output_grad.numel():
            return None
        if self.examples == 1:
            return BatchAxis(ExampleAxis(), 1)
        axis = self.findings.axes.get(name)
        if axis is None:
            known = self._without_axis.get(name)
            some = output_grad.detach().any()
            self._without_axis[name] = some if known is None else known | some.to(known.device)
            return None
        each, rest = divmod(output_grad.shape[axis.dim], self.examples) if axis.dim < leading else (0, 1)
        if rest or (self.comparison is None and each not in self.findings.each[name]):
            self.elsewhere[name] = f"writes {tuple(output_grad.shape)} for {self.examples} examples"
            return None
        return BatchAxis(axis, self.examples)

    def matches_trial(self, examples: int) -> bool:
        """Return whether the finished forward pass, with as many losses, has the example axes of its trial."""
        trace = self.capture.trace
        return examples == 1 or (trace is not None and trace.matches(examples) and not self.findings.ambiguous)

    def run(self, losses: Tensor) -> None:
        """Run the backward pass of the losses (N,), and those of the comparison if there is one."""
        self.examples = losses.numel()
        if not self.examples or not losses.requires_grad:
            return
        if not self.matches_trial(self.examples):
            self.comparison = self._compare(losses, self.capture.dtypes)
            for weights in self.comparison.weights:
                self.capture.backward((losses * weights.to(losses.dtype)).sum(), retain_graph=True)
                for key, copies in self.capture.free.copies.items():
                    if copies.grad is not None:
                        self.comparison.keep(key, copies.grad, self._axes(key[:1], copies.grad, 1))
                        copies.grad = None
            self._is_last = True
        self.backward(losses.sum())
        self.decide()
        if self.comparison is not None:
            for key, copies in self.capture.free.copies.items():
                if copies.grad is not None:
                    self.comparison.compare(key, copies.grad, self._axes(key[:1], copies.grad, 1))
            for name in self.comparison.wrong():
                self.elsewhere[name] = "has the examples along another axis than in the trial, or mixes them"

    def backward(self, loss: Tensor) -> None:
        """Run the last backward pass, in which the receiver gets δ."""
        self.capture.backward(loss)
        for (name, _), copies in self.capture.free.copies.items():
            if copies.grad is not None:
                self.axis(name, copies.grad, 1)

    def decide(self) -> None:
        """Read which parameters without an example axis have a δ that is not zero."""
        if self._without_axis:
            device = next(iter(self._without_axis.values())).device
            flags = torch.stack([flag.to(device) for flag in self._without_axis.values()]).tolist()
            self.undecided = {name for name, flag in zip(self._without_axis, flags, strict=True) if flag}

    def compute(self, use: Use, layer: Layer, inputs: Tensor, capture: Capture) -> Tensor:
        return self.receiver.compute(use, layer, inputs, self)

    def arrived(self, use: Use, saved: Tensor | None, output_grad: Tensor, key: Hashable) -> None:
        if self.comparison is not None:
            axes = self._axes(use.names, output_grad, use.leading)
            if not self._is_last:
                self.comparison.keep(key, output_grad, axes)
                return
            self.comparison.compare(key, output_grad, axes)
        self.receiver.receive(use, saved, output_grad, self)

    def finish(self) -> None:
        """Add what had to wait for the end of the passes."""
        with torch.no_grad():
            self.receiver.finish(self)

    def _axes(self, names: Iterable[str], output_grad: Tensor, leading: int) -> Mapping[str, BatchAxis]:
        axes = {name: self.axis(name, output_grad, leading) for name in names}
        return {name: axis for name, axis in axes.items() if axis is not None}
