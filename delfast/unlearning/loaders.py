"""The parts of a loader: samplers and data sets, random generators, the sizes of batches."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinMethodType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from delfast.batches import LossFn
from delfast.dispatch import ObservingMode
from delfast.errors import InputError

MAX_ITEMS = 10_000  # a longer list, tuple or dict holds data, not transforms: it is not searched for generators
MAX_SEARCHED = 100_000  # objects that one search for generators reads

_GENERATORS = (
    torch.Generator,
    random.Random,
    numpy.random.Generator,
    numpy.random.BitGenerator,
    numpy.random.RandomState,
)
_WITHOUT_GENERATORS = (str, bytes, int, float, Tensor, numpy.ndarray, type, ModuleType, random.SystemRandom)


def set_epoch(loader: Any, epoch: int) -> None:
    """Call ``set_epoch(epoch)`` of the loader and of every part that has it: samplers, batch samplers, data sets.

    Without the epoch, a DistributedSampler repeats one order, and one share of the examples, in every epoch.
    """
    for part in _parts(loader):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def refuse_persistent_workers(loader: Any, what: str) -> None:
    """Raise InputError for persistent workers: their generators live from epoch to epoch in other processes."""
    if any(getattr(part, "persistent_workers", False) is True for part in _parts(loader)):
        raise InputError(
            f"expected a {what} set without persistent_workers where a checkpoint is written, since the state of the "
            "workers' generators cannot be saved; pass a DataLoader with persistent_workers=False, or no checkpoint"
        )


def restarts(loader: Any) -> bool:
    """Return whether each pass over the loader starts at its beginning; an iterator may restart at its end only."""
    return not isinstance(loader, Iterator)


def first_batch(loader: Any, what: str) -> Any:
    """Return the loader's first batch. InputError for an empty loader, and for an iterator, which would lose it."""
    if not restarts(loader):
        raise InputError(
            f"expected a {what} set that can be iterated over again, got {type(loader).__name__}; pass a DataLoader or "
            "a list of batches"
        )
    for batch in loader:
        return batch
    raise _empty(what)


def batch_count(loader: Any, what: str) -> int:
    """Return the loader's length. InputError if the loader has none, or no batch."""
    try:
        count = len(loader)
    except TypeError:
        raise InputError(
            f"expected a {what} set with a length, for the schedule; pass a DataLoader or a list of batches"
        ) from None
    if not count:
        raise _empty(what)
    return count


def _empty(what: str) -> InputError:
    return InputError(f"expected a {what} set of at least one batch, got none; check its loader")


def _parts(loader: Any) -> Iterator[Any]:
    """Yield the loader, its sampler, batch sampler and data set, theirs, and so on; each once."""
    seen: dict[int, Any] = {}
    waiting = [loader]
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen[id(part)] = part
        yield part
        waiting += [getattr(part, name, None) for name in ("dataset", "batch_sampler", "sampler")]


class Randomness:
    """The generators that training draws from: those of torch, numpy and Python, and all that the loaders hold."""

    def __init__(self, loaders: Iterable[Any]) -> None:
        self.loaders = list(loaders)
        self.generators = generators(self.loaders)

    @property
    def kinds(self) -> list[str]:
        """Types of the generators that the loaders hold."""
        return [type(generator).__name__ for generator in self.generators]

    def search_again(self) -> None:
        """Search the loaders for generators again.

        InputError if their number or kinds have changed: a new process that resumes does not have them, and their state
        could not be restored.
        """
        before, self.generators = self.kinds, generators(self.loaders)
        if self.kinds != before:
            raise InputError(
                "expected the loaders to hold the same random generators at every epoch where a checkpoint is written, "
                f"got {self.kinds} after {before}; make them when the data set and its transforms are made"
            )

    def state(self) -> dict[str, Any]:
        """Return the states of all generators, as plain values and tensors."""
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "numpy": _plain(numpy.random.get_state(legacy=False)),
            "python": random.getstate(),
            "kinds": self.kinds,
            "loaders": [_state(generator) for generator in self.generators],
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Set the generators to a ``state``, or to a part of it."""
        setters: dict[str, Callable[[Any], None]] = {
            "torch": torch.set_rng_state,
            "numpy": numpy.random.set_state,
            "python": random.setstate,
            "cuda": torch.cuda.set_rng_state_all,
            "loaders": self._set_states,
        }
        for name, value in state.items():
            if name in setters and (name != "cuda" or torch.cuda.is_available()):
                setters[name](value)

    def _set_states(self, states: list[Any]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            _set_state(generator, state)


@contextmanager
def preserved(loaders: Iterable[Any], loss_fn: LossFn | None = None) -> Iterator[Draws]:
    """Restore every generator, global or in a loader, so that reading a batch changes no later order.

    Compute on the batches, with this ``loss_fn``, inside the ``Draws`` that the context yields. Torch, numpy and Python
    have one generator each for all threads. These are restored only if this thread may have drawn from them. Lists,
    tuples and loaders with ``draws_globally = False`` draw nothing; other loaders may. ``Draws`` records draws from
    torch's generator. A ``loss_fn`` may draw from numpy's and Python's.
    """
    loaders = [
        loader
        for loader in loaders
        if not isinstance(loader, (list, tuple)) and getattr(loader, "draws_globally", True)
    ]
    randomness, draws = Randomness(loaders), Draws()
    before = randomness.state()
    try:
        yield draws
    finally:
        after = randomness.state()
        moved = {name: state for name, state in before.items() if not _same(state, after[name])}
        if not loaders and not draws.any:  # other threads drew the rest
            moved = {name: moved[name] for name in ("numpy", "python") if loss_fn is not None and name in moved}
        randomness.restore(moved)


class Draws(ObservingMode):  # type: ignore[no-untyped-call]
    """Record whether this thread draws from one of torch's default generators inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
            self.any |= all(map(_is_default, given))
        return func(*args, **kwargs)


def _is_default(generator: torch.Generator) -> bool:
    """Return whether the generator is its device's default. By state: an operation gets another Python object of it."""
    cuda = generator.device.type == "cuda"
    state = torch.cuda.get_rng_state(generator.device) if cuda else torch.get_rng_state()
    return generator.device.type in ("cpu", "cuda") and torch.equal(generator.get_state(), state)


def _same(state: Any, other: Any) -> bool:
    if isinstance(state, Tensor):
        return torch.equal(state, other)
    if isinstance(state, list):
        return len(state) == len(other) and all(map(_same, state, other))
    return bool(state == other)


def generators(loaders: Iterable[Any]) -> list[Any]:
    """Return every generator of torch, numpy or Python that the loaders hold, each once.

    Their order depends on the construction of the loaders alone. The search reads attributes of instances and of their
    classes, lists, tuples and dicts of at most ``MAX_ITEMS`` items, closures, defaults and globals of functions, bound
    methods and partials: it reaches samplers, data sets, nested transforms and ``collate_fn``. Outer objects come
    first. The search ends after ``MAX_SEARCHED`` objects.
    """
    found, seen = [], dict[int, Any]()
    waiting = deque(loaders)
    while waiting and len(seen) < MAX_SEARCHED:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _WITHOUT_GENERATORS):
            continue
        seen[id(value)] = value  # keep the value, or another could get its id
        if isinstance(value, _GENERATORS):
            found.append(value)
        else:
            waiting += _held(value)
    return found


def _held(value: Any) -> Iterator[Any]:
    """Yield the values that a value holds directly."""
    if isinstance(value, (list, tuple, dict)):
        if len(value) <= MAX_ITEMS:
            yield from value.values() if isinstance(value, dict) else value
    elif isinstance(value, FunctionType):
        yield from _held_by_function(value)
    elif isinstance(value, (MethodType, BuiltinMethodType)):
        yield from (value.__self__, getattr(value, "__func__", None))
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    else:
        for kind in type(value).__mro__:
            for name, attribute in vars(kind).items():
                if isinstance(attribute, (FunctionType, *_GENERATORS)):
                    yield attribute
                elif isinstance(attribute, MemberDescriptorType):  # of __slots__
                    yield getattr(value, name, None)
    hidden = {"_iterator"} if isinstance(value, DataLoader) else ()  # persistent workers and their queues
    for name, attribute in getattr(value, "__dict__", {}).items():
        if name not in hidden:
            yield attribute


def _held_by_function(function: FunctionType) -> Iterator[Any]:
    """Yield a function's defaults and closure, and of its globals the generators and the functions of its module."""
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # the name is not bound yet
            continue
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        same_module = isinstance(value, FunctionType) and value.__module__ == function.__module__
        if same_module or isinstance(value, _GENERATORS):
            yield value


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, numpy.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(getattr(generator, "bit_generator", generator).state)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, numpy.random.RandomState):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state


def _plain(value: Any) -> Any:
    """Return numpy's states as Python's own values, which ``torch.load(weights_only=True)`` reads."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, (numpy.ndarray, numpy.generic)) else value
