"""Plain values, which a file can hold and every reader of the file understands."""

from __future__ import annotations

import json
from typing import Any

import numpy
from torch import Tensor

from delfast.errors import InputError


def as_json(value: Any, what: str) -> Any:
    """Return ``value`` in its JSON form: Python's numbers for numpy's, lists for tuples, string keys in sorted order.

    Raises InputError, which names ``what``, for a value without a JSON form.
    """
    try:
        return json.loads(json.dumps(value, default=number, sort_keys=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"expected plain JSON values in {what}, got others ({error}); convert them first") from None


def number(value: Any) -> Any:
    """Return a numpy scalar or a tensor without dimensions as a number; used as ``default`` of ``json.dumps``."""
    if isinstance(value, (numpy.generic, numpy.ndarray, Tensor)) and value.ndim == 0:
        return value.item()
    raise TypeError(f"a {type(value).__name__}")


def unboxed(value: Any) -> Any:
    """Return a numpy scalar as Python's number, also inside a tuple or a list; anything else as it is."""
    if isinstance(value, numpy.generic):
        return value.item()
    if type(value) in (tuple, list):
        return type(value)(unboxed(item) for item in value)
    return value
