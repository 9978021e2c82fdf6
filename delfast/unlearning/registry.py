"""The methods by name, with hyperparameters replaced and checked."""

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
from delfast.unlearning.methods import (
    Del,
    Finetune,
    GradientAscent,
    L1Sparse,
    Method,
    NegGradPlus,
    Relabel,
    Retrain,
    Scrub,
    require,
)
from delfast.unlearning.one_shot import Dampening, Influence

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (
        Del, Finetune, GradientAscent, NegGradPlus, Relabel, L1Sparse, Influence, Dampening, Scrub, Retrain,
    )
}  # fmt: skip


def make_method(method: str | Method, changes: Mapping[str, Any]) -> Method:
    """A method by name, or as it is, with hyperparameters changed. InputError for one that does not exist."""
    if isinstance(method, str):
        if method not in METHODS:
            raise InputError(f"expected method to be one of {', '.join(METHODS)}; got '{method}'")
        method = METHODS[method]()
    check_type("method", method, Method, f"an unlearning method or one of {', '.join(METHODS)}")
    known = {field.name: field for field in fields(method) if field.init}
    for name in changes:
        if name not in known:
            raise InputError(f"'{method.name}' has no hyperparameter '{name}'; it has {', '.join(sorted(known))}")
    method = replace(method, **changes)
    method = replace(method, **{name: _hyperparameter(method, field) for name, field in known.items()})
    method.check()
    for name, value in asdict(method).items():
        require(method, name, not isinstance(value, float) or math.isfinite(value), "finite")
    return method


def _hyperparameter(method: Method, field: Field[Any]) -> Any:
    """The field's value: a plain number where the default is a number, else unchanged. InputError for another type."""
    value = getattr(method, field.name)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if type(field.default) is int:
        return check_int(field.name, value)
    if type(field.default) is float:
        number = check_number(field.name, value)
        # an int that a float holds stays an int: `compare` names its cells by these values as JSON
        return unboxed(value) if abs(number) < 2**53 else number
    if field.name == "schedule":
        check_choice("schedule", value, Schedule)
    return value
