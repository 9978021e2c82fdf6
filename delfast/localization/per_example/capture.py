"""Capture every use of a parameter in a forward pass, and the output gradient δ of that use in the backward pass.

``Capture`` is a ``TorchFunctionMode``: torch calls it for every function. Nothing is registered on the model. A use by
a layer function (``layers.layer_rules``) is *tapped*: an autograd node that computes the identity is put behind the
output. The node saves what the layer's rule needs, and passes it on with δ in the backward pass. Autograd itself saves
it, so checkpointing, saved-tensor hooks and the check for in-place changes work as for any other node. Other uses go to
``free.FreeParameters``.
"""

from __future__ import annotations

import functools
import types
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from delfast.errors import InputError
from delfast.localization.per_example.free import FreeParameters, tensors_in
from delfast.localization.per_example.layers import Call, LayerRule, layer_rules
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


class Capture(TorchFunctionMode):
    """A mode for one forward and backward pass: ``with capture: losses = ...; capture.backward(losses.sum())``.

    ``unknown``: parameter -> why no rule covers one of its uses. The gradients received for it are incomplete.
    ``uses``: how often each parameter was tapped in the forward pass. ``trace``: the record of its calls.
    """

    def __init__(self, parameters: Mapping[str, Tensor], unknown: Mapping[str, str], trace: Trace | None) -> None:
        super().__init__()
        self.unknown = dict(unknown)
        self.trace = trace
        self.uses: Counter[str] = Counter()
        self.free = FreeParameters(parameters, self.unknown)
        self._rules = layer_rules()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._backward = False
        self._inside = False  # inside a call of the network: its inner calls are not recorded
        self._taps = 0
        self.dtypes: set[torch.dtype] = set()  # of the tapped layers' outputs
        self._without_grad: Counter[str] = Counter()  # uses under no_grad, which reentrant checkpoints repeat
        self._repeated: Counter[str] = Counter()
        # makes the output of a tap require grad even if its input does not
        self.anchor = torch.zeros((), requires_grad=True)

    @abstractmethod
    def compute(self, use: Use, function: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        """Compute the layer, tap it and return its output."""

    @abstractmethod
    def arrived(self, use: Use, saved: Tensor | None, deltas: Tensor) -> None:
        """Accumulate what a tap saved and its output gradient δ."""

    @abstractmethod
    def run(self, losses: Tensor) -> None:
        """Run the backward pass or passes of the losses (N,)."""

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
            _traced_inside(torch.autograd.backward)(loss, retain_graph=retain_graph)
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
        saved = None if saved is None else saved.detach()  # shares the version counter
        base = output._base
        if base is None:
            return _tapped(output, saved, self, use, key, output.shape)
        if base.is_contiguous() and output.is_contiguous() and base.numel() == output.numel():
            # autograd treats a tap as an in-place operation, which on a view would cost copies
            return _tapped(base, saved, self, use, key, output.shape).view(output.shape)
        return _tapped(output.clone(), saved, self, use, key, output.shape)

    def deliver(self, use: Use, saved: Tensor | None, deltas: Tensor, key: Hashable) -> None:
        """Pass on what the tap ``key`` saved and its δ, outside the mode."""
        if not self._backward:
            raise InputError(
                "expected a loss_fn that computes no gradients itself with per_example=True, got one that does; "
                "use per_example=False"
            )
        with torch._C.DisableTorchFunction():
            self.received(use, saved, deltas, key)

    def received(self, use: Use, saved: Tensor | None, deltas: Tensor, key: Hashable) -> None:
        """Process what a tap delivers. ``key`` identifies the same tap in another backward pass."""
        self.arrived(use, saved, deltas)

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
                return _traced_inside(func)(*args, **kwargs)
        rule = self._rules.get(func)
        if rule is not None:
            output = self._tap_layer(rule, func, args, kwargs)
            if output is not None:
                return output
        names = self.free.names_in((args, kwargs))
        if not names:
            return func(*args, **kwargs)
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
        # detached, so that a parameter in the graph is one with a use that was not captured
        call |= {"input": None} | {role: call[role].detach() for role, name in names.items() if name is not None}
        use = Use(rule, call, names["weight"], names["bias"], leading)
        if not use.names or not use.leading or self.free.names_in(computed) or not torch.is_grad_enabled():
            return None
        if self._backward:
            self._repeated.update(use.names)
        return self.compute(
            use, functools.partial(self._call, func), _autocast(inputs) if rule.is_channelwise else inputs
        )

    def _call(self, func: Any, call: Call, rule: LayerRule) -> Tensor:
        return rule.compute(func, call)

    def _free(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> Any:
        handled, output = self.free.use(func, args, kwargs)
        if handled:
            return output
        if isinstance(func, types.FunctionType) and _checks_torch_function(func):
            with self:  # a Python function: rules may cover the calls inside it
                return _traced_inside(func)(*args, **kwargs)
        for name in names:
            self.unknown.setdefault(name, f"is used by {getattr(func, '__name__', func)}, for which there is no rule")
        return func(*args, **kwargs)


def _autocast(inputs: Tensor) -> Tensor:
    """Convert the input of a convolution or linear layer as autocast does, because the weight gradient uses that."""
    kind = inputs.device.type
    if not torch.is_autocast_enabled(kind) or inputs.dtype == torch.float64:
        return inputs
    return inputs.to(torch.get_autocast_dtype(kind))


def _checks_torch_function(function: types.FunctionType) -> bool:
    """Return whether a Python function calls ``has_torch_function`` by global names, which can be replaced."""
    names = [name for name in function.__code__.co_names if name.startswith("has_torch_function")]
    return bool(names) and all(name in function.__globals__ for name in names)


@functools.cache
def _traced_inside(function: Any) -> Any:
    """Copy a Python function of torch so that it does not dispatch to the mode itself; the calls inside it then do."""
    names = {name: _no_torch_function for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _no_torch_function(*_: object) -> bool:
    return False


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
        ctx.capture.deliver(ctx.use, saved, grads[0].reshape(ctx.shape), ctx.key)
        return grads[0], None, None, None, None, None, None


def _tapped(
    output: Tensor, saved: Tensor | None, capture: Capture, use: Use, key: Hashable, shape: torch.Size
) -> Tensor:
    """Put a tap behind ``output``. δ is delivered in ``shape``."""
    result: Tensor = _Tap.apply(output, saved, capture.anchor, capture, use, key, shape)
    return result
