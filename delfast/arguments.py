"""Checks of arguments of public functions: InputError in one line before anything is computed or changed."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any, TypeGuard, cast, get_args

import numpy
import torch

from delfast.errors import InputError

MAX_SEED = 2**64 - 1  # the largest seed that both torch's and numpy's generators accept


def describe(value: object) -> str:
    """Return a value as text for an error: numbers and short strings as they are, everything else by its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, numpy.bool_):  # the name of its type is also "bool"
        return f"{value} (numpy.bool)"
    return f"{value} ({type(value).__name__})" if isinstance(value, Real) else type(value).__name__


def form_of(value: object) -> str:
    """Return dtype and shape of a tensor, or the type of another value, as text for an error."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def check_number(name: str, value: Any) -> float:
    """Return a real number (Python's or numpy's, no bool) as a float; it may be infinite, NaN or of any size."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"expected {name} to be a number, got {describe(value)}; pass a float")
    try:
        return float(value)
    except OverflowError:  # an int beyond float64, of either sign
        return math.inf


def _is_int(value: object) -> TypeGuard[Integral]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_int(name: str, value: object) -> int:
    """Return an integer that fits into 64 bits (Python's or numpy's, no bool) as an int."""
    if _is_int(value) and abs(int(value)) < 2**63:
        return int(value)
    raise InputError(f"expected {name} to be an int, got {describe(value)}; pass one that 64 bits hold")


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Return an integer of at least ``minimum`` that fits into 64 bits as an int."""
    if _is_int(value) and minimum <= int(value) < 2**63:
        return int(value)
    raise InputError(f"expected {name} to be a count of at least {minimum}, got {describe(value)}; pass such an int")


def check_seed(value: object) -> int:
    """Return a seed in [0, 2^64), Python's or numpy's integer, as an int."""
    if _is_int(value) and 0 <= int(value) <= MAX_SEED:
        return int(value)
    raise InputError(f"expected seed to be an int in [0, 2**64), got {describe(value)}; pass one")


def check_flag(name: str, value: object) -> bool:
    """Return a bool (Python's or numpy's) as a bool."""
    if isinstance(value, (bool, numpy.bool_)):
        return bool(value)
    raise InputError(f"expected {name} to be True or False, got {describe(value)}; pass one of these")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise InputError unless ``value`` is one of the strings of the Literal ``choices``."""
    if not isinstance(value, str) or value not in get_args(choices):
        raise InputError(f"expected {name} to be one of {', '.join(get_args(choices))}; got {describe(value)}")


def check_function(name: str, value: object) -> None:
    """Raise InputError unless ``value`` is None or can be called."""
    if value is not None and not callable(value):
        raise InputError(f"expected {name} to be a function or None, got {describe(value)}; pass a function")


def check_loader(value: object, what: str) -> None:
    """Raise InputError unless ``value`` can be iterated over and could yield batches.

    Data sets with positions are refused, since most of them yield single examples.
    """
    iterable = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    if not iterable or isinstance(value, (str, bytes, Mapping, type)) or is_scalar(value):
        raise InputError(
            f"expected the {what} to be a DataLoader or another iterable of batches, got {describe(value)}; pass one"
        )
    if _is_data_set(value):
        raise InputError(
            f"expected the {what} to be a DataLoader or another iterable of batches, got the data set "
            f"{type(value).__name__}; pass a torch.utils.data.DataLoader of it, with batch_size=None if its items are "
            "whole batches"
        )


def _is_data_set(value: object) -> bool:
    """Return whether ``value`` is torch's or Hugging Face's data set; an IterableDataset may yield batches."""
    if is_hugging_face(value):
        return True
    return isinstance(value, torch.utils.data.Dataset) and not isinstance(value, torch.utils.data.IterableDataset)


def is_hugging_face(value: object) -> bool:
    """Return whether ``value`` is a ``datasets.Dataset``; without an import, which no other user needs."""
    # the module that defines the class: "datasets" alone may be a module of the user's own
    kind = getattr(sys.modules.get("datasets.arrow_dataset"), "Dataset", None)
    return isinstance(kind, type) and isinstance(value, kind)


def check_type(name: str, value: object, kind: type | tuple[type, ...], text: str) -> None:
    """Raise InputError unless ``value`` is of this type, which the error describes by ``text``."""
    if not isinstance(value, kind):
        raise InputError(f"expected {name} to be {text}, got {describe(value)}; pass one")


def is_scalar(value: object) -> bool:
    """Return whether ``value`` is a tensor or an array without dimensions, which is no sequence despite its methods."""
    return getattr(value, "ndim", 1) == 0


def check_tensors(**values: object) -> None:
    """Raise InputError unless every value is a tensor."""
    for name, value in values.items():
        check_type(name, value, torch.Tensor, "a tensor")


def check_names(name: str, value: object) -> None:
    """Raise InputError unless ``value`` is a collection of str, and no str itself."""
    names = isinstance(value, Collection) and not isinstance(value, (str, bytes)) and not is_scalar(value)
    if not names or not all(isinstance(name, str) for name in cast(Collection[object], value)):
        raise InputError(f"expected {name} to be a list of names, got {describe(value)}; pass a list of str")


def check_path(name: str, value: Any) -> str:
    """Return a path (str or os.PathLike of str) as a str."""
    if isinstance(value, (str, PathLike)):
        text = fspath(value)
        if isinstance(text, str) and "\0" not in text:
            return text
    raise InputError(f"expected {name} to be a path, got {describe(value)}; pass a str or a pathlib.Path")


def check_device(value: Any) -> torch.device:
    """Return a ``torch.device``, given as one or by its name."""
    refusal = InputError(f"expected a device such as 'cpu' or 'cuda:0', got {describe(value)}; pass one")
    if not isinstance(value, (str, torch.device)):
        raise refusal
    try:
        return torch.device(value)
    except RuntimeError:
        raise refusal from None


def function_name(function: object) -> str:
    """Return text that identifies a function: a qualified name, and the plain arguments of a ``functools.partial``."""
    if isinstance(function, functools.partial):
        given = [*enumerate(function.args), *sorted(function.keywords.items())]
        plain = {name: value for name, value in given if isinstance(value, (bool, int, float, str, type(None)))}
        return f"{function_name(function.func)} {plain}"
    return str(getattr(function, "__qualname__", type(function).__qualname__))
