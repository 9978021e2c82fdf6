"""Sums over the examples of |g| or g² for every parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from delfast.batches import LossFn
from delfast.errors import InputError
from delfast.execution import DEFAULT_EXECUTION, Execution
from delfast.localization.per_example.capture import Use
from delfast.localization.per_example.contributions import Contribution, Epilogue, Gradients, epsilon, widened
from delfast.localization.per_example.passes import ExampleCapture, ExamplePasses


class PerExampleGradients(ExamplePasses):
    """Passes that accumulate Σ_x ε(g_x), with g_x the gradient of example x alone and ε(g) = |g| or g²."""

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, Tensor],
        loss_fn: LossFn | None,
        epilogue: Epilogue,
        execution: Execution = DEFAULT_EXECUTION,
        loader: object = None,
    ) -> None:
        super().__init__(network, parameters, loss_fn, execution)
        self.epilogue = epilogue
        with torch.inference_mode(False):  # the sums are changed outside inference mode
            self.sums = {name: _zeros(parameter) for name, parameter in parameters.items()}

    def capture(self, batch: Any) -> ExampleCapture:
        return _SumCapture(self, batch)

    def accumulate(self, name: str, example: int, gradient: Tensor) -> None:
        self.sums[name] += epsilon(widened(gradient), self.epilogue)

    def mean(self, examples: int) -> dict[str, Tensor]:
        """Return plain name -> mean, in the parameter's shape and strides; float32 (float64 for float64 parameters)."""
        return {
            name: torch.empty_like(parameter, dtype=self.sums[name].dtype, requires_grad=False).copy_(
                self.sums[name] / examples
            )
            for name, parameter in self.parameters.items()
        }


def _zeros(parameter: Tensor) -> Tensor:
    """Return zeros with dim 1 innermost in memory, as the kernel expects, for any strides of the parameter."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    moved = torch.zeros_like(
        parameter.movedim(1, -1) if parameter.ndim > 2 else parameter,
        dtype=wide,
        memory_format=torch.contiguous_format,
        requires_grad=False,
    )
    return moved.movedim(-1, 1) if parameter.ndim > 2 else moved


class _SumCapture(ExampleCapture):
    """A capture that adds each contribution as it is received, so that memory does not grow.

    The contributions of a parameter with several uses are kept until all of them are received.
    """

    def __init__(self, passes: PerExampleGradients, batch: Any) -> None:
        super().__init__(passes, batch)
        self.sums, self.epilogue = passes.sums, passes.epilogue
        self._apart: dict[str, Tensor] = {}  # sums of a batch whose comparison is not finished
        self._added: set[str] = set()
        self._waiting: dict[str, list[Contribution]] = {}

    def compute(self, use: Use, function: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        output = function({**use.call, "input": inputs}, use.rule)
        return self.tap(use, output, inputs if use.weight is not None else None)

    def arrived(self, use: Use, saved: Any, deltas: Tensor) -> None:
        for name, is_weight in ((use.weight, True), (use.bias, False)):
            axis = None if name is None else self.axis(name, deltas, use.leading)
            if name is None or axis is None:
                continue
            contribution: Contribution | None
            if is_weight:
                contribution = use.rule.weight(use.call, saved, deltas, axis)
            else:
                contribution = use.rule.bias(use.call, deltas, axis)
            if contribution is None:
                self.unknown[name] = f"has several images of {deltas.ndim - 2} dimensions per example"
            else:
                self._receive(name, contribution)

    def _receive(self, name: str, contribution: Contribution) -> None:
        if max(self.passes.uses.get(name, 0), self.uses[name]) > 1:
            self._waiting.setdefault(name, []).append(contribution)
        elif name in self._added:
            raise self._changed(name)
        else:
            self._added.add(name)
            if self.comparison is not None:
                self._apart[name] = torch.zeros_like(self.sums[name])
            contribution.add(self._apart.get(name, self.sums[name]), self.epilogue)

    def finish(self) -> None:
        for (name, _), copies in self.free.copies.items():
            axis = None if copies.grad is None else self.axis(name, copies.grad, 1)
            if copies.grad is not None and axis is not None:
                self._receive(name, Gradients(axis.split(copies.grad).sum(dim=1)))
        missing = self.missing
        if missing & self._added - set(self._apart):
            raise self._changed(min(missing & self._added))
        for name in set(self._apart) - missing:
            self.sums[name] += self._apart[name]
        for name in set(self._waiting) - missing:
            uses = self._waiting[name]
            for example in range(self.examples):  # an example's uses are added before ε
                gradient = sum((use.of(example) for use in uses[1:]), start=uses[0].of(example))
                self.sums[name] += epsilon(gradient, self.epilogue)

    def _changed(self, name: str) -> InputError:
        return InputError(
            f"expected '{name}' to be used alike for every batch, got a batch that uses it more often or in another "
            "way than the first; use per_example=False"
        )
