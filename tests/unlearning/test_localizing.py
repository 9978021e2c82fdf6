"""``unlearn`` with a budget and a strategy: the same as ``localize`` and ``unlearn`` within that mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delfast
from delfast import InputError
from delfast.unlearning import METHODS
from tests import cases

FORGET, RETAIN = cases.image_batches(8, seed=1), cases.image_batches(16, seed=2)
SETTINGS: dict[str, Any] = {"retain": RETAIN, "init": cases.SmallNet, "epochs": 1, "seed": 3}


def network() -> nn.Module:
    torch.manual_seed(0)
    return cases.SmallNet()


def unlearned(**options: Any) -> tuple[Any, dict[str, Tensor]]:
    model = network()
    result = delfast.unlearn(model, **{"forget": FORGET, **SETTINGS, **options})
    return result, model.state_dict()


@pytest.mark.parametrize(
    "options",
    [{}, {"budget": 0.5}, {"strategy": "salloc"}, {"budget": 0.1, "strategy": "random"}],
    ids=str,
)
def test_the_result_is_that_of_localize_and_unlearn(options: dict[str, Any]) -> None:
    mask = delfast.localize(network(), FORGET, **options, seed=SETTINGS["seed"])
    expected, weights = unlearned(mask=mask)
    result, same = unlearned(**options)
    assert result.mask.digest == expected.mask.digest and result.losses == expected.losses
    assert all(torch.equal(value, weights[name]) for name, value in same.items())


def test_a_strategy_that_reads_no_example_needs_no_forget_set() -> None:
    result, _ = unlearned(strategy="deepest", forget=None)
    assert result.mask.selected > 0
    with pytest.raises(InputError, match="expected a mask, or the forget set to localize"):
        unlearned(strategy="salloc", forget=None)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"del"}))
@pytest.mark.parametrize("given", [{"budget": 0.3}, {"strategy": "del"}], ids=str)
def test_a_method_that_does_not_localize_refuses_both(name: str, given: dict[str, Any]) -> None:
    (keyword,) = given
    with pytest.raises(InputError, match=f"expected no {keyword}= for '{name}'".replace("+", r"\+")):
        delfast.unlearn(network(), retain=RETAIN, forget=FORGET, init=cases.SmallNet, method=name, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.3, "mask": delfast.Mask({})}, "expected budget= or mask=, got both"),
        ({"strategy": "del", "mask": delfast.Mask({})}, "expected strategy= or mask=, got both"),
        ({"budget": 30}, r"expected a budget in \(0, 1\], got 30"),
        ({"strategy": "magic"}, "expected strategy to be one of del, .*got 'magic'"),
        ({"strategy": "weighted-grad-all"}, "expected a strategy that reads the forget set"),
        (
            {"strategy": "critmem", "loss_fn": lambda model, batch: model(batch[0])},
            "expected no loss_fn for criterion",
        ),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else None,
)
def test_what_localize_refuses_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        delfast.unlearn(model, forget=FORGET, **SETTINGS, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
