"""Former keyword names of public functions, accepted for one release under a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from delfast.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")


def warn_renamed(function: str, old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that the keyword ``old`` of ``function`` is now written ``new``; ``stacklevel`` as ``warnings.warn``'s,
    where 2 names the caller of the function that calls this one.
    """
    warnings.warn(
        f"{function}: the keyword '{old}' is now '{new}', and '{old}' is removed in the next release; pass {new}=",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it accepts former names of its keywords: ``@renamed(old="new")``.

    ``inspect.signature`` shows the new names alone. InputError if a call passes a keyword under both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise InputError(f"expected '{new}' once, got '{new}' and its former name '{old}'; pass '{new}'")
                warn_renamed(function.__name__, old, new)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
