"""The base of optimizers that change masked elements only: their state, and the calls of the ops that step it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from delfast.arguments import check_type, describe
from delfast.errors import InputError
from delfast.mask import Mask
from delfast.naming import plain_name, unique_parameters
from delfast.ops.layout import as_rows, flat_rows, padded_state
from delfast.optimizer_state import by_kind, check_size, load_state, move_state, unpack_like
from delfast.plain import unboxed
from delfast.processes import holders
from delfast.sharding import (
    is_dtensor,
    local_gradient,
    local_part,
    refuse_gathered,
    refuse_unseen_gradients,
)


class MaskedOptimizer(Optimizer):
    """Base class of MaskedSGD and MaskedAdamW: a ``torch.optim.Optimizer`` for the elements that a mask selects.

    The kernel writes masked elements only, so all others stay bit-identical through weight decay, momentum, gradient
    clipping and resumes. State is float32 (float64 for float64 parameters) and exists for masked elements only. The
    op's PyTorch reference steps float64 parameters; it waits for the device and cannot be captured in a graph. With
    ``torch.amp.GradScaler``, unscaling and skipping happen inside the kernel.

    Parameters may be DTensors: ``model.named_parameters()`` after ``fully_shard`` or ``parallelize_module``. Each
    process then steps the part that it holds, and keeps the state of this part. ``state_dict()`` has the state as dense
    tensors laid out like the parameters, with zeros outside the mask, so that ``torch.distributed.checkpoint`` saves
    it, and loads it into any number of processes.

    Parameters
    ----------
    named_parameters : iterable of (str, Tensor), or of dict
        ``model.named_parameters()``, or parameter groups whose "params" are such pairs. They include every parameter
        that the mask selects; other parameters are never changed.
    mask : Mask
        The elements to step.
    defaults : dict
        Default values of the options of a parameter group, as for ``torch.optim.Optimizer``.

    Raises
    ------
    InputError
        For parameters without names, and for a mask that selects a parameter which is missing, frozen, or of another
        shape.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> layer = torch.nn.Linear(2, 2)
    >>> mask = delfast.Mask.from_dense({"weight": torch.tensor([[1, 1], [0, 0]]), "bias": torch.tensor([0, 0])})
    >>> optimizer = delfast.optim.MaskedSGD(layer.named_parameters(), mask)
    >>> isinstance(optimizer, torch.optim.Optimizer)
    True
    """

    # GradScaler.step then sets .grad_scale and .found_inf, and leaves unscaling and skipping to step()
    _step_supports_amp_scaling = True
    state_name = ""  # the key in ``self.state[parameter]`` of all kinds of state, one after another
    state_kinds: tuple[str, ...] = ()  # the keys instead if any parameter is a DTensor, each of one kind

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        mask: Mask,
        defaults: dict[str, Any],
    ) -> None:
        if not isinstance(named_parameters, Iterable) or isinstance(named_parameters, (str, bytes, Tensor)):
            raise InputError(
                f"expected (name, parameter) pairs, got {describe(named_parameters)}; pass model.named_parameters()"
            )
        groups: list[Any] = [
            {**entry, "params": list(entry["params"])} if isinstance(entry, dict) else entry
            for entry in named_parameters
        ]
        if not groups or not all(isinstance(entry, (tuple, dict)) for entry in groups):
            raise InputError(
                f"expected (name, parameter) pairs, got {describe(groups[0]) if groups else 'none'}; pass "
                "model.named_parameters()"
            )
        pairs = [pair for entry in groups for pair in (entry["params"] if isinstance(entry, dict) else [entry])]
        with _same_mask(mask, pairs):
            self._check_options(defaults)
            self.mask = mask
            self._parts = _parts_of(mask, pairs)
            self._calls: dict[int, list[OpCall]] = {}
            super().__init__(groups, {**defaults, "mask_digest": mask.digest})
            for group in self.param_groups:  # torch.load(weights_only=True) refuses numpy's numbers in a state dict
                group.update({name: unboxed(value) for name, value in group.items() if name != "params"})
            self._begin_state()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mask": self.mask, "_parts": self._parts, "_calls": {}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on the masked elements of every parameter that has a gradient.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients, and returns the loss.

        Returns
        -------
        object
            The closure's result; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        amp = {"grad_scale": getattr(self, "grad_scale", None), "found_inf": getattr(self, "found_inf", None)}
        if amp["found_inf"] is not None:
            refuse_unseen_gradients(self._named())
        for number, group in enumerate(self.param_groups):
            for call in self._cached_calls(number, group):
                if call.sharded is None:
                    gradients = [parameter.grad for parameter in call.parameters]
                else:
                    gradients = [local_gradient(name, parameter) for name, parameter in call.sharded.items()]
                self._update(group, call.parameters, gradients, call.state, call.steps, call.plan, call.by_row, amp)
                if call.sharded is not None:  # the op has incremented the versions of the parts
                    torch.autograd.graph.increment_version(list(call.sharded.values()))
        return loss

    @abstractmethod
    def _check_options(self, options: dict[str, Any]) -> None:
        """Raise InputError for default values of options that are out of range."""

    @abstractmethod
    def _state_count(self, group: dict[str, Any]) -> int:
        """Return the number of state values per masked element."""

    @abstractmethod
    def _update(self, group: dict[str, Any], *arguments: Any) -> None:
        """Call the op of this optimizer."""

    def _cached_calls(self, number: int, group: dict[str, Any]) -> list[OpCall]:
        """Return the op calls that step this group, one per device and dtype, cached by their ``key``."""
        key: list[Any] = [self._state_count(group)]  # a schedule of the momentum may change it
        key += [_identity(parameter) for parameter in group["params"] if parameter.grad is not None]
        calls = self._calls.get(number)
        if calls is None or calls[0].key != key:
            calls = self._make_calls(group, key)
            if calls:
                self._calls[number] = calls
        return calls

    def _make_calls(self, group: dict[str, Any], key: list[Any]) -> list[OpCall]:
        batches: dict[tuple[torch.device, torch.dtype, bool], list[tuple[str, Tensor, OpPart]]] = {}
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            part = self._parts.get(plain_name(name))
            if part is None:
                continue
            if parameter.grad is None:
                refuse_gathered(name, parameter)
                continue
            held = local_part(parameter)
            check_dense(name, parameter.grad)
            if part.bits.device != held.device:  # the parameter has moved since the mask was given
                part = self._parts[plain_name(name)] = replace(part, bits=part.bits.to(held.device))
            kind = held.device, torch.promote_types(held.dtype, torch.float32), is_dtensor(parameter)
            batches.setdefault(kind, []).append((name, parameter, part))
        count = self._state_count(group)
        return [self._make_call(*kind, count, parts, key) for kind, parts in batches.items()]

    def _make_call(
        self,
        device: torch.device,
        dtype: torch.dtype,
        sharded: bool,
        count: int,
        parts: list[tuple[str, Tensor, OpPart]],
        key: list[Any],
    ) -> OpCall:
        """Join all state in one flat tensor and all step counts in another; ``self.state`` keeps views of them."""
        none = torch.zeros((), dtype=torch.float32, device=device)
        steps = torch.stack([self.state[parameter].get("step", none).to(device) for _, parameter, _ in parts])
        sizes = [count * part.selected for *_, part in parts]
        state = torch.zeros(sum(map(padded_state, sizes)), dtype=dtype, device=device)
        parameters = [local_part(parameter) if sharded else parameter for _, parameter, _ in parts]
        start = 0
        for (_, owner, part), parameter, step, size in zip(parts, parameters, steps.unbind(), sizes, strict=True):
            pieces = by_kind(self._state_keys(count), state[start : start + size])
            start += padded_state(size)
            kept = self.state[owner]
            kept["step"] = step
            for name, piece in pieces.items():
                if (old := kept.get(name)) is not None:
                    piece.copy_((flat_rows(old, parameter) if part.by_row else old).view(piece.shape))
                kept[name] = as_rows(piece, parameter) if part.by_row else piece
        by_row = [part.by_row for *_, part in parts]
        bits = torch.cat([part.bits for *_, part in parts])
        plan = torch.ops.delfast.masked_plan(parameters, bits, by_row)
        owners = {name: parameter for name, parameter, _ in parts} if sharded else None
        return OpCall(key, parameters, state, steps, plan, by_row, owners)

    def _has_dtensors(self) -> bool:
        """Return whether any parameter is a DTensor; then the state of plain ones too is kept and saved by kind."""
        return any(is_dtensor(parameter) for _, parameter in self._named())

    def _state_keys(self, count: int) -> tuple[str, ...]:
        """Return the keys in ``self.state[parameter]`` of ``count`` state values for each masked element."""
        return () if not count else self.state_kinds if self._has_dtensors() else (self.state_name,)

    def _begin_state(self) -> None:
        """Make the state of parameters that have none, with the count of 0 steps, if any of them is a DTensor.

        torch.distributed.checkpoint steps an optimizer without state, with a rate of 0, to make its state. That step
        would count, and change the sign of some zeros.
        """
        if not self._has_dtensors():
            return
        for group in self.param_groups:
            keys = self._state_keys(self._state_count(group))
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                part = self._parts.get(plain_name(name))
                if part is None:
                    continue
                held, kept = local_part(parameter), self.state[parameter]
                wide = torch.promote_types(held.dtype, torch.float32)
                kept.setdefault("step", torch.zeros((), dtype=torch.float32, device=held.device))
                for key in keys:
                    if key not in kept:
                        values = torch.zeros(part.selected, dtype=wide, device=held.device)
                        kept[key] = as_rows(values, held) if part.by_row else values

    @torch.no_grad()
    def replace_mask(self, mask: Mask) -> None:
        """Step the elements of another mask from now on.

        Elements that both masks select keep their state. State of new elements begins with zeros, and state of elements
        that are no longer selected is dropped. A parameter's step count goes on.

        Parameters
        ----------
        mask : Mask
            The elements to step from now on.

        Raises
        ------
        InputError
            For a mask of another architecture; nothing is changed.
        """
        named = self._named()
        with _same_mask(mask, named):
            self._replace_mask(mask, named)

    def _replace_mask(self, mask: Mask, named: list[tuple[str, Any]]) -> None:
        for name, parameter in named:
            old, new = (each.parameters.get(plain_name(name)) for each in (self.mask, mask))
            if new is None or not new.selected:
                self.state.pop(parameter, None)
            elif old is not None and (kept := self.state.get(parameter)):
                before, after = (each.part_of(parameter).for_ops for each in (old, new))
                for key in self._state_keys(1):
                    if key in kept:
                        kept[key] = move_state(kept[key], before, after)
            # a captured step reads the old mask's plan: by the count's new memory it is captured again, also where a
            # later mask is equal to the old one
            if (step := self.state.get(parameter, {}).get("step")) is not None:
                self.state[parameter]["step"] = step.clone()
        self.mask, self._parts, self._calls = mask, _parts_of(mask, named), {}
        for settings in (self.defaults, *self.param_groups):
            settings["mask_digest"] = mask.digest
        self._begin_state()

    def _named(self) -> list[tuple[str, Any]]:
        """Return names and parameters, in the order in which a state dict numbers them."""
        return [pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return the state and the options of the parameter groups, as ``torch.optim.Optimizer.state_dict`` does.

        Returns
        -------
        dict
            "state" and "param_groups". If all parameters are plain, the state is that of the masked elements. If any
            parameter is a DTensor, the state of each is dense: laid out like the parameter, float32 or float64, with
            zeros outside the mask. Each one that the mask does not select then has a "step" of 0, because
            ``set_optimizer_state_dict`` expects state of every parameter.
        """
        result: dict[str, Any] = super().state_dict()
        named = self._named()
        if not self._has_dtensors():
            return result
        indices = [index for group in result["param_groups"] for index in group["params"]]
        state = {}
        for index, (name, parameter) in zip(indices, named, strict=True):
            kept = dict(self.state.get(parameter) or {"step": torch.zeros((), dtype=torch.float32)})
            if (mask := self.mask.parameters.get(plain_name(name))) is not None:
                part = mask.part_of(parameter).for_ops
                kept.update(
                    {kind: unpack_like(kept[kind], part, parameter) for kind in self.state_kinds if kind in kept}
                )
            state[index] = kept
        return {**result, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state that ``state_dict()`` returned.

        Parameters
        ----------
        state_dict : dict
            The result of ``state_dict()`` of an optimizer with the same mask.

        Raises
        ------
        InputError
            For the state of another mask, and for state with another number of values than the mask selects; nothing
            is changed.
        """
        for group in state_dict["param_groups"]:
            if group.get("mask_digest") != self.mask.digest:
                raise InputError(
                    f"expected optimizer state of the mask {self.mask.digest[:12]}, got that of "
                    f"{str(group.get('mask_digest'))[:12]}; build the optimizer with the mask it was saved with"
                )
        state_dict = {**state_dict, "state": self._as_held(state_dict)}
        self._calls = {}
        super().load_state_dict(state_dict)
        # torch has cast the state to each parameter's dtype; restore the saved dtype, which is float32 or float64
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, (_, parameter) in zip(indices, self._named(), strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = value.to(local_part(parameter).device, copy=True)
        self._begin_state()

    def _as_held(self, state_dict: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Return the saved state by index as this optimizer holds it; InputError if it is of another mask."""
        held: dict[int, dict[str, Any]] = dict(state_dict["state"])
        has_dtensors = self._has_dtensors()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            count = max(1, self._state_count(saved))  # a schedule may have set the momentum to zero since
            for name, parameter, index in zip(group["param_names"], group["params"], saved["params"], strict=False):
                mask, part = self.mask.parameters.get(plain_name(name)), self._parts.get(plain_name(name))
                if not (entry := held.get(index)):
                    continue
                if mask is None or part is None:
                    if self.state_name in entry:
                        check_size(name, entry[self.state_name], 0)
                    del held[index]  # all that a sharded optimizer saves of it is that it took no step
                    continue
                held[index] = load_state(name, entry, self.state_kinds, self.state_name, mask, parameter, has_dtensors)
                if not has_dtensors and (values := held[index].get(self.state_name)) is not None:
                    check_size(name, values, count * part.selected)
        return held


@dataclass(frozen=True)
class OpPart:
    """The masked part of one parameter, as the masked ops take it; ``selected``: the number of masked elements."""

    bits: Tensor
    by_row: bool
    selected: int


@contextmanager
def _same_mask(mask: Mask, pairs: Sequence[Any]) -> Iterator[None]:
    """Check a mask, and that all processes that hold the parameters have the same; they raise one error of the context.

    pairs: names and parameters, which are checked too.
    """
    held = [pair[1] for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2 and is_dtensor(pair[1])]
    processes = holders({str(place): parameter for place, parameter in enumerate(held)})
    with nullcontext() if processes is None else processes.together():
        check_type("mask", mask, Mask, "a delfast.Mask")
        parameters = dict(unique_parameters(pairs, sharded=True))
        if processes is not None:
            processes.check_same_mask(mask.digest)
        list(mask.match(parameters))
        yield


def _parts_of(mask: Mask, named: Iterable[tuple[str, Tensor]]) -> dict[str, OpPart]:
    """Return the parts with masked elements by plain name, their bits on the parameter's device.

    All that a step needs of a mask is computed here: a captured step may neither copy from the host nor read there.
    """
    parts = {}
    for name, parameter in named:
        part = mask.parameters.get(plain_name(name))
        if part is not None and part.selected:
            held = part.part_of(parameter).for_ops
            bits = held.bits.to(local_part(parameter).device)
            parts[plain_name(name)] = OpPart(bits, held.by_row, held.selected)
    return parts


def _identity(parameter: Any) -> tuple[Any, ...]:
    """Return what identifies a parameter and its memory: FSDP2 may replace the memory of a DTensor."""
    if is_dtensor(parameter):
        held = parameter.to_local()
        return id(parameter), held.data_ptr(), held.stride(), held.dtype, held.device
    return id(parameter), parameter.stride(), parameter.dtype, parameter.device


@dataclass(frozen=True)
class OpCall:
    """The arguments of one call of a masked op, except gradients and settings.

    key: the number of state values, and the parameters that had gradients when the call was made.
    plan: the elements that the mask selects, listed once for all steps.
    """

    key: list[Any]
    parameters: list[Tensor]
    state: Tensor
    steps: Tensor
    plan: Tensor
    by_row: list[bool]
    sharded: dict[str, Tensor] | None


def check_dense(name: str, gradient: Tensor) -> None:
    """Raise InputError for a sparse gradient, which an Embedding with ``sparse=True`` has."""
    if gradient.is_sparse:
        raise sparse_gradient(name)


def sparse_gradient(name: str) -> InputError:
    """Return the error for a parameter with sparse gradients, where the caller needs dense ones."""
    return InputError(f"expected a dense gradient for '{name}', got a sparse one; make its Embedding sparse=False")
