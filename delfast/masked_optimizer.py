"""The base of optimizers that change masked entries only: their state, and the calls of the ops that step it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
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
from delfast.parameter_mask import ParameterMask
from delfast.plain import unboxed


class MaskedOptimizer(Optimizer):
    """Base class of MaskedSGD and MaskedAdamW: a ``torch.optim.Optimizer`` for the entries that a mask selects.

    The kernel writes masked entries only, so all others stay bit-identical through weight decay, momentum, gradient
    clipping and resumes. State is float32 (float64 for float64 parameters) and exists for masked entries only. The
    op's PyTorch reference steps float64 parameters; it waits for the device and cannot be captured in a graph. With
    ``torch.amp.GradScaler``, unscaling and skipping happen inside the kernel.

    Parameters
    ----------
    named_parameters : iterable of (str, Tensor), or of dict
        ``model.named_parameters()``, or parameter groups whose "params" are such pairs. They include every parameter
        that the mask selects; other parameters are never changed.
    mask : Mask
        The entries to step.
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
    state_name = ""  # the key of the state tensor in ``self.state[parameter]``

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        mask: Mask,
        defaults: dict[str, Any],
    ) -> None:
        check_type("mask", mask, Mask, "a delfast.Mask")
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
        list(mask.match(dict(unique_parameters(pairs))))
        self.mask = mask
        self._parts = _parts_of(mask, pairs)
        self._calls: dict[int, list[OpCall]] = {}
        super().__init__(groups, {**defaults, "mask_digest": mask.digest})
        for group in self.param_groups:  # torch.load(weights_only=True) refuses numpy's numbers in a state dict
            group.update({name: unboxed(value) for name, value in group.items() if name != "params"})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mask": self.mask, "_parts": self._parts, "_calls": {}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on the masked entries of every parameter that has a gradient.

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
        for number, group in enumerate(self.param_groups):
            for call in self._cached_calls(number, group):
                gradients = [parameter.grad for parameter in call.parameters]
                self._update(group, call.parameters, gradients, call.state, call.steps, call.plan, call.by_row, amp)
        return loss

    @abstractmethod
    def _state_count(self, group: dict[str, Any]) -> int:
        """Return the number of state values per masked entry."""

    @abstractmethod
    def _update(self, group: dict[str, Any], *arguments: Any) -> None:
        """Call the op of this optimizer."""

    def _cached_calls(self, number: int, group: dict[str, Any]) -> list[OpCall]:
        """Return the op calls that step this group, one per device and dtype, cached by their ``key``."""
        key: list[Any] = [self._state_count(group)]  # a schedule of the momentum may change it
        key += [
            (id(parameter), parameter.stride(), parameter.dtype, parameter.device)
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        calls = self._calls.get(number)
        if calls is None or calls[0].key != key:
            calls = self._make_calls(group, key)
            if calls:
                self._calls[number] = calls
        return calls

    def _make_calls(self, group: dict[str, Any], key: list[Any]) -> list[OpCall]:
        batches: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, OpPart]]] = {}
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            part = self._parts.get(plain_name(name))
            if parameter.grad is None or part is None:
                continue
            check_dense(name, parameter.grad)
            if part.bits.device != parameter.device:  # the parameter has moved since the mask was given
                part = self._parts[plain_name(name)] = replace(part, bits=part.bits.to(parameter.device))
            wide = torch.promote_types(parameter.dtype, torch.float32)
            batches.setdefault((parameter.device, wide), []).append((parameter, part))
        count = self._state_count(group)
        return [self._make_call(device, wide, count, entries, key) for (device, wide), entries in batches.items()]

    def _make_call(
        self,
        device: torch.device,
        dtype: torch.dtype,
        count: int,
        entries: list[tuple[Tensor, OpPart]],
        key: list[Any],
    ) -> OpCall:
        """Join all state in one flat tensor and all step counts in another; ``self.state`` keeps views of them."""
        none = torch.zeros((), dtype=torch.float32, device=device)
        steps = torch.stack([self.state[parameter].get("step", none).to(device) for parameter, _ in entries])
        sizes = [count * part.selected for _, part in entries]
        state = torch.zeros(sum(map(padded_state, sizes)), dtype=dtype, device=device)
        start = 0
        for (parameter, part), step, size in zip(entries, steps.unbind(), sizes, strict=True):
            piece, start = state[start : start + size], start + padded_state(size)
            kept = self.state[parameter]
            if count and (old := kept.get(self.state_name)) is not None:
                piece.copy_((flat_rows(old, parameter) if part.by_row else old).view(size))
            kept["step"] = step
            if count:
                kept[self.state_name] = as_rows(piece, parameter) if part.by_row else piece
        parameters, by_row = [parameter for parameter, _ in entries], [part.by_row for _, part in entries]
        bits = torch.cat([part.bits for _, part in entries])
        return OpCall(key, parameters, state, steps, torch.ops.delfast.masked_plan(parameters, bits, by_row), by_row)

    @torch.no_grad()
    def replace_mask(self, mask: Mask) -> None:
        """Step the entries of another mask from now on.

        Entries that both masks select keep their state. State of new entries begins with zeros, and state of entries
        that are no longer selected is dropped. A parameter's step count goes on.

        Parameters
        ----------
        mask : Mask
            The entries to step from now on.

        Raises
        ------
        InputError
            For a mask of another architecture; nothing is changed.
        """
        named = [
            pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
        ]
        list(mask.match(dict(unique_parameters(named))))
        for name, parameter in named:
            old, new = (each.parameters.get(plain_name(name)) for each in (self.mask, mask))
            held = self.state.get(parameter, {}).get(self.state_name)
            if new is None or not new.selected:
                self.state.pop(parameter, None)
            elif held is not None and old is not None:
                self.state[parameter][self.state_name] = _move_state(held, old, new.for_ops)
            # a captured step reads the old mask's plan: other memory tells it that it cannot be replayed any more, and
            # not even where a later mask is equal to the old one
            if (step := self.state.get(parameter, {}).get("step")) is not None:
                self.state[parameter]["step"] = step.clone()
        self.mask, self._parts, self._calls = mask, _parts_of(mask, named), {}
        for settings in (self.defaults, *self.param_groups):
            settings["mask_digest"] = mask.digest

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
        self._check_sizes(state_dict)
        self._calls = {}
        super().load_state_dict(state_dict)
        # torch has cast the state to each parameter's dtype; restore the saved dtype, which is float32 or float64
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _check_sizes(self, state_dict: dict[str, Any]) -> None:
        """Raise InputError for a state that has not as many values as this optimizer's mask selects."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for name, index in zip(group["param_names"], saved["params"], strict=False):
                held = state_dict["state"].get(index, {}).get(self.state_name)
                if held is None:
                    continue
                part = self._parts.get(plain_name(name))
                count = max(1, self._state_count(saved))  # a schedule may have set the momentum to zero since
                expected = 0 if part is None else count * part.selected
                if held.numel() != expected:
                    raise InputError(
                        f"expected {expected} values of state for '{name}', got {held.numel()}; the optimizer state is "
                        "of another mask"
                    )


@dataclass(frozen=True)
class OpPart:
    """The masked part of one parameter, as the masked ops take it; ``selected``: the number of masked entries."""

    bits: Tensor
    by_row: bool
    selected: int


def _parts_of(mask: Mask, named: Iterable[tuple[str, Tensor]]) -> dict[str, OpPart]:
    """Return the parts with masked entries by plain name, their bits on the parameter's device.

    All that a step needs of a mask is computed here: a captured step may neither copy from the host nor read there.
    """
    parts = {}
    for name, parameter in named:
        part = mask.parameters.get(plain_name(name))
        if part is not None and part.selected:
            for_ops = part.for_ops
            parts[plain_name(name)] = OpPart(for_ops.bits.to(parameter.device), for_ops.by_row, part.selected)
    return parts


def _move_state(held: Tensor, old: ParameterMask, new: ParameterMask) -> Tensor:
    """Return the state ``held`` of the entries of ``old`` as state of the entries of ``new``; zeros for new entries."""
    count = held.numel() // old.selected
    dense = held.new_zeros(count, old.numel)
    dense[:, old.dense().flatten().to(held.device)] = held.reshape(count, old.selected)
    kept = dense[:, new.dense().flatten().to(held.device)]
    return kept.reshape(-1, *new.shape[1:]) if new.by_row else kept.flatten()


@dataclass(frozen=True)
class OpCall:
    """The arguments of one call of a masked op, except gradients and settings.

    ``key``: the number of state values, and the parameters that had gradients when the call was made; ``plan``: what
    the mask selects, listed once for all steps.
    """

    key: list[Any]
    parameters: list[Tensor]
    state: Tensor
    steps: Tensor
    plan: Tensor
    by_row: list[bool]


def check_dense(name: str, gradient: Tensor) -> None:
    """Raise InputError for a sparse gradient, which an Embedding with ``sparse=True`` has."""
    if gradient.is_sparse:
        raise sparse_gradient(name)


def sparse_gradient(name: str) -> InputError:
    """Return the error for a parameter with sparse gradients, where the caller needs dense ones."""
    return InputError(f"expected a dense gradient for '{name}', got a sparse one; make its Embedding sparse=False")
