"""A record of the operations of a run, which decides whether a replay of the run can stand for it.

A CUDA graph repeats kernels with the arguments that they had when it was captured. So every value that Python passes to
an operation, and every tensor that Python chooses, must be the same in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from delfast.dispatch import ObservingMode

_LIFT = torch.ops.aten.lift_fresh  # ``torch.tensor(...)``: a tensor of Python's values
# Indexing by flags counts them on the host; by positions it reads nothing
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)
_STATISTICS = ("running_mean", "running_var")  # the schemas of normalizations do not mark these as written


class Recorder(ObservingMode):  # type: ignore[no-untyped-call]
    """Record, inside the context, every operation and its arguments.

    state: the tensors that the run may write.
    device: the device where the run computes.

    ``reason``: why no replay can stand for this run; None if one can.
    """

    def __init__(self, state: Iterable[Tensor], device: torch.device) -> None:
        super().__init__()
        self.reason: str | None = None
        self._device = device.type
        self._state = {_storage(tensor) for tensor in state}
        self._operations: list[tuple[Any, list[Any]]] = []
        self._made: dict[int, int] = {}  # storage -> the number of the operation that made it
        self._outside: list[Tensor] = []  # held, so that no tensor of the run gets the address of one of these

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "namespace", "") == "profiler":  # marks, which compute nothing
            return func(*args, **kwargs)
        described: list[Any] = []
        inputs: list[Tensor] = []
        self._describe(args, described, inputs)
        if kwargs:
            self._describe(kwargs, described, inputs)
        result = func(*args, **kwargs)
        outputs = list(tensors_in(result))
        if self.reason is None:
            self.reason = self._refusal(func, args, kwargs, inputs, outputs)
        known = {_storage(tensor) for tensor in inputs}
        for tensor in outputs:
            if _storage(tensor) not in known:  # else a view, or one of the arguments
                self._made[_storage(tensor)] = len(self._operations)
        self._operations.append((func, described))
        return result

    def difference(self, other: Recorder) -> str | None:
        """Return how another run's operations differ from this run's; None if they are the same."""
        for (func, own), (other_func, others) in zip(self._operations, other._operations, strict=False):
            if func != other_func:
                return f"its operations change from step to step ({func} and {other_func})"
            if own != others:
                return f"the arguments of {func} change from step to step"
        if len(self._operations) != len(other._operations):
            return "the number of its operations changes from step to step"
        return None

    def _describe(self, value: Any, described: list[Any], tensors: list[Tensor]) -> None:
        """Append the tensors in ``value``, and what must be the same in every run."""
        if isinstance(value, Tensor):
            tensors.append(value)
            key = _storage(value)
            made = self._made.get(key)
            if made is None and key not in self._state:
                self._outside.append(value)
            described += (key if made is None else -made - 1, value.shape, value.dtype)
            if value.layout == torch.strided:
                described += (value.stride(), value.storage_offset())
        elif isinstance(value, (tuple, list)):
            described.append(len(value))
            for item in value:
                self._describe(item, described, tensors)
        elif isinstance(value, Mapping):
            for name, item in value.items():
                described.append(name)
                self._describe(item, described, tensors)
        else:
            described += (type(value), value.hex() if isinstance(value, float) else value)  # NaN equals itself

    def _refusal(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: list[Tensor], outputs: list[Tensor]
    ) -> str | None:
        facts = _facts(func)
        if facts.indexes:
            reads = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _indices(args))
        else:
            reads = facts.reads_values
        if reads:
            return f"it reads values on the host ({func})"
        if facts.lifts:
            return "it makes tensors of Python's values"
        if facts.draws and any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            return f"it draws from a generator of its own ({func})"
        written = list(tensors_in(facts.written(args, kwargs)))
        for tensor in (*inputs, *outputs, *written):
            if tensor.device.type != self._device:
                return f"it computes on the {tensor.device.type} ({func})"
        # an empty one holds nothing that a step may change: the state of an optimizer without momentum
        changed = [_storage(tensor) for tensor in written if tensor.numel()]
        if any(key not in self._made and key not in self._state for key in changed):
            return f"it changes a tensor that is not part of its known state ({func})"
        return None


@dataclass(frozen=True)
class _Facts:
    """Facts about an operation. ``writes``: (position, name) of the arguments that it writes to."""

    reads_values: bool
    indexes: bool
    lifts: bool
    draws: bool
    writes: tuple[tuple[int, str], ...]
    statistics: tuple[tuple[int, str], ...]
    training: tuple[tuple[int, str], ...]

    def written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        places = self.writes
        if self.statistics and any(_argument(place, args, kwargs) for place in self.training):
            places += self.statistics
        return [_argument(place, args, kwargs) for place in places]


@functools.cache
def _facts(func: Any) -> _Facts:
    tags = getattr(func, "tags", ())
    schema = getattr(func, "_schema", None)  # operators of higher order have none
    arguments = [] if schema is None else list(enumerate(schema.arguments))
    return _Facts(
        torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags,
        getattr(func, "overloadpacket", None) in _INDEXING,
        getattr(func, "overloadpacket", None) is _LIFT,
        torch.Tag.nondeterministic_seeded in tags,
        tuple((n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write),
        tuple((n, a.name) for n, a in arguments if a.name in _STATISTICS),
        tuple((n, a.name) for n, a in arguments if a.name in ("training", "train", "use_input_stats")),
    )


def _argument(place: tuple[int, str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    position, name = place
    return args[position] if position < len(args) else kwargs.get(name)


def _indices(args: Sequence[Any]) -> list[Tensor]:
    return [index for index in args[1] if isinstance(index, Tensor)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def _storage(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        return id(tensor)
    key: int = tensor.untyped_storage()._cdata
    return key
