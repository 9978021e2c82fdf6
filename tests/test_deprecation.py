"""Former keyword names: accepted under a warning, refused beside the new name, absent from the signature."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest

from delfast import InputError
from delfast.deprecation import renamed


@renamed(old="new", former="present")
def function(first: int, new: int = 0, *, present: int = 0) -> tuple[int, int, int]:
    return first, new, present


def test_former_names_are_accepted_with_a_warning_at_the_caller() -> None:
    call: Any = function
    with pytest.warns(DeprecationWarning, match="function: the keyword 'old' is now 'new'") as caught:
        assert call(1, old=2) == (1, 2, 0)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(DeprecationWarning) as caught:
        assert call(first=1, old=2, former=3) == (1, 2, 3)
    assert len(caught) == 2


def test_new_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function(1, 2, present=3) == function(1, new=2, present=3) == (1, 2, 3)
    assert list(inspect.signature(function).parameters) == ["first", "new", "present"]


def test_both_names_are_refused() -> None:
    call: Any = function
    with pytest.raises(InputError, match="got 'new' and its former name 'old'"):
        call(1, new=2, old=3)
    with pytest.raises(TypeError, match="multiple values for argument 'new'"), pytest.warns(DeprecationWarning):
        call(1, 2, old=3)
