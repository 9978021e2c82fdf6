"""Protection of a compact model around every step of an optimizer.

The only hooks of torch that reach optimizers made later are process-wide. Two of them are registered, once, at import:
registering one later breaks the loop over the hooks of a step that runs meanwhile. The hooks return at once for an
optimizer that holds no Parameter of a compact model: optimizers of other threads are not affected. ``_registry`` finds
a Parameter by its id, and keeps no Parameter and no model alive.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from delfast.compaction.layers import ROWS, CompactLayer, sharded_since, write_rows_of
from delfast.errors import InputError
from delfast.masked_optimizer import MaskedOptimizer, check_dense
from delfast.sharding import is_dtensor, is_flat


class Guard:
    """Protect one compact model in the steps of any optimizer, in any thread, until ``remove``.

    model: the compact model. A step of its sharded Parameters is refused if it has lost any of the others.
    guarded: name -> (Parameter, bool flags of its shape: the elements that may change). The gradient of every other
        element is set to zero when it is computed, so that gradient clipping does not count it. After a step, every
        other element has its earlier value, to the bit: weight decay and old momentum are undone. A
        ``MaskedOptimizer`` with the mask of this ``digest`` does not move these elements, and nothing is restored.
    rows: name of the weight -> (the weight, the layer that is trained through its ``weight_rows``). A step writes the
        rows into the weight. It is refused for an optimizer that holds the weight and not the rows.
    frozen: name -> Parameter. A step is refused if one of these has a gradient.
    idle: names in ``rows`` without a gradient so far; a step removes the names whose rows have one.

    ``has_stepped``: whether a step of the rows has begun.
    """

    def __init__(
        self,
        model: nn.Module,
        guarded: Mapping[str, tuple[Tensor, Tensor]],
        digest: str,
        rows: Mapping[str, tuple[Tensor, CompactLayer]],
        frozen: Mapping[str, Tensor],
        idle: set[str],
    ) -> None:
        self._digest, self._idle, self.has_stepped = digest, idle, False
        self._flags = {id(parameter): _Flags(flags) for parameter, flags in guarded.values()}
        self._weights = {id(weight): name for name, (weight, _) in rows.items()}
        self._layers = {id(layer.weight_rows): weakref.ref(layer) for _, layer in rows.values()}
        self._names = {id(layer.weight_rows): name for name, (_, layer) in rows.items()}
        self._frozen = {id(parameter): name for name, parameter in frozen.items()}
        self._guarded = {id(parameter): name for name, (parameter, _) in guarded.items()}
        self._handles: list[Any] = []
        self._references: list[weakref.ref[Tensor]] = []
        try:
            for name, (parameter, _) in guarded.items():
                hook = _masking_hook(name, self._flags[id(parameter)])
                self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]
            watched = [parameter for parameter, _ in guarded.values()]
            watched += [tensor for weight, layer in rows.values() for tensor in (weight, layer.weight_rows)]
            for parameter in (*watched, *frozen.values()):
                self._references.append(_registry.add(parameter, self))
            _registry.models[model] = self
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the hooks; the Parameters do not change."""
        for handle in self._handles:
            handle.remove()
        for key in (*self._flags, *self._weights, *self._layers, *self._frozen):
            _registry.remove(key, self)
        _registry.remove_model(self)
        self._references.clear()

    def refuse_lost(self, present: Collection[int]) -> None:
        """Raise InputError if a Parameter that this guard protects is not among those of these ids, the model's."""
        for names in (self._names, self._guarded, self._frozen):
            for key, name in names.items():
                if key not in present:
                    raise sharded_since(name)

    def before(self, optimizer: Optimizer, held: Iterable[Tensor]) -> list[Restore]:
        """Return what to restore after the optimizer's step.

        held: the Parameters of this guard that the optimizer holds. InputError for a step that leaves out rows, or
        moves what is not selected.
        """
        rows = [p for p in held if id(p) in self._layers]
        of_weights = [self._weights[id(p)] for p in held if id(p) in self._weights]
        if of_weights and not rows:
            name = of_weights[0]
            raise InputError(
                f"expected an optimizer made after compact(), got one of '{name}' without the "
                f"'{rows_name(name)}' that it is trained through; make the optimizer again"
            )
        for p in held:
            if id(p) in self._frozen and p.grad is not None:
                raise InputError(
                    f"expected no gradient of '{self._frozen[id(p)]}', where the mask selects nothing, got one; "
                    "leave its requires_grad off until undo()"
                )
        self.has_stepped |= bool(rows)
        self._note_gradients(rows)
        if isinstance(optimizer, MaskedOptimizer) and optimizer.mask.digest == self._digest:
            return []
        guarded = [p for p in held if id(p) in self._flags]
        return list(zip(guarded, (self._flags[id(p)] for p in guarded), _negated(guarded), strict=True))

    def after(self, held: Iterable[Tensor]) -> None:
        """Write the rows that were stepped into the weights.

        Code may read a layer's weight without calling the layer: the fast path of nn.TransformerEncoderLayer does.
        Increment the rows' version: fused kernels change a parameter without that, and a compiled forward pass
        increments the weight's version, so that the rows would count as the older of the two.
        """
        stepped = [p for p in held if id(p) in self._layers]
        self._note_gradients(stepped)  # gradients of a closure, which the step has called
        torch.autograd.graph.increment_version(stepped)
        layers = [layer for rows in stepped if (layer := self._layers[id(rows)]()) is not None]
        if torch.compiler.is_compiling():
            for layer in layers:
                layer.write_rows()
            return
        write_rows_of(layers)
        for layer in layers:
            layer.row_group.is_due = True

    def _note_gradients(self, rows: Iterable[Tensor]) -> None:
        if self._idle:
            self._idle.difference_update(self._names[id(p)] for p in rows if p.grad is not None)


class _Flags:
    """The elements that may change, on the device that last needed them: the model may move."""

    def __init__(self, flags: Tensor) -> None:
        self._flags, self._zero = flags, torch.zeros((), device=flags.device)

    def on(self, device: torch.device) -> Tensor:
        """Return the flags on this device."""
        if self._flags.device != device:
            self._flags = self._flags.to(device)
        return self._flags

    def of(self, gradient: Tensor) -> Tensor:
        """Return the gradient with zeros where elements may not change; a product would keep NaN."""
        if (self._zero.device, self._zero.dtype) != (gradient.device, gradient.dtype):
            self._zero = gradient.new_zeros(())  # kept, since torch.where makes a tensor of a number at each call
        return torch.where(self.on(gradient.device), gradient, self._zero)


Restore = tuple[Tensor, _Flags, Tensor]
"""A Parameter, the elements that may change, and its values before the step, negated."""


def _negated(parameters: list[Tensor]) -> list[Tensor]:
    """Return the values with the other sign, which is exact: torch has no one operation that copies a list."""
    with torch.no_grad():
        return list(torch._foreach_neg(parameters)) if parameters else []


def rows_name(weight: str) -> str:
    """Return the name of the Parameter that holds the selected rows of this weight."""
    return weight.removesuffix("weight") + ROWS


def _masking_hook(name: str, flags: _Flags) -> Callable[[Tensor], Tensor]:
    """Return a hook that sets the gradient of the elements that may not change to zero."""

    def mask(gradient: Tensor) -> Tensor:
        check_dense(name, gradient)
        return flags.of(gradient)

    return mask


class _Registry:
    """The guards of each Parameter, by id. No method uses a global name: these are gone when the interpreter ends."""

    def __init__(self) -> None:
        self.guards: dict[int, tuple[Guard, ...]] = {}
        self.models: weakref.WeakKeyDictionary[nn.Module, Guard] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()  # garbage collection inside may call remove

    def add(self, parameter: Tensor, guard: Guard) -> weakref.ref[Tensor]:
        """Add a guard until ``remove``, or until the Parameter or the returned reference is deleted."""
        key = id(parameter)
        with self._lock:
            self.guards[key] = (*self.guards.get(key, ()), guard)
        return weakref.ref(parameter, functools.partial(self.remove, key, guard))

    def remove(self, key: int, guard: Guard, _: object = None) -> None:
        """Remove a guard of a Parameter; also the callback for a Parameter that is deleted."""
        with self._lock:
            others = tuple(other for other in self.guards.get(key, ()) if other is not guard)
            if others:
                self.guards[key] = others
            else:
                self.guards.pop(key, None)

    def remove_model(self, guard: Guard) -> None:
        """Remove the model that the guard protects."""
        with self._lock:
            for model in [model for model, other in self.models.items() if other is guard]:
                del self.models[model]

    def refuse_sharded(self, optimizer: Optimizer) -> None:
        """Raise InputError for an optimizer of sharded Parameters of a compact model that has lost any of its own.

        Sharding replaces Parameters. Then no guard is found by their ids, and no other check would refuse the step.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        sharded = {id(parameter) for parameter in parameters if is_dtensor(parameter)}
        flat = any(map(is_flat, parameters))  # a module around the model has it
        if not sharded and not flat:
            return
        with self._lock:
            models = list(self.models.items())
        for model, guard in models:
            present = {id(parameter) for parameter in model.parameters()}
            if flat or not sharded.isdisjoint(present):
                guard.refuse_lost(present)

    def of(self, optimizer: Optimizer) -> dict[Guard, list[Tensor]]:
        """Return the guards of an optimizer's Parameters, each with the Parameters that it guards."""
        found: dict[Guard, list[Tensor]] = {}
        guards = self.guards
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for guard in guards.get(id(parameter), ()):
                    found.setdefault(guard, []).append(parameter)
        return found


_registry = _Registry()


# Steps that run now


class _Steps(threading.local):
    """The values to restore after each step that runs in this thread, outermost step first.

    A step may call the step of another optimizer, or of its parent class. A step that raises an error never reaches
    ``end``. A step inside another is deeper on Python's stack: the record of a failed step is dropped at the next step
    of the same depth or less.
    """

    def __init__(self) -> None:
        self.running: list[tuple[int, int, list[Restore]]] = []  # depth, id of the optimizer, what to restore

    def begin(self, optimizer: Optimizer, restore: list[Restore]) -> None:
        """Record a step, and what to restore after it."""
        if restore or self.running:
            depth = _depth()
            self._drop(depth)
            self.running.append((depth, id(optimizer), restore))

    def end(self, optimizer: Optimizer) -> list[Restore]:
        """Return what to restore after the optimizer's innermost step."""
        if self.running:
            self._drop(_depth() + 1)
            if self.running and self.running[-1][1] == id(optimizer):
                return self.running.pop()[2]
        return []

    def _drop(self, depth: int) -> None:
        """Drop the steps of this depth or deeper, which have failed."""
        while depth > 0 and self.running and self.running[-1][0] >= depth:
            self.running.pop()


_steps = _Steps()


def _depth() -> int:
    """Return the number of frames on this thread's stack; -1 while torch.compile traces, which has no stack."""
    if torch.compiler.is_compiling():
        return -1
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if _registry.models:
        _registry.refuse_sharded(optimizer)
    if _registry.guards or _steps.running:
        guards = _registry.of(optimizer)
        restore = [each for guard, held in guards.items() for each in guard.before(optimizer, held)]
        _steps.begin(optimizer, restore)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if _registry.guards or _steps.running:
        if restore := _steps.end(optimizer):
            with torch.no_grad():
                torch._foreach_neg_([negated for *_, negated in restore])
                for parameter, flags, before in restore:
                    torch.where(flags.on(parameter.device), parameter, before, out=parameter)
        for guard, held in _registry.of(optimizer).items():
            guard.after(held)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
