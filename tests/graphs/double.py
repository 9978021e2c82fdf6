"""A stand-in for CUDA graphs on a CPU: it repeats operations, and no Python, into the tensors of the captured run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Record every operation with its tensors; ``replay`` computes the same operations into the same storages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if getattr(func, "namespace", "") != "profiler":
            self.calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        held = {id(t): t for call in self.calls for t in tensors(call[1:])}
        with torch.no_grad(), _unsafe_preserve_version_counter(tuple(held.values())):  # as kernels, which move none
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                inputs = {storage(t) for t in tensors((args, kwargs))}
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    if storage(old) not in inputs:
                        old.copy_(new)


class Double:
    """A backend of ``delfast.graphs`` for CPUs. ``captures`` and ``replays`` count."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = self.replays = 0

    def run(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape = Tape()
        with tape:
            result = function()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay, result


def tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
