"""Random numbers from a seed, drawn without a process-wide generator."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from delfast.errors import InputError

RESET_SEED = 241202432
"""Default seed of newly initialized values: the arXiv number of DEL's paper. A training that began from the same seed
would get its starting values back, so that it is none of the usual seeds, such as 0, 1 and 42."""

PROBABILITY_ARGUMENTS = ("p", "dropout", "dropout_p")  # with all of these at zero an operation draws nothing


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw, in this thread and inside the context, the numbers that would follow ``torch.manual_seed(seed)``.

    Torch's own generators are neither read nor changed, so other threads may draw from them meanwhile. Operations that
    are given a generator use that one. ``torch.manual_seed`` inside has its usual effect on torch's own generators and
    none on the numbers that are drawn here. Python's and numpy's generators are not seeded.

    Raises InputError, by name, at an operation that draws from torch's own generator and accepts no other: dropout
    kernels of GPUs, for example.
    """
    with _PrivateGenerators(seed):
        yield


class _PrivateGenerators(TorchDispatchMode):
    """A mode that passes its own generator, one per device, all with one seed, to every operation that accepts one."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = int(seed)
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_random(func):
            return func(*args, **kwargs)
        device = _device_of(args, kwargs)
        if device.type == "meta":  # computes no values
            return func(*args, **kwargs)
        overload = _with_generator(func)
        if overload is None:
            if _may_draw(func, args, kwargs):
                raise InputError(
                    f"expected operations that accept a generator while a network is made under a seed, got {func}, "
                    "which draws from torch's own; pass a second model or a state dict as init"
                )
            return func(*args, **kwargs)
        position = _generator_position(overload)
        if (args[position] if position < len(args) else kwargs.get("generator")) is not None:
            return func(*args, **kwargs)
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return overload(*args[:position], **{**kwargs, "generator": self._generators[device]})


@functools.cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags or any(a.name == "generator" for a in func._schema.arguments)


@functools.cache
def _with_generator(func: Any) -> Any:
    """Return ``func`` or its overload that differs by a generator argument; None if torch has neither."""
    wanted = _arguments(func)
    for name in (func._overloadname, *func._overloadpacket.overloads()):
        candidate = getattr(func._overloadpacket, name)
        found = _arguments(candidate)
        if "generator" in found and wanted | {"generator": found["generator"]} == found:
            return candidate
    return None


def _arguments(func: Any) -> dict[str, str]:
    """Return the type of each argument by name, as text."""
    return {argument.name: str(argument.type) for argument in func._schema.arguments}


@functools.cache
def _generator_position(func: Any) -> int:
    """Return the generator's position among positional arguments; their number if it is passed by name only."""
    positional = [argument.name for argument in func._schema.arguments if not argument.kwarg_only]
    return positional.index("generator") if "generator" in positional else len(positional)


def _may_draw(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation draws: dropout with probability zero, or outside training, does not."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    given = defaults | given
    if given.get("train") is False:
        return False
    probabilities = [given[name] for name in PROBABILITY_ARGUMENTS if name in given]
    return not probabilities or any(probabilities)


def _device_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """Return the device on which an operation draws."""
    device = kwargs.get("device")
    if device is None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
