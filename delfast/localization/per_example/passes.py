"""Run one forward and one backward pass over a batch, and pass every example's own gradient to a consumer.

The loss is the sum of the examples' losses. So an example's slice of δ is its own wherever a layer keeps the examples
apart. A trial checks this; see ``trial``. Parameters whose layers mix the examples, and parameters with a use that no
rule covers, are computed example by example.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from delfast.batches import (
    Indexed,
    LossFn,
    Source,
    check_differentiable,
    cut,
    detached,
    device_of,
    examples_in,
    per_example_losses,
    split_batch,
    tensors_of,
)
from delfast.device_checks import DeviceChecks
from delfast.execution import DEFAULT_EXECUTION, Execution
from delfast.graphs import Graphed, make_backend
from delfast.loaders import is_frequent
from delfast.localization.per_example.batch import BatchRun, Findings, Receiver
from delfast.localization.per_example.capture import Capture, Shared, Taps
from delfast.localization.per_example.comparison import Comparison
from delfast.localization.per_example.layers import refuse_batch_statistics
from delfast.localization.per_example.trace import Trace
from delfast.localization.per_example.trial import TRIAL_EXAMPLES, Trial

log = logging.getLogger("delfast")

_STANCE = threading.RLock()  # torch's stance is global: two threads that set it would leave it changed
MAX_FORMS = 64  # forms of batches (shapes without the examples' dim) whose trials are kept


class Consumer(Protocol):
    """The user of the per-example gradients. It chooses parameters, and makes a receiver for each batch."""

    def wanted(self, trial: Trial, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the parameters to compute, after a trial's forward pass."""

    def learn(self, trial: Trial, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Store the findings of a trial, and return those of the parameters to compute."""

    def reported(self, unknown: Mapping[str, str]) -> dict[str, str]:
        """Return those parameters of ``unknown`` to compute example by example; the others are left out."""

    def receiver(self) -> Receiver:
        """Return the receiver of one batch."""

    def accumulate(self, name: str, example: int, gradient: Tensor) -> None:
        """Add the gradient of one example of the batch, for a parameter that the receiver does not cover."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the receivers accumulate into, by name."""

    def result(self) -> dict[str, Tensor]:
        """Return the tensors that the receiver of the last batch made, by name."""

    def take(self, result: dict[str, Tensor]) -> None:
        """Take the result of a batch whose pass was replayed."""


class _Pass(Protocol):
    capture: Capture

    def run(self, losses: Tensor) -> None: ...


P = TypeVar("P", bound=_Pass)


class NotStatic(Exception):
    """A batch that ``run_static`` was given makes other calls than its trial. Nothing was added."""


class ExamplePasses:
    """The engine: it runs batches, and gives a consumer each use of a parameter with its δ and example axis.

    The network must be in eval mode. Its ``requires_grad`` flags are off inside and are restored. Raises InputError for
    layers that mix the examples by design.

    network: the network that the batches run through.
    parameters: plain name -> the network's own tensors to score.
    loss_fn: returns the losses (N,) of a batch; None for cross-entropy.
    consumer: chooses parameters, and makes a receiver for each batch.
    execution: the precision and memory format of the passes, and whether they are captured.
    loader: the batches to come, whose sizes decide which shapes are captured; None: no shape.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, Tensor],
        loss_fn: LossFn | None,
        consumer: Consumer,
        execution: Execution = DEFAULT_EXECUTION,
        loader: object = None,
    ) -> None:
        refuse_batch_statistics(network.named_modules())
        self.network = network
        self.parameters = dict(parameters)
        self.loss_fn = loss_fn
        self.consumer = consumer
        self.execution = execution
        self.checks = DeviceChecks(device_of(network))
        self.findings = Findings()  # for the current batch's form
        self.uses: dict[str, int] = {}
        self.unknown: dict[str, str] = {}  # parameter -> why it is computed example by example
        self._findings_by_form: dict[Hashable, Findings] = {}  # keyed by the form of the batches
        self._owned = {id(t): t for t in (*network.parameters(), *network.buffers())}
        self._shared = Shared(parameters)
        self._compared = 0
        self._reported: set[str] = set()
        self._source_forms: dict[Source, Hashable] = {}  # the form of the batches that a source reads
        self._not_static: set[Hashable] = set()  # forms
        self._graphed = Graphed(
            self.run_static,
            make_backend(execution.cuda_graphs, device_of(network), loss_fn),
            eager=self._run,
            state=lambda: {**consumer.state(), **self.checks.tensors()},
            is_frequent=is_frequent(loader, 1, execution.cuda_graphs),
            watched=(network,),
        )

    def add(self, batch: Any) -> int:
        """Add one batch and return its number of examples."""
        if not isinstance(batch, Indexed):
            batch = detached(batch if self.loss_fn is not None else split_batch(batch)[1:])
        form = self._form(batch)
        if self._graphed.backend is not None and form not in self._not_static and self.is_static(batch):
            try:
                losses, result = self._graphed(batch)
                self.consumer.take(result)
                return len(losses)
            except NotStatic:
                self._not_static.add(form)
        return len(self._run(batch)[0])

    def _run(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Add one batch. Return its losses (N,), and what the consumer's receiver made."""
        source = batch.source if isinstance(batch, Indexed) else None
        batch = detached(batch)
        if source is not None:
            self._source_forms[source] = self._form(batch)
        with self.ready(batch):
            run, losses = self._pass(lambda: self.batch_run(batch, self.consumer.receiver()), batch)
            if not run.examples:
                return losses.detach()[:0], {}
            if self.parameters and not self.unknown and not run.capture.repeats:
                check_differentiable(losses)
            run.finish()
            self.mark_unknown(run.capture.unknown)
            self.end_batch(run)
            missing = sorted({*self.unknown, *run.missing} & self.parameters.keys())
            if missing:
                self._one_by_one(missing, batch, losses.detach())
            return losses.detach(), self.consumer.result()

    def is_static(self, batch: Any) -> bool:
        """Return whether ``run_static`` can add this batch, after ``add`` has run one of its form.

        The trial of its form is done, every example axis is known, and no other pass over the batch is needed.
        """
        count = examples_in(batch, self.loss_fn)
        findings = self._findings_by_form.get(self._form(batch))
        if count is None or count < 2 or findings is None or findings.is_due_for(count):
            return False
        if findings.ambiguous or findings.is_compared or self.unknown:
            return False
        used = [name for name in self.parameters if self.uses.get(name) or name in findings.axes]
        return findings.trace is not None and count != findings.trace.examples and findings.axes.keys() >= {*used}

    def run_static(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Add a batch that ``is_static``, as a function of its tensors and of the consumer's state alone.

        Nothing is read from the device, and nothing depends on values in Python, so that the call can be recorded and
        repeated. Returns the losses (N,), and what the consumer's receiver made. Raises NotStatic if the passes differ
        from the trial's; the caller puts the state back.
        """
        batch = detached(batch)
        with self._grads_off():
            self.findings = self._findings_by_form[self._form(batch)]
            run = self.batch_run(batch, self.consumer.receiver())
            with _requiring_grad(self.parameters.values()):
                with run.capture:
                    losses = per_example_losses(self.network, batch, self.loss_fn, self.execution)
                if run.capture.repeats or run.capture.unknown or run.capture.unseen(losses):
                    raise NotStatic("uses a parameter where it cannot be captured")
            run.examples = losses.numel()
            if not losses.requires_grad or not run.matches_trial(run.examples) or not self._has_axes(run):
                raise NotStatic("makes other calls than its trial")
            run.backward(losses.sum())
            if run.missing:
                raise NotStatic("has other example axes than its trial")
            run.finish()
            return losses.detach(), self.consumer.result()

    def _form(self, batch: Any) -> Hashable:
        """Return the shapes and dtypes of a batch without the examples' dim; None for one that cannot be cut."""
        if isinstance(batch, Indexed):
            return self._source_forms.get(batch.source)
        return (
            None
            if examples_in(batch, self.loss_fn) is None
            else tuple((t.shape[1:], t.dtype) for t in tensors_of(batch))
        )

    def _has_axes(self, run: BatchRun) -> bool:
        """Return whether every use of the forward pass has an example axis, and is one of those of a trial."""
        copied = {name for name, _ in run.capture.free.copies}
        return self.findings.axes.keys() >= {*run.capture.uses, *copied} and all(
            count <= self.uses.get(name, 0) for name, count in run.capture.uses.items()
        )

    @contextmanager
    def ready(self, batch: Any) -> Iterator[None]:
        """Enable gradients, except those of the network's parameters, and run compiled blocks eagerly.

        If a trial of this form of batches is due, run it on this batch first.
        """
        with self._grads_off():
            self._try(batch)
            yield

    @contextmanager
    def _grads_off(self) -> Iterator[None]:
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
                yield
            finally:
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    def batch_run(self, batch: Any, receiver: Receiver) -> BatchRun:
        """Return the pass of a batch, by the findings of its form, for a receiver."""
        capture_for = self._capture_for(self._trace(batch, self.findings.trace) if self.findings.trace else None)
        return BatchRun(capture_for, self.findings, receiver, self._comparison)

    def _capture_for(self, trace: Trace | None) -> Callable[[Taps], Capture]:
        return lambda taps: Capture(self.parameters, self.unknown, trace, taps, self._shared)

    def _trace(self, batch: Any, reference: Trace | None) -> Trace | None:
        """Return a record for a batch's calls; None for a batch that cannot be cut, or has fewer than two examples."""
        count = examples_in(batch, self.loss_fn)
        return None if count is None or count < 2 else Trace(count, tensors_of(batch), self._owned, reference)

    def _comparison(self, losses: Tensor, dtypes: set[torch.dtype]) -> Comparison:
        self._compared += 1
        return Comparison(losses, dtypes, self._compared)

    def _try(self, batch: Any) -> None:
        """Run a trial if one is due: on at most four examples, and on another number than the batch has.

        Dims that grow with the number of examples then differ between the trial and the batch. A batch of two or three
        repeats its examples in the trial. A batch that cannot be cut is used whole.
        """
        count = examples_in(batch, self.loss_fn)
        form = self._form(batch)
        if count == 1 and self._findings_by_form:
            return  # a single example needs no axis
        if form not in self._findings_by_form and len(self._findings_by_form) == MAX_FORMS:
            del self._findings_by_form[next(iter(self._findings_by_form))]
        self.findings = self._findings_by_form.setdefault(form, Findings())
        if not self.findings.is_due_for(count):
            return
        self.findings.count = count or 0
        if count is not None and count > TRIAL_EXAMPLES:
            batch = cut(batch, [i * (count - 1) // (TRIAL_EXAMPLES - 1) for i in range(TRIAL_EXAMPLES)], self.loss_fn)
        elif count == TRIAL_EXAMPLES:
            batch = cut(batch, [0, 1, 3], self.loss_fn)
        elif count is not None and count > 1:
            batch = cut(batch, [i % count for i in range(TRIAL_EXAMPLES)], self.loss_fn)
        trial, _ = self._pass(lambda: Trial(self._capture_for(self._trace(batch, None))), batch)
        self.parameters = self.consumer.learn(trial, self.parameters)
        self.findings.learn(trial)
        self.uses |= trial.capture.uses
        self.mark_unknown(trial.capture.unknown)

    def _pass(self, make: Callable[[], P], batch: Any) -> tuple[P, Tensor]:
        """Run a forward and a backward pass; repeat them if a parameter has a use that was not captured.

        The parameters require grad in the forward pass, so that uses which are not captured are in the graph. Captured
        uses are detached, so that no parameter's gradient is computed.
        """
        while True:
            made = make()
            capture = made.capture
            wanted = [parameter for name, parameter in self.parameters.items() if name not in self.unknown]
            with _requiring_grad(wanted):
                with capture:
                    losses = per_example_losses(self.network, batch, self.loss_fn, self.execution)
                if isinstance(made, Trial):
                    self.parameters = self.consumer.wanted(made, self.parameters)
                unseen = capture.unseen(losses)
                if not unseen and not capture.repeats:  # with the flags of the forward pass, which recomputing expects
                    made.run(losses)
            if not unseen:
                if capture.repeats:  # with the flags off, so that no repeated use reaches a parameter
                    made.run(losses)
                return made, losses
            reason = "is used by an operation that cannot be captured"
            self.mark_unknown({name: capture.unknown.get(name, reason) for name in unseen})

    def end_batch(self, run: BatchRun) -> None:
        """Finish a batch: request a trial for the next batch of its form if this one had something new."""
        self.findings.is_compared = run.comparison is not None
        if run.undecided and not self.findings.request_trial():
            self.mark_unknown(dict.fromkeys(run.undecided, "has no example axis that could be found"))
        if run.capture.trace is not None and run.capture.trace.is_other:
            self.findings.request_trial()  # a first pass may create tensors that later passes reuse
        self.report(
            {name: f"{why} in some batches" for name, why in run.elsewhere.items() if name not in self._reported}
        )
        self._reported |= set(run.elsewhere)

    def mark_unknown(self, unknown: Mapping[str, str]) -> None:
        """Compute these parameters example by example from now on. ``unknown``: parameter -> the reason."""
        kept = self.consumer.reported(unknown)
        self.parameters = {n: p for n, p in self.parameters.items() if n not in unknown or n in kept}
        new = {name: reason for name, reason in kept.items() if name not in self.unknown}
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
                        self.consumer.accumulate(name, example, gradient.to_dense() if gradient.is_sparse else gradient)

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


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
