"""Sees every use of a parameter in a forward pass, and the gradient δ of what the use wrote in the backward pass.

``Capture`` is a mode that torch asks before it computes anything. Nothing is registered on the model. A use by a layer
function (``layers.layer_functions``) is *tapped*: an autograd node that changes nothing is put behind its output, which
saves what the layer's rule needs and hands it over with δ when the backward pass comes by. Saved by autograd itself, so
checkpointing, saved-tensor hooks and the check for in-place changes work as for any other node. Other uses go to
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
    """One call of a layer function: its arguments without the input, and the scored names of weight and bias."""

    rule: LayerRule
    call: Call
    weight: str | None
    bias: str | None
    leading: int  # the examples lie along one of the output's first dims

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)


class Capture(TorchFunctionMode):
    """``with capture: losses = ...; capture.backward(losses.sum())``.

    ``unknown``: parameters with a use that no rule covers, and why; what has arrived for them is not all of their
    gradient. ``uses``: how often each parameter was tapped in the forward pass. ``trace``: notes its calls.
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
        self._inside = False  # a call that the network made, whose parts are not the network's
        self._taps = 0
        self.dtypes: set[torch.dtype] = set()  # that tapped layers compute in
        self._without_grad: Counter[str] = Counter()  # uses under no_grad: by reentrant checkpointing, to be repeated
        self._repeated: Counter[str] = Counter()
        # what is behind a tap requires grad, whether or not anything before it does
        self.anchor = torch.zeros((), requires_grad=True)

    @abstractmethod
    def compute(self, use: Use, function: Callable[..., Tensor], inputs: Tensor) -> Tensor:
        """Compute the layer and tap it."""

    @abstractmethod
    def arrived(self, use: Use, saved: Tensor | None, deltas: Tensor) -> None:
        """The backward pass has come by a tap."""

    @abstractmethod
    def run(self, losses: Tensor) -> None:
        """The backward pass, or passes, of the losses (N,)."""

    @property
    def repeats(self) -> list[str]:
        """What was computed without gradients in the forward pass, maybe to be repeated with them."""
        return list(self._without_grad)

    def unseen(self, losses: Tensor) -> list[str]:
        """Scored parameters that the losses depend on by a way that was not seen, so that they are in the graph."""
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
        """One backward pass; then ``unknown`` is complete."""
        self._backward = True
        self._taps = 0
        with self:
            _traced_inside(torch.autograd.backward)(loss, retain_graph=retain_graph)
        for name, count in self._without_grad.items():
            if count > self._repeated[name]:
                self.unknown.setdefault(name, "is used where gradients are switched off")

    def tap(self, use: Use, output: Tensor, saved: Tensor | None) -> Tensor:
        """``output``, with a tap behind it that hands on (use, saved, δ)."""
        if not self._backward:
            self.uses.update(use.names)
        self.dtypes.add(output.dtype)
        self._taps += 1
        key = (self._backward, self._taps)  # taps of recomputed layers come again in every backward pass
        saved = None if saved is None else saved.detach()  # shares the version counter
        base = output._base
        if base is None:
            return _tapped(output, saved, self, use, key, output.shape)
        if base.is_contiguous() and output.is_contiguous() and base.numel() == output.numel():
            # a tap changes nothing, but counts as an in-place operation: on a view it would cost copies
            return _tapped(base, saved, self, use, key, output.shape).view(output.shape)
        return _tapped(output.clone(), saved, self, use, key, output.shape)

    def deliver(self, use: Use, saved: Tensor | None, deltas: Tensor, key: Hashable) -> None:
        """A backward pass has come by the tap ``key``."""
        if not self._backward:
            raise InputError(
                "expected a loss_fn that takes no gradients itself when per-example gradients are asked for; "
                "use per_example=False"
            )
        with torch._C.DisableTorchFunction():
            self.received(use, saved, deltas, key)

    def received(self, use: Use, saved: Tensor | None, deltas: Tensor, key: Hashable) -> None:
        """Take what a tap hands over, outside the mode. ``key``: what the tap is known by in another backward pass."""
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
        """Compute the call: tap layers, and give each example its copy of a free parameter."""
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
            if not self._backward and any(t.is_floating_point() for t in tensors_in(output)):  # no shape, no number
                self._without_grad.update(names)
            return output
        if self._backward:
            self._repeated.update(names)
        return self._free(func, args, kwargs, names)

    def _tap_layer(self, rule: LayerRule, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The tapped output, or None if this is no call that the rule knows."""
        call = rule.bind(args, kwargs)
        names = {role: self._names.get(id(call[role])) for role in ("weight", "bias")}
        reason = rule.refusal(call)
        if reason is not None:
            name = names["weight"] or names["bias"] or getattr(func, "__name__", "a layer")
            raise InputError(f"'{name}' {reason}; change that layer or use per_example=False")
        computed = [v for v in call.values() if isinstance(v, Tensor) and id(v) not in self._names]
        inputs, leading = call["input"], rule.leading(call)
        # detached: a parameter that is in the graph all the same has a use that was not seen
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
            with self:  # a function in Python: its parts may be known
                return _traced_inside(func)(*args, **kwargs)
        for name in names:
            self.unknown.setdefault(name, f"is used by {getattr(func, '__name__', func)}, for which there is no rule")
        return func(*args, **kwargs)


def _autocast(inputs: Tensor) -> Tensor:
    """What autocast makes of the input of a convolution or a linear layer: its weight's gradient is of that."""
    kind = inputs.device.type
    if not torch.is_autocast_enabled(kind) or inputs.dtype == torch.float64:
        return inputs
    return inputs.to(torch.get_autocast_dtype(kind))


def _checks_torch_function(function: types.FunctionType) -> bool:
    """Return whether a Python function asks by a global name of its own, which ``_seen_inside`` can replace."""
    names = [name for name in function.__code__.co_names if name.startswith("has_torch_function")]
    return bool(names) and all(name in function.__globals__ for name in names)


@functools.cache
def _traced_inside(function: Any) -> Any:
    """A copy of a Python function of torch that computes at once instead of asking the mode: so the mode is asked
    about what it calls."""
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
        ctx.mark_dirty(output)  # returns it as it is, without a copy and without making it a view
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
                f"expected what '{ctx.use.names[0]}' needs for its gradient to stay as it was, but it was changed in "
                "place before the backward pass; make that operation out of place"
            ) from error
        ctx.capture.deliver(ctx.use, saved, grads[0].reshape(ctx.shape), ctx.key)
        return grads[0], None, None, None, None, None, None


def _tapped(
    output: Tensor, saved: Tensor | None, capture: Capture, use: Use, key: Hashable, shape: torch.Size
) -> Tensor:
    """``output`` with a tap behind it; δ is handed over in ``shape``."""
    result: Tensor = _Tap.apply(output, saved, capture.anchor, capture, use, key, shape)
    return result
