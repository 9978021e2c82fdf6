"""One forward and one backward pass over a batch, and every example's own gradient to whoever adds them up.

The loss is the sum of the examples' losses, so an example's slice of δ is its own wherever a layer keeps the examples
apart. That is found out and not assumed: see ``trial``. What mixes them, and what no rule covers, is computed example
by example.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from delfast.batches import LossFn, check_differentiable, cut, detached, examples_in, per_example_losses
from delfast.localize.per_example.capture import Capture
from delfast.localize.per_example.layers import Order, Place, refuse_batch_statistics
from delfast.localize.per_example.trial import ENOUGH, Trial

C = TypeVar("C", bound=Capture)

log = logging.getLogger("delfast")

_STANCE = threading.RLock()  # torch's stance is the process's: two threads that set it would leave it changed
MOST_TRIALS = 3  # for parameters whose δ was zero in the trial, and is not later


class ExampleCapture(Capture):
    """A capture that knows from the trials where each parameter's examples lie.

    ``undecided``: parameters for which something has arrived, and no trial has shown where its examples lie.
    """

    def __init__(self, passes: ExamplePasses) -> None:
        super().__init__(passes.parameters, passes.unknown)
        self.passes = passes
        self.examples = 0
        self.undecided: set[str] = set()

    def place(self, name: str, deltas: Tensor) -> Place | None:
        """Where the examples lie in δ; None if there is nothing to add, or nobody knows where."""
        if name in self.unknown or name in self.undecided:
            return None
        if self.examples == 1:
            return Place(Order(), 1)
        order = self.passes.orders.get(name)
        if order is None:
            if bool(deltas.any()):
                self.undecided.add(name)
            return None
        if order.dim >= deltas.ndim or deltas.shape[order.dim] % self.examples:
            self.unknown[name] = f"writes {tuple(deltas.shape)} for {self.examples} examples"
            return None
        return Place(order, self.examples)

    def run(self, losses: Tensor) -> None:
        self.examples = losses.numel()
        if self.examples and losses.requires_grad:
            self.backward(losses.sum())

    @abstractmethod
    def finish(self) -> None:
        """Both passes are over: add up what had to wait, except for unknown and undecided parameters."""


class ExamplePasses(ABC):
    """Runs batches. A subclass adds up what its ``ExampleCapture`` receives, and ``take`` what that cannot have.

    parameters: plain name -> the network's own tensors, those to score. The network is expected in eval mode; its
    ``requires_grad`` flags are off inside and put back. Raises InputError for layers that mix the examples by intent.
    """

    def __init__(self, network: nn.Module, parameters: Mapping[str, Tensor], loss_fn: LossFn | None) -> None:
        refuse_batch_statistics(network.named_modules())
        self.network = network
        self.parameters = dict(parameters)
        self.loss_fn = loss_fn
        self.orders: dict[str, Order] = {}  # what the trials have shown
        self.uses: dict[str, int] = {}
        self.unknown: dict[str, str] = {}  # parameter -> why it is computed example by example
        self._trials = 0
        self._tried = 0  # examples of the last trial; in few, some orders look alike
        self._try_again = True

    @abstractmethod
    def capture(self) -> ExampleCapture:
        """The capture of one batch."""

    @abstractmethod
    def take(self, name: str, example: int, gradient: Tensor) -> None:
        """The gradient of one example of the batch, for a parameter that the capture could not have."""

    def wanted(self, trial: Trial) -> dict[str, Tensor]:
        """Of the parameters those that a trial's forward pass does not show to be of no interest."""
        return self.parameters

    def learned(self, trial: Trial) -> None:
        """A trial is over."""
        self.orders |= trial.orders
        self.uses |= trial.uses
        self.remember(trial.unknown)

    def add(self, batch: Any) -> int:
        """Add up one batch; its number of examples."""
        batch = detached(batch)
        with self.ready(batch):
            capture, losses = self._pass(self.capture, batch)
            if not capture.examples:
                return 0
            if self.parameters and not self.unknown and not capture.repeats:
                check_differentiable(losses)
            capture.finish()
            self.remember(capture.unknown)
            self.try_again_for(capture.undecided)
            missing = sorted({*self.unknown, *capture.undecided})
            if missing:
                self._one_by_one(missing, batch, losses.detach())
            return capture.examples

    @contextmanager
    def ready(self, batch: Any) -> Iterator[None]:
        """Gradients on, but none of the network's parameters'; compiled blocks run as they were written.

        If a trial is due it has been made, on this batch.
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
                if self._try_again:
                    self._try(batch)
                yield
            finally:
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    def _try(self, batch: Any) -> None:
        """A trial on four examples, or on the whole batch if it cannot be cut."""
        count = examples_in(batch, self.loss_fn)
        if self._tried and count is not None and count <= self._tried:
            return
        if count is not None and count > ENOUGH:
            batch = cut(batch, [i * (count - 1) // (ENOUGH - 1) for i in range(ENOUGH)], self.loss_fn)
        self._trials += 1
        trial, _ = self._pass(lambda: Trial(self.parameters, self.unknown), batch)
        self.learned(trial)
        self._tried = trial.examples
        self._try_again = trial.examples < ENOUGH

    def _pass(self, make: Callable[[], C], batch: Any) -> tuple[C, Tensor]:
        """A forward and a backward pass; once more where a parameter turns out to be used in a way that is not seen.

        The parameters require grad meanwhile, so that such uses are in the graph; uses that are seen are detached, so
        that no gradient of a parameter is computed.
        """
        while True:
            capture = make()
            wanted = [parameter for name, parameter in self.parameters.items() if name not in self.unknown]
            with _requiring_grad(wanted):
                with capture:
                    losses = per_example_losses(self.network, batch, self.loss_fn)
                if isinstance(capture, Trial):
                    self.parameters = self.wanted(capture)
                unseen = capture.unseen(losses)
                if not unseen and not capture.repeats:  # as they were, or recomputing would find other tensors
                    capture.run(losses)
            if not unseen:
                if capture.repeats:  # off, or what is repeated might reach them
                    capture.run(losses)
                return capture, losses
            reason = "is used by an operation that cannot be seen"
            self.remember({name: capture.unknown.get(name, reason) for name in unseen})

    def try_again_for(self, undecided: set[str]) -> None:
        """Have the next batch begin with a trial; after MOST_TRIALS of them these parameters are unknown."""
        if undecided:
            self._try_again, self._tried = self._trials < MOST_TRIALS, 0
            if not self._try_again:
                self.remember(dict.fromkeys(undecided, "has examples in no order that could be seen"))

    def remember(self, unknown: Mapping[str, str]) -> None:
        """Parameter -> why a capture cannot have its examples."""
        new = {name: reason for name, reason in unknown.items() if name not in self.unknown}
        if new:
            self.unknown |= new
            reasons = dict.fromkeys(new.values())
            names = {why: ", ".join(f"'{name}'" for name, reason in new.items() if reason == why) for why in reasons}
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
                        self.take(name, example, gradient.to_dense() if gradient.is_sparse else gradient)

    def _single_losses(self, batch: Any, losses: Tensor) -> Iterator[Tensor]:
        """The loss of each example: alone where that gives the same loss, else within its batch."""
        count = losses.numel()
        if examples_in(batch, self.loss_fn) == count:
            first = per_example_losses(self.network, cut(batch, [0], self.loss_fn), self.loss_fn)
            # a hundredth: far above the rounding of 16 bits, far below what other examples in the loss would do
            if first.shape == (1,) and torch.allclose(first.detach().float(), losses[:1].float(), rtol=1e-2, atol=1e-2):
                yield first[0]
                for example in range(1, count):
                    yield per_example_losses(self.network, cut(batch, [example], self.loss_fn), self.loss_fn)[0]
                return
        yield from per_example_losses(self.network, batch, self.loss_fn)


@contextmanager
def _requiring_grad(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, these parameters require grad; afterwards none of them does."""
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
