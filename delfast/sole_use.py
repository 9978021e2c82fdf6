"""Exclusive use of a model by one thread: two threads would change its modes and flags during each other's passes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from delfast.errors import InputError
from delfast.naming import unwrap

F = TypeVar("F", bound=Callable[..., Any])

_users: dict[int, tuple[int, int]] = {}  # id of a network in use -> its thread, and the number of nested contexts
_lock = threading.Lock()


@contextmanager
def sole_use(model: nn.Module) -> Iterator[None]:
    """Reserve ``model`` for this thread inside the context, which may be nested.

    Raises InputError if another thread has reserved it. Train and eval modes, ``requires_grad`` and a compact model's
    layers belong to the model, not to a thread. Models that share submodules are not recognized as one.
    """
    key, thread = id(unwrap(model)), threading.get_ident()
    with _lock:
        user, depth = _users.get(key, (thread, 0))
        if user != thread:
            raise InputError(
                "expected a model that no other thread uses meanwhile, got one that another thread scores or trains; "
                "give each thread a copy of its own"
            )
        _users[key] = (thread, depth + 1)
    try:
        yield
    finally:
        with _lock:
            if depth:
                _users[key] = (thread, depth)
            else:
                del _users[key]


def used_alone(function: F) -> F:
    """Wrap a function so that it runs inside ``sole_use`` of its first argument, ``model``."""

    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module):
            return function(*args, **kwargs)  # raises for the missing or wrong model
        with sole_use(model):
            return function(*args, **kwargs)

    return cast(F, alone)
