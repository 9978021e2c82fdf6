"""The methods by name, and methods with hyperparameters changed and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, fields, replace
from typing import Any

from torch import Tensor

from delfast.arguments import check_choice, check_int, check_number, check_type
from delfast.errors import InputError
from delfast.plain import unboxed
from delfast.unlearning.loop import Schedule
from delfast.unlearning.method import Method, require
from delfast.unlearning.methods import Del, Finetune, GradientAscent, L1Sparse, NegGradPlus, Relabel, Retrain, Scrub
from delfast.unlearning.one_shot import Dampening, Influence

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        Del, Finetune, GradientAscent, NegGradPlus, Relabel, L1Sparse, Influence, Dampening, Scrub, Retrain,
    )
}  # fmt: skip
"""The methods by name, in the order of the documentation."""


def find_method(method: str | Method) -> Method:
    """Return the method of this name, or ``method`` itself. InputError for an unknown name or another type."""
    if isinstance(method, str):
        if method not in METHODS:
            raise InputError(f"expected method to be one of {', '.join(METHODS)}; got '{method}'")
        return METHODS[method]()
    check_type("method", method, Method, f"an unlearning method or one of {', '.join(METHODS)}")
    return method


def hyperparameter_names(method: Method) -> list[str]:
    """Return the names of the method's hyperparameters, sorted."""
    return sorted(field.name for field in fields(method) if field.init)


def make_method(method: str | Method, changes: Mapping[str, Any]) -> Method:
    """Return a method with hyperparameters changed, all of them checked.

    Parameters
    ----------
    method : str or Method
        A name in ``METHODS``, which stands for the published hyperparameters, or a method.
    changes : mapping of str to Any
        Hyperparameters to change, by name. Python's and numpy's numbers and tensors of one element are accepted.

    Returns
    -------
    Method
        A new method; its hyperparameters are Python's own numbers.

    Raises
    ------
    InputError
        For an unknown method or hyperparameter, or a value of another type or out of range.

    Examples
    --------
    >>> from delfast.unlearning import make_method
    >>> make_method("neggrad+", {"alpha": 0.95})
    NegGradPlus(epochs=10, lr=0.01, momentum=0.9, weight_decay=0.0, schedule='cosine', alpha=0.95)
    """
    method = find_method(method)
    known = hyperparameter_names(method)
    for name in changes:
        if name not in known:
            raise InputError(f"'{method.name}' has no hyperparameter '{name}'; it has {', '.join(known)}")
    method = replace(method, **changes)
    checked = {field.name: _hyperparameter(method, field) for field in fields(method) if field.init}
    method = replace(method, **checked)
    method.check()
    for name, value in asdict(method).items():
        require(method, name, not isinstance(value, float) or math.isfinite(value), "finite")
    return method


def _hyperparameter(method: Method, field: Field[Any]) -> Any:
    """Return the field's value: a plain number if the default is one, else unchanged. InputError for another type."""
    value = getattr(method, field.name)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if type(field.default) is int:
        return check_int(field.name, value)
    if type(field.default) is float:
        number = check_number(field.name, value)
        # an int that a float holds stays an int: the grid names its cells by these values as JSON
        return unboxed(value) if abs(number) < 2**53 else number
    if field.name == "schedule":
        check_choice("schedule", value, Schedule)
    return value
