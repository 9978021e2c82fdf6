"""Run one forward and one backward pass over a batch, and pass every example's own gradient to an accumulator.

The loss is the sum of the examples' losses. So an example's slice of δ is its own wherever a layer keeps the examples
apart. A trial checks this; see ``trial``. Parameters whose layers mix the examples, and parameters with a use that no
rule covers, are computed example by example.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from delfast.batches import (
    LossFn,
    check_differentiable,
    cut,
    detached,
    device_of,
    examples_in,
    map_tensors,
    per_example_losses,
)
from delfast.device_checks import DeviceChecks
from delfast.execution import Execution
from delfast.localization.per_example.capture import Capture, Use
from delfast.localization.per_example.comparison import Comparison
from delfast.localization.per_example.layers import BatchAxis, ExampleAxis, refuse_batch_statistics
from delfast.localization.per_example.trace import Trace
from delfast.localization.per_example.trial import TRIAL_EXAMPLES, Trial

C = TypeVar("C", bound=Capture)

log = logging.getLogger("delfast")

_STANCE = threading.RLock()  # torch's stance is global: two threads that set it would leave it changed
MAX_TRIALS = 3  # per form of batches: a parameter's δ may be zero in the first trial and not later
MAX_FORMS = 64  # forms of batches (shapes without the examples' dim) whose trials are kept


@dataclass
class Findings:
    """Findings of the trials on batches of one form.

    ``axes``: parameter -> the example axis of its outputs. ``each``: parameter -> entries of an example along it.
    ``trace``: the last trial's calls. None if its batch could not be cut, so that the trial is not valid for others.
    """

    axes: dict[str, ExampleAxis] = field(default_factory=dict)
    each: dict[str, set[int]] = field(default_factory=dict)
    trace: Trace | None = None
    ambiguous: bool = False
    trials: int = 0
    count: int = 0  # examples in the last trial's batch; with few, several axes are possible
    is_due: bool = True  # whether the next batch begins with a trial

    def learn(self, trial: Trial) -> None:
        """Add the findings of a trial."""
        self.axes |= trial.axes
        self.each |= trial.each
        self.trace, self.ambiguous = trial.trace, trial.ambiguous
        self.trials += 1
        self.is_due = trial.examples < TRIAL_EXAMPLES

    def has_count(self, examples: int) -> bool:
        """Return whether the last trial had as many examples, so that no dim of a batch grows with their number."""
        return self.trace is not None and self.trace.examples == examples

    def request_trial(self) -> bool:
        """Let the next batch begin with a trial. Return False after ``MAX_TRIALS`` trials."""
        if self.trials >= MAX_TRIALS:
            return False
        self.is_due, self.count = True, 0
        return True


class ExampleCapture(Capture):
    """A capture of a batch whose examples lie along the axes that the trial of its form found.

    This holds if the forward pass makes the trial's calls; see ``trace``. Otherwise a ``Comparison`` checks it.

    ``undecided``: parameters with a δ that is not zero, and without a known example axis. ``elsewhere``: parameter ->
    why its examples do not lie along the trial's axis in this batch.
    """

    def __init__(self, passes: ExamplePasses, batch: Any) -> None:
        findings = passes.findings
        super().__init__(
            passes.parameters, passes.unknown, passes.trace(batch, findings.trace) if findings.trace else None
        )
        self.passes = passes
        self.findings = findings
        self.examples = 0
        self.undecided: set[str] = set()
        self.elsewhere: dict[str, str] = {}
        self.comparison: Comparison | None = None
        self._is_last = False

    def axis(self, name: str, deltas: Tensor, leading: int) -> BatchAxis | None:
        """Return the example axis of δ; None if there is nothing to add or the axis is not known."""
        if name in self.unknown or name in self.undecided or name in self.elsewhere:
            return None
        if not deltas.numel():
            return None
        if self.examples == 1:
            return BatchAxis(ExampleAxis(), 1)
        axis = self.findings.axes.get(name)
        if axis is None:
            if bool(deltas.any()):
                self.undecided.add(name)
            return None
        each, rest = divmod(deltas.shape[axis.dim], self.examples) if axis.dim < leading else (0, 1)
        if rest or (self.comparison is None and each not in self.findings.each[name]):
            self.elsewhere[name] = f"writes {tuple(deltas.shape)} for {self.examples} examples"
            return None
        return BatchAxis(axis, self.examples)

    def matches_trial(self, examples: int) -> bool:
        """Return whether the finished forward pass, with as many losses, has the example axes of its trial."""
        return examples == 1 or (
            self.trace is not None and self.trace.matches(examples) and not self.findings.ambiguous
        )

    def run(self, losses: Tensor) -> None:
        self.examples = losses.numel()
        if not self.examples or not losses.requires_grad:
            return
        if not self.matches_trial(self.examples):
            self.comparison = Comparison(losses, self.dtypes, self.passes.compared())
            for weights in self.comparison.weights:
                self.backward((losses * weights.to(losses.dtype)).sum(), retain_graph=True)
                for key, copies in self.free.copies.items():
                    if copies.grad is not None:
                        self.comparison.keep(key, copies.grad, self._axes(key[:1], copies.grad, 1))
                        copies.grad = None
            self._is_last = True
        self.backward(losses.sum())
        if self.comparison is not None:
            for key, copies in self.free.copies.items():
                if copies.grad is not None:
                    self.comparison.compare(key, copies.grad, self._axes(key[:1], copies.grad, 1))
            for name in self.comparison.wrong():
                self.elsewhere[name] = "has the examples along another axis than in the trial, or mixes them"

    def received(self, use: Use, saved: Tensor | None, deltas: Tensor, key: Hashable) -> None:
        if self.comparison is not None:
            axes = self._axes(use.names, deltas, use.leading)
            if not self._is_last:
                self.comparison.keep(key, deltas, axes)
                return
            self.comparison.compare(key, deltas, axes)
        self.arrived(use, saved, deltas)

    def _axes(self, names: Iterable[str], deltas: Tensor, leading: int) -> dict[str, BatchAxis]:
        axes = {name: self.axis(name, deltas, leading) for name in names}
        return {name: axis for name, axis in axes.items() if axis is not None}

    @property
    def missing(self) -> set[str]:
        """Return the parameters for which this batch's passes have not computed per-example gradients."""
        return {*self.unknown, *self.undecided, *self.elsewhere}

    @abstractmethod
    def finish(self) -> None:
        """Add what had to wait for the end of the passes, except for ``missing`` parameters."""


class ExamplePasses(ABC):
    """Runs batches. A subclass accumulates what its ``ExampleCapture`` receives.

    ``accumulate`` gets the gradients of the parameters that the capture does not cover. parameters: plain name -> the
    network's own tensors to score. The network must be in eval mode. Its ``requires_grad`` flags are off inside and are
    restored. Raises InputError for layers that mix the examples by design.
    """

    def __init__(
        self, network: nn.Module, parameters: Mapping[str, Tensor], loss_fn: LossFn | None, execution: Execution
    ) -> None:
        refuse_batch_statistics(network.named_modules())
        self.network = network
        self.parameters = dict(parameters)
        self.loss_fn = loss_fn
        self.execution = execution
        self.checks = DeviceChecks(device_of(network))
        self.findings = Findings()  # for the current batch's form
        self.uses: dict[str, int] = {}
        self.unknown: dict[str, str] = {}  # parameter -> why it is computed example by example
        self._findings_by_form: dict[Hashable, Findings] = {}  # keyed by the form of the batches
        self._owned = {id(t): t for t in (*network.parameters(), *network.buffers())}
        self._compared = 0
        self._reported: set[str] = set()

    @abstractmethod
    def capture(self, batch: Any) -> ExampleCapture:
        """Return the capture of one batch."""

    @abstractmethod
    def accumulate(self, name: str, example: int, gradient: Tensor) -> None:
        """Add the gradient of one example of the batch, for a parameter that the capture does not cover."""

    def wanted(self, trial: Trial) -> dict[str, Tensor]:
        """Return the parameters to compute, after a trial's forward pass."""
        return self.parameters

    def after_trial(self, trial: Trial) -> None:
        """Store the findings of a trial."""
        self.findings.learn(trial)
        self.uses |= trial.uses
        self.mark_unknown(trial.unknown)

    def add(self, batch: Any) -> int:
        """Add one batch and return its number of examples."""
        batch = detached(batch)
        with self.ready(batch):
            capture, losses = self._pass(self.capture, batch)
            if not capture.examples:
                return 0
            if self.parameters and not self.unknown and not capture.repeats:
                check_differentiable(losses)
            capture.finish()
            self.mark_unknown(capture.unknown)
            self.end_batch(capture)
            missing = sorted({*self.unknown, *capture.missing})
            if missing:
                self._one_by_one(missing, batch, losses.detach())
            return capture.examples

    @contextmanager
    def ready(self, batch: Any) -> Iterator[None]:
        """Enable gradients, except those of the network's parameters, and run compiled blocks eagerly.

        If a trial of this form of batches is due, run it on this batch first.
        """
        flags = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if any(_is_compiled(module) for module in self.network.modules()):
                stack.enter_context(_STANCE)
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                for parameter, _ in flags:
                    parameter.requires_grad_(False)
                self._try(batch)
                yield
            finally:
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    def trace(self, batch: Any, reference: Trace | None) -> Trace | None:
        """Return a record for a batch's calls; None for a batch that cannot be cut, or has fewer than two examples."""
        count = examples_in(batch, self.loss_fn)
        return None if count is None or count < 2 else Trace(count, _tensors(batch), self._owned, reference)

    def compared(self) -> int:
        """Count this batch among those that needed a comparison, and return the count."""
        self._compared += 1
        return self._compared

    def _try(self, batch: Any) -> None:
        """Run a trial if one is due: on at most four examples, and on fewer than the batch has.

        Dims that grow with the number of examples then differ between the trial and the batch. A batch that cannot be
        cut is used whole.
        """
        count = examples_in(batch, self.loss_fn)
        form = None if count is None else tuple((t.shape[1:], t.dtype) for t in _tensors(batch))
        if count == 1 and self._findings_by_form:
            return  # a single example needs no axis
        if form not in self._findings_by_form and len(self._findings_by_form) == MAX_FORMS:
            del self._findings_by_form[next(iter(self._findings_by_form))]
        self.findings = self._findings_by_form.setdefault(form, Findings())
        if not self.findings.is_due or (count is not None and self.findings.trials and count <= self.findings.count):
            return
        self.findings.count = count or 0
        if count is not None and count > 2:
            few = min(TRIAL_EXAMPLES, count - 1)
            batch = cut(batch, [i * (count - 1) // (few - 1) for i in range(few)], self.loss_fn)
        trial, _ = self._pass(lambda b: Trial(self.parameters, self.unknown, self.trace(b, None)), batch)
        self.after_trial(trial)

    def _pass(self, make: Callable[[Any], C], batch: Any) -> tuple[C, Tensor]:
        """Run a forward and a backward pass; repeat them if a parameter has a use that was not captured.

        The parameters require grad in the forward pass, so that uses which are not captured are in the graph. Captured
        uses are detached, so that no parameter's gradient is computed.
        """
        while True:
            capture = make(batch)
            wanted = [parameter for name, parameter in self.parameters.items() if name not in self.unknown]
            with _requiring_grad(wanted):
                with capture:
                    losses = per_example_losses(self.network, batch, self.loss_fn, self.execution)
                if isinstance(capture, Trial):
                    self.parameters = self.wanted(capture)
                unseen = capture.unseen(losses)
                if not unseen and not capture.repeats:  # with the flags of the forward pass, which recomputing expects
                    capture.run(losses)
            if not unseen:
                if capture.repeats:  # with the flags off, so that no repeated use reaches a parameter
                    capture.run(losses)
                return capture, losses
            reason = "is used by an operation that cannot be captured"
            self.mark_unknown({name: capture.unknown.get(name, reason) for name in unseen})

    def end_batch(self, capture: ExampleCapture) -> None:
        """Finish a batch: request a trial for the next batch of its form if this one had something new."""
        if capture.undecided and not self.findings.request_trial():
            self.mark_unknown(dict.fromkeys(capture.undecided, "has no example axis that could be found"))
        if capture.trace is not None and capture.trace.is_other:
            self.findings.request_trial()  # a first pass may create tensors that later passes reuse
        self.report(
            {name: f"{why} in some batches" for name, why in capture.elsewhere.items() if name not in self._reported}
        )
        self._reported |= set(capture.elsewhere)

    def mark_unknown(self, unknown: Mapping[str, str]) -> None:
        """Compute these parameters example by example from now on. ``unknown``: parameter -> the reason."""
        new = {name: reason for name, reason in unknown.items() if name not in self.unknown}
        self.unknown |= new
        self.report(new)

    def report(self, slow: Mapping[str, str]) -> None:
        """Log which parameters are computed example by example, and why."""
        if slow:
            reasons = dict.fromkeys(slow.values())
            names = {why: ", ".join(f"'{name}'" for name, reason in slow.items() if reason == why) for why in reasons}
            text = "; ".join(f"{names[why]} (each {why})" for why in reasons)
            log.warning("per-example gradients are computed one example at a time, which is slow, for: %s", text)

    def _one_by_one(self, names: list[str], batch: Any, losses: Tensor) -> None:
        parameters = [self.parameters[name] for name in names]
        with _requiring_grad(parameters):
            for example, loss in enumerate(self._single_losses(batch, losses)):
                if not loss.requires_grad:
                    continue
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        self.accumulate(name, example, gradient.to_dense() if gradient.is_sparse else gradient)

    def _single_losses(self, batch: Any, losses: Tensor) -> Iterator[Tensor]:
        """Yield the loss of each example: computed alone where that gives the same loss, else within its batch."""
        together: Tensor | None = None
        can_be_alone = examples_in(batch, self.loss_fn) == losses.numel()
        for example, loss in enumerate(losses):
            if can_be_alone:
                alone = per_example_losses(
                    self.network, cut(batch, [example], self.loss_fn), self.loss_fn, self.execution
                )
                # 1 %: far above the rounding of 16-bit floats, far below the effect of other examples in the loss
                if alone.shape == (1,) and torch.allclose(
                    alone.detach()[0].float(), loss.float(), rtol=1e-2, atol=1e-2
                ):
                    yield alone[0]
                    continue
                can_be_alone = example > 0
            if together is None:
                together = per_example_losses(self.network, batch, self.loss_fn, self.execution)
            yield together[example]


@contextmanager
def _requiring_grad(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let these parameters require grad inside the context; afterwards none of them does."""
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(batch, keep)
    return found


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
