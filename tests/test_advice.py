"""Advice in the error of a bad batch names an argument of the function that was called."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import delfast
from delfast import InputError
from delfast.evaluation import accuracy_and_loss, audit, kl_to_oracle, predictions
from delfast.unlearning import METHODS, train
from tests.groups import gloo_group

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
ARGUMENTS = ("loss_fn", "logits_fn")  # what a function may take for batches of another form


class Outputs(nn.Module):
    """A classifier, or another model by what is made of its logits."""

    def __init__(self, make: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(4, 3), make

    def forward(self, x: Any) -> Any:
        return self.make(self.layer(x))


BAD: dict[str, tuple[nn.Module, Any]] = {
    "mapping": (Outputs(), {"x": X}),
    "one part": (Outputs(), (X,)),
    "no index": (Outputs(), (X, X, Y)),
    "list of targets": (Outputs(), (X, Y.tolist())),
    "soft targets": (Outputs(), (X, torch.rand(6, 3))),
    "no tensor": (Outputs(lambda logits: {"logits": logits}), (X, Y)),
    "other logits": (Outputs(lambda logits: logits[:, None]), (X, Y)),
}


def good() -> list[Any]:
    return [(X, Y)]


def unlearned(method: str) -> Callable[[nn.Module, Any], Any]:
    needs: dict[str, Any] = {"init": Outputs} if "init" in METHODS[method].needs else {}
    return lambda model, batch: delfast.unlearn(
        model, forget=[batch], retain=[batch] * 12, method=method, head="layer", **needs
    )


Call = tuple[Callable[..., Any], Callable[[nn.Module, Any], Any]]
CALLS: dict[str, Call] = {
    "score": (delfast.score, lambda model, batch: delfast.score(model, [batch])),
    "score, per example": (delfast.score, lambda model, batch: delfast.score(model, [batch], per_example=True)),
    "score, critmem": (delfast.score, lambda model, batch: delfast.score(model, [batch], "critmem")),
    "localize": (delfast.localize, lambda model, batch: delfast.localize(model, [batch])),
    "localize, critmem": (delfast.localize, lambda model, batch: delfast.localize(model, [batch], strategy="critmem")),
    "signed_channels": (delfast.signed_channels, lambda model, batch: delfast.signed_channels(model, [batch])),
    "critmem": (delfast.critmem, lambda model, batch: delfast.critmem(model, [batch])),
    "tokens_per_example": (delfast.tokens_per_example, lambda _, batch: delfast.tokens_per_example([batch])),
    "causal_lm_loss": (delfast.causal_lm_loss, lambda model, batch: delfast.causal_lm_loss(model, batch)),
    "evaluate": (delfast.evaluate, lambda model, batch: delfast.evaluate(model, [batch], good(), good(), mia=False)),
    "accuracy_and_loss": (accuracy_and_loss, lambda model, batch: accuracy_and_loss(model, [batch])),
    "predictions": (predictions, lambda model, batch: predictions(model, [batch])),
    "kl_to_oracle": (kl_to_oracle, lambda model, batch: kl_to_oracle(model, copy.deepcopy(model), [batch])),
    "audit": (audit, lambda model, batch: audit(model, forget=[batch], retain=good(), test=good(), relearn=None)),
    "train": (
        train, lambda model, batch: train(model, [batch], torch.optim.SGD(model.parameters()), epochs=1, max_norm=1.0),
    ),
    **{f"unlearn, {method}": (delfast.unlearn, unlearned(method)) for method in METHODS},
}  # fmt: skip


def check_advice(message: str, function: Callable[..., Any]) -> None:
    """Check that every argument that the message names is one of the function, or of the one that it names instead."""
    found = re.search(r" to (critmem)\b", message)
    taken = inspect.signature(getattr(delfast, found[1]) if found else function).parameters
    named = {*re.findall(r"\bpass (\w+)(?=[=(])", message), *re.findall(rf"\b({'|'.join(ARGUMENTS)})\b", message)}
    assert "; " in message and named <= taken.keys(), message


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", CALLS)
def test_the_advice_is_an_argument_of_the_function(name: str, bad: str) -> None:
    (function, call), (model, batch) = CALLS[name], BAD[bad]
    with pytest.raises(InputError) as caught:
        call(model, batch)
    check_advice(str(caught.value), function)


def test_a_method_that_refuses_a_loss_fn_does_not_advise_it_alone() -> None:
    for method in ("relabel", "scrub"):
        with pytest.raises(InputError, match=r"pass loss_fn\(.*, to a method that needs no logits"):
            CALLS[f"unlearn, {method}"][1](*BAD["soft targets"])


def test_the_advice_is_the_same_with_a_group(tmp_path: Any) -> None:
    with gloo_group(tmp_path / "store"):
        group = torch.distributed.group.WORLD
        for function in (accuracy_and_loss, predictions):
            with pytest.raises(InputError, match="expected batches") as caught:
                function(Outputs(), iter([{"x": X}]), group=group)
            check_advice(str(caught.value), function)
