"""The trial: find the example axis of every layer's output by a backward pass for one example's loss alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.localization.per_example.capture import Capture, Layer, Taps, Use
from delfast.localization.per_example.layers import ExampleAxis

TRIAL_EXAMPLES = 4  # with fewer examples a trial is not conclusive


class Trial:
    """The pass of a trial, which taps every use. If δ of one example's loss is zero outside a block, the block belongs
    to that example.

    After ``run``:

    - ``axes``: parameter -> the example axis of its outputs; missing if the δ of an example was zero everywhere.
    - ``each``: parameter -> the numbers of slices of an example along that axis.
    - ``ambiguous``: whether δ was zero in so much of a layer that several axes are possible.
    - ``capture.unknown``: parameters with a use that no rule covers, and those that mix the examples.
    - ``capture.uses``: how many uses reach the loss.
    - ``channelwise``: weights of convolutions and linear layers.
    - ``output_dims``: weight -> the dim along which the outputs of its last use lie.
    - ``rewritten``: parameters whose output is changed in place by a later operation.
    """

    def __init__(self, capture_for: Callable[[Taps], Capture]) -> None:
        self.capture = capture_for(self)
        self.axes: dict[str, ExampleAxis] = {}
        self.each: dict[str, set[int]] = {}
        self.ambiguous = False
        self.channelwise: set[str] = set()
        self.output_dims: dict[str, int] = {}
        self.otherwise: set[str] = set()  # used by something other than a convolution or a linear layer
        self.rewritten: set[str] = set()
        self.examples = 0
        self._example = 0
        self._possible: dict[str, set[ExampleAxis]] = {}
        self._shapes: dict[str, set[torch.Size]] = {}
        self._reached: Counter[str] = Counter()  # in one backward pass
        self._evidence: dict[str, set[int]] = {}  # examples whose δ was not zero
        self._written: list[tuple[Use, Tensor, int]] = []
        self._arrived: list[tuple[tuple[str, ...], list[Tensor]]] = []  # names, and per dim where δ is not zero

    def run(self, losses: Tensor) -> None:
        """Run the backward pass of one of the losses (N,).

        With four or more examples, use the second: on a wrong axis (time first, a reversed batch) its own slice is
        seldom at that position. With fewer, one example is not enough: use the first and the last. The others follow
        only if more than one axis remains possible.
        """
        self.examples = losses.numel()
        if not self.examples or not losses.requires_grad:
            return
        tried = [1] if self.examples >= TRIAL_EXAMPLES else sorted({0, self.examples - 1})
        others = [example for example in range(self.examples) if example not in tried][:TRIAL_EXAMPLES]
        for example in (*tried, *others):
            if example in others and not any(len(possible) > 1 for possible in self._possible.values()):
                break
            self._example, self._reached = example, Counter()
            self.capture.backward(losses[example], retain_graph=True)
            self._read_copies()
            self._read_output_grads()
            self.capture.uses |= self._reached
        for use, output, version in self._written:
            if output._version != version:
                self.rewritten.update(use.names)
        self._written = []
        for name, possible in self._possible.items():
            if not possible:
                self.capture.unknown.setdefault(name, "mixes the examples, or has them along no axis that is known")
            elif self.examples > 1 and self._evidence[name].issuperset(tried):
                axis = self.axes[name] = min(possible)
                self.each[name] = {shape[axis.dim] // self.examples for shape in self._shapes[name]}
                self.ambiguous = self.ambiguous or len(possible) > 1

    def compute(self, use: Use, layer: Layer, inputs: Tensor, capture: Capture) -> Tensor:
        output = layer({**use.call, "input": inputs})
        mismatch = use.rule.mismatch(use.call, inputs, output)
        if mismatch is not None:
            raise InputError(f"expected the function registered for '{use.names[0]}' to compute {mismatch}")
        output = capture.tap(use, output, None)
        self._written.append((use, output.detach(), output._version))
        if use.weight is not None:
            (self.channelwise if use.rule.is_channelwise else self.otherwise).add(use.weight)
            self.output_dims[use.weight] = use.rule.output_dim
        if use.bias is not None:
            self.otherwise.add(use.bias)
        return output

    def arrived(self, use: Use, saved: Tensor | None, output_grad: Tensor, key: Hashable) -> None:
        self._record(use.names, output_grad, use.leading)

    def _read_copies(self) -> None:
        for (name, _), copies in self.capture.free.copies.items():
            self.otherwise.add(name)
            if copies.grad is not None:
                self._record((name,), copies.grad, 1)
                copies.grad = None

    def _record(self, names: tuple[str, ...], output_grad: Tensor, leading: int) -> None:
        """Keep which slices along each of the first ``leading`` dims are not zero.

        They are read after the pass: reading them earlier would make the host wait for the device.
        """
        self._reached.update(names)
        for name in names:
            self._shapes.setdefault(name, set()).add(output_grad.shape)
        others = [[other for other in range(output_grad.ndim) if other != dim] for dim in range(leading)]
        self._arrived.append((names, [output_grad.any(dim=dims) if dims else output_grad != 0 for dims in others]))

    def _read_output_grads(self) -> None:
        marks = [mark for _, by_dim in self._arrived for mark in by_dim]
        if not marks:
            return
        together = torch.cat([mark.to(marks[0].device) for mark in marks]).cpu()
        seen = iter(torch.split(together, [len(mark) for mark in marks]))
        for names, by_dim in self._arrived:
            found = [next(seen) for _ in by_dim]
            possible = {
                ExampleAxis(dim, interleaved)
                for dim, mark in enumerate(found)
                for interleaved in ((False, True) if len(mark) > self.examples else (False,))
                if self._is_alone(mark, ExampleAxis(0, interleaved))
            }
            for name in names:
                self._possible[name] = self._possible.get(name, possible) & possible
                evidence = self._evidence.setdefault(name, set())
                if bool(found[0].any()):
                    evidence.add(self._example)
        self._arrived = []

    def _is_alone(self, mark: Tensor, axis: ExampleAxis) -> bool:
        """Return whether ``mark``, which is where δ is not zero, lies within the example's slices along ``axis``."""
        if len(mark) % self.examples:
            return False
        by_example = axis.split(mark, self.examples)
        return not (bool(by_example[: self._example].any()) or bool(by_example[self._example + 1 :].any()))
