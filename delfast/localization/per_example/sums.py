"""Sums over the examples of |g| or g² for every parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from delfast.batches import LossFn
from delfast.errors import InputError
from delfast.execution import DEFAULT_EXECUTION, Execution
from delfast.localization.per_example.batch import BatchRun, Findings
from delfast.localization.per_example.capture import Layer, Use
from delfast.localization.per_example.contributions import (
    ChannelGradients,
    Contribution,
    Gradients,
    Transform,
    epsilon,
    wide,
    widened,
)
from delfast.localization.per_example.passes import ExamplePasses
from delfast.localization.per_example.trial import Trial


class PerExampleGradients:
    """The consumer that accumulates Σ_x ε(g_x), with g_x the gradient of example x alone and ε(g) = |g| or g²."""

    def __init__(
        self,
        network: nn.Module,
        parameters: Mapping[str, Tensor],
        loss_fn: LossFn | None,
        transform: Transform,
        execution: Execution = DEFAULT_EXECUTION,
        loader: object = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.transform = transform
        self.passes = ExamplePasses(network, parameters, loss_fn, self, execution, loader)
        self.checks = self.passes.checks
        with torch.inference_mode(False):  # the sums are changed outside inference mode
            self.sums = {name: _zeros(parameter) for name, parameter in parameters.items()}

    def add(self, batch: Any) -> int:
        """Add one batch and return its number of examples."""
        return self.passes.add(batch)

    def mean(self, examples: int, *, last: bool = False) -> dict[str, Tensor]:
        """Return plain name -> mean, in the parameter's shape and strides; float32 (float64 for float64 parameters)."""
        return {
            name: torch.empty_like(parameter, dtype=self.sums[name].dtype, requires_grad=False).copy_(
                self.sums[name] / examples
            )
            for name, parameter in self.parameters.items()
        }

    @property
    def uses(self) -> dict[str, int]:
        """Return the number of uses of each parameter by an example."""
        return self.passes.uses

    @property
    def findings(self) -> Findings:
        """The findings of the trial of the last batch's form."""
        return self.passes.findings

    @property
    def unknown(self) -> dict[str, str]:
        """The parameters that are computed example by example, each with the reason."""
        return self.passes.unknown

    def wanted(self, trial: Trial, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(parameters)

    def learn(self, trial: Trial, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(parameters)

    def reported(self, unknown: Mapping[str, str]) -> dict[str, str]:
        return dict(unknown)

    def receiver(self) -> _SumReceiver:
        return _SumReceiver(self.sums, self.transform, self.uses)

    def accumulate(self, name: str, example: int, gradient: Tensor) -> None:
        self.sums[name] += epsilon(widened(gradient), self.transform)

    def state(self) -> dict[str, Tensor]:
        return self.sums

    def result(self) -> dict[str, Tensor]:
        return {}

    def take(self, result: dict[str, Tensor]) -> None:
        """Do nothing: all results are in the sums."""


def _zeros(parameter: Tensor) -> Tensor:
    """Return zeros with dim 1 innermost in memory, as the kernel expects, for any strides of the parameter."""
    moved = torch.zeros_like(
        parameter.movedim(1, -1) if parameter.ndim > 2 else parameter,
        dtype=wide(parameter.dtype),
        memory_format=torch.contiguous_format,
        requires_grad=False,
    )
    return moved.movedim(-1, 1) if parameter.ndim > 2 else moved


class _SumReceiver:
    """The receiver that adds each contribution when it arrives, so that memory does not grow.

    The contributions of a parameter with several uses are kept until all of them have arrived. ``known_uses``: how
    often each parameter was used in the trials.
    """

    def __init__(self, sums: Mapping[str, Tensor], transform: Transform, known_uses: Mapping[str, int]) -> None:
        self.sums, self.transform, self.known_uses = sums, transform, known_uses
        self._apart: dict[str, Tensor] = {}  # sums of a batch whose comparison is not finished
        self._added: set[str] = set()
        self._waiting: dict[str, list[Contribution]] = {}

    def compute(self, use: Use, layer: Layer, inputs: Tensor, run: BatchRun) -> Tensor:
        output = layer({**use.call, "input": inputs})
        return run.capture.tap(use, output, inputs if use.weight is not None else None)

    def receive(self, use: Use, saved: Tensor | None, output_grad: Tensor, run: BatchRun) -> None:
        weight = bias = None
        if use.weight is not None and (axis := run.axis(use.weight, output_grad, use.leading)) is not None:
            assert saved is not None
            weight = use.rule.weight(use.call, saved, output_grad, axis)
            if weight is None:
                run.capture.unknown[use.weight] = f"has several images of {output_grad.ndim - 2} dimensions per example"
        if use.bias is not None and (axis := run.axis(use.bias, output_grad, use.leading)) is not None:
            bias = use.rule.bias(use.call, output_grad, axis)
        if (
            isinstance(weight, ChannelGradients)
            and bias is not None
            and not any(self._waits(n, run) for n in use.names)
        ):
            both = [self._sums_of(name, run) for name in use.names]  # one op reads δ for both
            return weight.add_with_bias(both, self.transform)
        for name, contribution in ((use.weight, weight), (use.bias, bias)):
            if name is not None and contribution is not None:
                self._receive(name, contribution, run)

    def finish(self, run: BatchRun) -> None:
        for (name, _), copies in run.capture.free.copies.items():
            axis = None if copies.grad is None else run.axis(name, copies.grad, 1)
            if copies.grad is not None and axis is not None:
                self._receive(name, Gradients(axis.split(copies.grad).sum(dim=1)), run)
        missing = run.missing
        if missing & self._added - set(self._apart):
            raise self._changed(min(missing & self._added))
        for name in set(self._apart) - missing:
            self.sums[name] += self._apart[name]
        for name in set(self._waiting) - missing:
            uses = self._waiting[name]
            for example in range(run.examples):  # an example's uses are added before ε
                gradient = sum((use.of(example) for use in uses[1:]), start=uses[0].of(example))
                self.sums[name] += epsilon(gradient, self.transform)

    def _waits(self, name: str, run: BatchRun) -> bool:
        """Return whether an example uses the parameter several times."""
        return max(self.known_uses.get(name, 0), run.capture.uses[name]) > 1

    def _receive(self, name: str, contribution: Contribution, run: BatchRun) -> None:
        if self._waits(name, run):
            self._waiting.setdefault(name, []).append(contribution)
        else:
            contribution.add(self._sums_of(name, run), self.transform)

    def _sums_of(self, name: str, run: BatchRun) -> Tensor:
        """Return the sums for the only contribution to a parameter in this batch."""
        if name in self._added:
            raise self._changed(name)
        self._added.add(name)
        if run.comparison is None:
            return self.sums[name]
        self._apart[name] = torch.zeros_like(self.sums[name])
        return self._apart[name]

    def _changed(self, name: str) -> InputError:
        return InputError(
            f"expected '{name}' to be used alike for every batch, got a batch that uses it more often or in another "
            "way than the first; use per_example=False"
        )
