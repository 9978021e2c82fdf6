"""Capture every use of a parameter in a forward pass, and the output gradient δ of that use in the backward pass.

``Capture`` is a ``TorchFunctionMode``: torch calls it for every function. Nothing is registered on the model. A use by
a layer function (``rules.layer_rules``) is *tapped*: an autograd node that computes the identity is put behind the
output. The node saves what the layer's rule needs, and passes it on with δ in the backward pass. Autograd itself saves
it, so checkpointing, saved-tensor hooks and the check for in-place changes work as for any other node. Other uses go to
``free.FreeParameters``. What is saved, and what is made of δ, is decided by the capture's ``Taps``.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from delfast.errors import InputError
from delfast.localization.per_example.free import FreeParameters, tensors_in
from delfast.localization.per_example.layers import Call, LayerRule
from delfast.localization.per_example.rules import layer_rules
from delfast.localization.per_example.rules.attention import Composite
from delfast.localization.per_example.trace import Trace


@dataclass(frozen=True)
class Use:
    """One call of a layer function: its arguments except the input, and the names of its weight and bias if scored."""

    rule: LayerRule
    call: Call
    weight: str | None
    bias: str | None
    leading: int  # the examples lie along one of this many leading dims of the output

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)


Layer = Callable[[Call], Tensor]  # computes a layer from the arguments of one call


class Taps(Protocol):
    """Decides what is saved of a use, and receives what was saved together with δ."""

    def compute(self, use: Use, layer: Layer, inputs: Tensor, capture: Capture) -> Tensor:
        """Compute the layer, tap it by ``capture.tap`` and return its output."""

    def arrived(self, use: Use, saved: Tensor | None, output_grad: Tensor, key: Hashable) -> None:
        """Process a use. ``key`` identifies the same tap in another backward pass."""


class Shared:
    """State that the captures of all batches of one network share: the parameters, detached, and the taps' anchor."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self._detached: dict[str, Tensor] = {}
        with torch.inference_mode(False):
            # makes the output of a tap require grad even if its input does not
            self.anchor = torch.zeros((), requires_grad=True)

    def detached(self, name: str) -> Tensor:
        """Return a parameter detached, so that a parameter in the graph is one with a use that was not captured."""
        parameter, kept = self._parameters[name], self._detached.get(name)
        if kept is None or not _same_memory(kept, parameter):  # ``.data`` may be assigned between two batches
            kept = self._detached[name] = parameter.detach()
        return kept


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        type(a) is Tensor
        and a.data_ptr() == b.data_ptr()
        and (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
    )


class Capture(TorchFunctionMode):
    """A mode for one forward and backward pass: ``with capture: losses = ...; capture.backward(losses.sum())``.

    unknown: parameter -> why no rule covers one of its uses. The gradients received for it are incomplete.
    uses: the number of times that each parameter was tapped in the forward pass.
    trace: the record of its calls.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        unknown: Mapping[str, str],
        trace: Trace | None,
        taps: Taps,
        shared: Shared,
    ) -> None:
        super().__init__()
        self.unknown = dict(unknown)
        self.trace = trace
        self.taps = taps
        self.uses: Counter[str] = Counter()
        self.free = FreeParameters(parameters, self.unknown)
        self._shared = shared
        self._rules = layer_rules()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._backward = False
        self._inside = False  # inside a call of the network: its inner calls are not recorded
        self._taps = 0
        self.dtypes: set[torch.dtype] = set()  # of the tapped layers' outputs
        self._without_grad: Counter[str] = Counter()  # uses under no_grad, which reentrant checkpoints repeat
        self._repeated: Counter[str] = Counter()
        self._converted: tuple[Tensor | None, int, Tensor | None] = (None, 0, None)  # the last input, by autocast

    @property
    def repeats(self) -> list[str]:
        """Return the parameters used without gradients in the forward pass, whose use a checkpoint may repeat."""
        return list(self._without_grad)

    def unseen(self, losses: Tensor) -> list[str]:
        """Return the scored parameters that are in the autograd graph, because some use of theirs was not captured."""
        names = {id(parameter): name for name, parameter in self.free.parameters.items()}
        found, seen, ahead = [], {losses.grad_fn}, [losses.grad_fn]
        while ahead:
            node = ahead.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) in names:
                found.append(names[id(leaf)])
            following = [] if node is None else [next_node for next_node, _ in node.next_functions]
            ahead += [next_node for next_node in following if next_node not in seen]
            seen.update(following)
        return found

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Run one backward pass. Afterwards ``unknown`` is complete."""
        self._backward = True
        self._taps = 0
        with self:
            _run_backward(loss, retain_graph=retain_graph)
        for name, count in self._without_grad.items():
            if count > self._repeated[name]:
                self.unknown.setdefault(name, "is used where gradients are switched off")

    def tap(self, use: Use, output: Tensor, saved: Tensor | None) -> Tensor:
        """Return ``output`` with a tap behind it that delivers (use, saved, δ)."""
        if not self._backward:
            self.uses.update(use.names)
        self.dtypes.add(output.dtype)
        self._taps += 1
        key = (self._backward, self._taps)  # a recomputed layer is tapped again in every backward pass
        if saved is output:
            saved = output.detach()  # shares the version counter
        base = output._base
        if base is None:
            return _tapped(output, saved, self, use, key, output.shape)
        if base.is_contiguous() and output.is_contiguous() and base.numel() == output.numel():
            # autograd treats a tap as an in-place operation, which on a view would cost copies
            return _tapped(base, saved, self, use, key, output.shape).view(output.shape)
        return _tapped(output.clone(), saved, self, use, key, output.shape)

    def deliver(self, use: Use, saved: Tensor | None, output_grad: Tensor, key: Hashable) -> None:
        """Pass on what the tap ``key`` saved and its δ, outside the mode."""
        if not self._backward:
            raise InputError(
                "expected a loss_fn that computes no gradients itself with per_example=True, got one that does; "
                "use per_example=False"
            )
        with torch._C.DisableTorchFunction():
            self.taps.arrived(use, saved, output_grad, key)

    def __torch_function__(
        self, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._backward or self._inside or self.trace is None:
            return self._answer(func, args, kwargs)
        self._inside = True
        try:
            output = self._answer(func, args, kwargs)
        finally:
            self._inside = False
        self.trace.record(func, args, kwargs, output)
        return output

    def _answer(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Compute the call: tap layers, and replace a free parameter by one copy per example."""
        if func is torch.autograd.backward:  # checkpointing, inside the backward pass
            with self:
                return _run_backward(*args, **kwargs)
        rule = self._rules.get(func)
        if isinstance(rule, LayerRule):
            output = self._tap_layer(rule, func, args, kwargs)
            if output is not None:
                return output
        names = self.free.names_in((args, kwargs))
        if not names:
            return func(*args, **kwargs)
        if isinstance(rule, Composite):
            with self:  # rules cover the calls inside it
                return rule.compute(*args, **kwargs)
        if not torch.is_grad_enabled():
            output = func(*args, **kwargs)
            if not self._backward and any(t.is_floating_point() for t in tensors_in(output)):  # not only a shape
                self._without_grad.update(names)
            return output
        if self._backward:
            self._repeated.update(names)
        return self._free(func, args, kwargs, names)

    def _tap_layer(self, rule: LayerRule, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the tapped output, or None if the rule does not cover this call."""
        call = rule.bind(args, kwargs)
        names = {role: self._names.get(id(call[role])) for role in ("weight", "bias")}
        reason = rule.refusal(call)
        if reason is not None:
            name = names["weight"] or names["bias"] or getattr(func, "__name__", "a layer")
            raise InputError(f"'{name}' {reason}; change that layer or use per_example=False")
        computed = [v for v in call.values() if isinstance(v, Tensor) and id(v) not in self._names]
        inputs, leading = call["input"], rule.leading(call)
        call |= {"input": None} | {role: self._shared.detached(n) for role, n in names.items() if n is not None}
        use = Use(rule, call, names["weight"], names["bias"], leading)
        if not use.names or not use.leading or self.free.names_in(computed) or not torch.is_grad_enabled():
            return None
        if self._backward:
            self._repeated.update(use.names)
        layer = functools.partial(rule.compute, func)
        return self.taps.compute(use, layer, self._autocast(inputs) if rule.is_channelwise else inputs, self)

    def _autocast(self, inputs: Tensor) -> Tensor:
        """Convert the input of a convolution or linear layer as autocast does, because the weight gradient uses that.

        Layers that follow each other on one input (queries, keys, values) share the converted values. Their gradients
        are converted back one by one, and added in the input's dtype, as under autocast.
        """
        kind = inputs.device.type
        if not torch.is_autocast_enabled(kind) or inputs.dtype == torch.float64:
            return inputs
        dtype = torch.get_autocast_dtype(kind)
        if inputs.dtype == dtype:
            return inputs
        last, version, converted = self._converted
        if last is not inputs or version != inputs._version or converted is None or converted.dtype != dtype:
            converted = inputs.detach().to(dtype)
            self._converted = (inputs, inputs._version, converted)
        result: Tensor = _Converted.apply(inputs, converted)
        return result

    def _free(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> Any:
        handled, output = self.free.use(func, args, kwargs)
        if handled:
            return output
        for name in names:
            self.unknown.setdefault(name, f"is used by {getattr(func, '__name__', func)}, for which there is no rule")
        return func(*args, **kwargs)


def _run_backward(
    tensors: Tensor | Sequence[Tensor],
    grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Run ``torch.autograd.backward`` without the dispatch to a mode that is active, so that it stays active inside."""
    roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    given = grad_variables if grad_tensors is None else grad_tensors
    given = (given,) if isinstance(given, Tensor) else (None,) * len(roots) if given is None else tuple(given)
    if any(g is None and root.requires_grad and root.numel() != 1 for root, g in zip(roots, given, strict=True)):
        raise RuntimeError("grad can be implicitly created only for scalar outputs")  # torch's own error
    gradients = tuple(
        torch.ones_like(root) if gradient is None and root.requires_grad else gradient
        for root, gradient in zip(roots, given, strict=True)
    )
    leaves = () if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    keep = create_graph if retain_graph is None else retain_graph
    _engine_run_backward(roots, gradients, keep, create_graph, leaves, allow_unreachable=True, accumulate_grad=True)


class _Converted(torch.autograd.Function):
    """``inputs`` in the dtype of ``converted``, which has their values."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, converted: Tensor) -> Tensor:
        ctx.dtype = inputs.dtype
        return converted.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(ctx.dtype), None


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        saved: Tensor | None,
        anchor: Tensor,
        capture: Capture,
        use: Use,
        key: Hashable,
        shape: torch.Size,
    ) -> Tensor:
        ctx.mark_dirty(output)  # returns the same tensor: no copy, no view
        ctx.save_for_backward(saved)
        ctx.capture, ctx.use, ctx.key, ctx.shape = capture, use, key, shape
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        try:
            (saved,) = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise InputError(
                f"expected the tensors that the gradient of '{ctx.use.names[0]}' needs to stay unchanged, got one that "
                "was changed in place before the backward pass; use the out-of-place operation"
            ) from error
        output_grad = grads[0] if grads[0].shape == ctx.shape else grads[0].reshape(ctx.shape)
        ctx.capture.deliver(ctx.use, saved, output_grad, ctx.key)
        return grads[0], None, None, None, None, None, None


def _tapped(
    output: Tensor, saved: Tensor | None, capture: Capture, use: Use, key: Hashable, shape: torch.Size
) -> Tensor:
    """Put a tap behind ``output``. δ is delivered in ``shape``."""
    result: Tensor = _Tap.apply(output, saved, capture._shared.anchor, capture, use, key, shape)
    return result
